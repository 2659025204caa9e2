import dataclasses

import pytest

from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest, TensorBytes
from ray_ckpt.core.observation import CheckpointView, ExportView, Observation
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.usage import Kind, Owners, Split, split, usage


def manifest(step: int, *files: str, save_id: str = "aa") -> Manifest:
    return Manifest(
        step=step,
        save_id=save_id,
        created_at="2030-01-02T03:04:05+00:00",
        lineage=Lineage(run_id="run"),
        files=tuple(FileEntry(path=f, size_bytes=10, digest="sha256:00") for f in files),
    )


OBSERVED = Observation(
    run_id="run",
    policy=LifecyclePolicy(),
    checkpoints=(
        CheckpointView(
            step=5,
            state=CheckpointState.VERIFIED,
            manifest=manifest(5, "__0_bb_0.distcp", ".metadata", save_id="bb"),
        ),
        CheckpointView(
            step=5, state=CheckpointState.TRASHED, manifest=manifest(5, "__0_aa_0.distcp")
        ),
        CheckpointView(step=6, state=CheckpointState.FOREIGN),
    ),
    exports=(ExportView(name="hf", step=5, manifest=manifest(5, "model.safetensors")),),
)
KEYS = {
    "step-5/__0_bb_0.distcp": (Kind.CHECKPOINT, "step-5"),
    "step-5/ray_ckpt.manifest.json": (Kind.CHECKPOINT, "step-5"),
    "step-5/ray_ckpt.pin.ada.json": (Kind.CHECKPOINT, "step-5"),
    "step-5/__0_aa_0.distcp": (Kind.TRASH, "step-5"),
    "step-5/__0_cc_0.distcp": (Kind.UNFINISHED, "save of step-5"),
    "step-5/notes.txt": (Kind.NOT_OURS, "step-5"),
    ".ray_ckpt/trash/step-5.aa/.metadata": (Kind.TRASH, "step-5"),
    ".ray_ckpt/quarantine/step-4.zz/.metadata": (Kind.QUARANTINE, "step-4"),
    "step-6/.metadata": (Kind.NOT_OURS, "step-6"),
    "step-7/.metadata": (Kind.UNFINISHED, "save of step-7"),
    ".ray_ckpt/staging/step-7.begun": (Kind.RECORDS, "requests, actions, events, leases"),
    "exports/hf/step-5/model.safetensors": (Kind.EXPORT, "hf of step-5"),
    "exports/hf/step-7/model.safetensors": (Kind.UNFINISHED, "export hf of step-7"),
    ".ray_ckpt/staging/exports/hf/step-7.begun": (
        Kind.RECORDS,
        "requests, actions, events, leases",
    ),
    "exports/old/step-7/model.safetensors": (Kind.NOT_OURS, "exports/old/step-7"),
    "exports/hf/latest": (Kind.RECORDS, "names that lead to copies"),
    ".ray_ckpt/staging/export-0123/x": (Kind.UNFINISHED, "attempt export-0123"),
    ".ray_ckpt/run.json": (Kind.RECORDS, "requests, actions, events, leases"),
    "wandb/log": (Kind.NOT_OURS, "wandb"),
    "readme": (Kind.NOT_OURS, "readme"),
}


@pytest.mark.parametrize("key", KEYS)
def test_every_object_has_one_owner(key: str) -> None:
    owner = Owners.of(OBSERVED, KEYS).owner(key)
    assert (owner.kind, owner.name) == KEYS[key]


def test_room_is_summed_by_owner_the_largest_first() -> None:
    uses = usage(Owners.of(OBSERVED, KEYS), ((key, 100) for key in KEYS))
    assert sum(use.size_bytes for use in uses) == 100 * len(KEYS)
    assert [use.size_bytes for use in uses] == sorted((u.size_bytes for u in uses), reverse=True)
    assert {(u.owner.kind, u.owner.name): u.num_files for u in uses} == {
        owner: list(KEYS.values()).count(owner) for owner in KEYS.values()
    }


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ((), Split(model=120, optimizer=300, rest=180)),
        (("f", "h"), Split(model=20, optimizer=0, rest=580)),
    ],
)
def test_a_checkpoint_is_told_apart_by_what_its_files_hold(
    without: tuple[str, ...], expected: Split
) -> None:
    held = {
        "f": TensorBytes(model=100, optimizer=300),
        "g": TensorBytes(model=20, optimizer=0),
    }
    whole = dataclasses.replace(manifest(5, "f", "g", "h"), tensor_bytes=held)
    assert split(whole, 600, without=without) == expected
