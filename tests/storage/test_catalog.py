"""Checkpoints and exports of one root, on a disk and on an object store."""

import json
from collections.abc import Callable

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import (
    ConfigError,
    ForeignFolderError,
    IntegrityError,
    ObjectExistsError,
    StepExistsError,
    StepNotFoundError,
)
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.observation import CheckpointView
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.core.wanted import purge_action, verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_object
from tests.storage.steps import (
    FILES,
    content_of,
    empty_trash,
    save_export,
    save_step,
    shard_name,
)

SHARD = "step-5/__0_0.distcp"


@pytest.fixture(
    params=[
        "root",
        pytest.param("s3_root", marks=pytest.mark.s3),
        pytest.param("lesser_root", marks=pytest.mark.s3),
    ]
)
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return open_catalog(request.getfixturevalue(request.param))


@pytest.fixture
def local(root: str) -> Catalog:
    return open_catalog(root)


def states(catalog: Catalog) -> list[tuple[int, CheckpointState]]:
    return [(view.step, view.state) for view in catalog.observe().checkpoints]


def purge(catalog: Catalog, step: int, *, at: float, grace_s: float = 60.0) -> None:
    """The step is in the trash, and a record says since when."""
    action = purge_action(catalog.checkpoint(step), grace_s=grace_s)
    catalog.trash(step)
    catalog.records.write_action(ActionRecord(action=action).started(at).succeeded({}, at))


def test_an_empty_root_has_nothing(catalog: Catalog) -> None:
    observed = catalog.observe()
    assert (observed.checkpoints, observed.exports, dict(observed.records)) == ((), (), {})
    assert observed.run_id == names.run_name(catalog.uri)


def test_a_committed_step_is_listed_whole(catalog: Catalog) -> None:
    manifest = save_step(catalog, 5)
    save_step(catalog, 40)
    assert states(catalog) == [(5, CheckpointState.COMMITTED), (40, CheckpointState.COMMITTED)]
    view = catalog.checkpoint(5)
    assert (view.manifest, view.pins, view.problem) == (manifest, (), None)
    assert catalog.manifest(5) == manifest
    assert content_of(catalog, 5) == FILES


def test_nothing_of_a_commit_is_left_in_staging(catalog: Catalog) -> None:
    save_step(catalog, 5)
    assert list(catalog.store.list_objects(names.STAGING)) == []


def test_a_whole_step_is_verified_and_a_record_remembers_it(catalog: Catalog) -> None:
    manifest = save_step(catalog, 5)
    assert catalog.verify(5) == manifest
    record = ActionRecord(action=verify_action(catalog.checkpoint(5)))
    catalog.records.write_action(record.started(1.0).succeeded({}, 2.0))
    assert states(catalog) == [(5, CheckpointState.VERIFIED)]


def own_shard(catalog: Catalog) -> str:
    return f"step-5/{shard_name(catalog, 'save5')}"


def flip(catalog: Catalog) -> None:
    data = bytearray(catalog.store.read(own_shard(catalog)))
    data[3] ^= 1
    catalog.store.write(own_shard(catalog), bytes(data))


def truncate(catalog: Catalog) -> None:
    catalog.store.write(own_shard(catalog), catalog.store.read(own_shard(catalog))[:-1])


def remove(catalog: Catalog) -> None:
    catalog.store.delete([own_shard(catalog)])


@pytest.mark.parametrize(
    ("harm", "text", "is_seen_at_once"),
    [
        (flip, "0.distcp is crc64nvme:", False),
        (truncate, "0.distcp has 16 bytes, the manifest says 17", True),
        (remove, "0.distcp is missing", True),
    ],
)
def test_damage_is_named_and_nothing_is_touched(
    catalog: Catalog, harm: Callable[[Catalog], None], text: str, is_seen_at_once: bool
) -> None:
    save_step(catalog, 4)
    save_step(catalog, 5)
    harm(catalog)
    with pytest.raises(IntegrityError, match="step-5 is corrupt") as caught:
        catalog.verify(5)
    assert text in caught.value.what
    assert "resume-plan" in caught.value.do
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.COMMITTED)]
    assert (catalog.checkpoint(5).problem is not None) is is_seen_at_once
    assert catalog.damage(4) == []


def test_shares_of_the_work_find_all_damage_between_them(local: Catalog) -> None:
    save_step(local, 5)
    flip(local)
    found = [local.damage(5, part=slice(rank, None, 2)) for rank in range(2)]
    assert [len(sentences) for sentences in found] == [0, 1]


def test_a_manifest_that_cannot_be_read_takes_the_step_out_of_use(catalog: Catalog) -> None:
    save_step(catalog, 4)
    save_step(catalog, 5)
    catalog.store.write(names.manifest_key("step-5"), b"{")
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.QUARANTINED)]
    with pytest.raises(IntegrityError):
        catalog.checkpoint(5)
    assert plan_resume(catalog.observe().checkpoints).step == 4


@pytest.mark.parametrize(
    "folder", ["exports/hf/step-5", f"{names.TRASH}/step-3.old", f"{names.QUARANTINE}/step-3.old"]
)
def test_a_broken_manifest_elsewhere_hides_no_checkpoint(catalog: Catalog, folder: str) -> None:
    save_step(catalog, 5)
    catalog.store.write(names.manifest_key(folder), b"{")
    observed = catalog.observe()
    assert plan_resume(observed.checkpoints).step == 5
    assert observed.exports == ()
    assert empty_trash(catalog, older_than_s=0.0, now=1e9) == {}
    assert catalog.store.stat(names.manifest_key(folder)) is not None


def test_a_foreign_folder_is_never_used_and_never_replaced(catalog: Catalog) -> None:
    catalog.store.write(SHARD, b"somebody else's")
    assert states(catalog) == [(5, CheckpointState.FOREIGN)]
    for use in (catalog.checkpoint, catalog.manifest, catalog.verify, catalog.refuse_existing):
        with pytest.raises(ForeignFolderError, match="without a manifest") as caught:
            use(5)
        assert "adopt" in caught.value.do
    assert plan_resume(catalog.observe().checkpoints).step is None
    assert catalog.store.read(SHARD) == b"somebody else's"


@pytest.mark.s3
def test_a_save_in_flight_on_an_object_store_is_passed_over(s3_root: str) -> None:
    catalog = open_catalog(s3_root)
    save_step(catalog, 4)
    staging = catalog.commit.staging("save-one-rank")
    (staging / "__0_0.distcp").write_bytes(b"one rank of two")
    catalog.commit.contribute(staging, "step-5")
    catalog.commit.discard(staging)
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.SAVING)]
    assert plan_resume(catalog.observe().checkpoints).step == 4
    save_step(catalog, 5)
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.COMMITTED)]
    catalog.verify(5)


def test_an_adopted_folder_is_a_checkpoint(catalog: Catalog) -> None:
    catalog.store.write(SHARD, b"somebody else's")
    entry = describe_object(catalog.store, SHARD, name="__0_0.distcp", algorithm=STRONG_ALGORITHM)
    lineage = Lineage(run_id="run")
    catalog.adopt(Manifest(step=5, save_id="a", created_at="", lineage=lineage, files=(entry,)))
    catalog.verify(5)
    assert states(catalog) == [(5, CheckpointState.COMMITTED)]


def test_a_leftover_folder_is_no_step(catalog: Catalog) -> None:
    for folder in ("step-05", "step-5.tmp", "my-step-5", "notes"):
        catalog.store.write(f"{folder}/{names.MANIFEST}", b"{")
    assert states(catalog) == []


def test_a_committed_step_is_never_written_again(catalog: Catalog) -> None:
    manifest = save_step(catalog, 5)
    with pytest.raises(StepExistsError, match="never written again"):
        catalog.refuse_existing(5)
    catalog.refuse_existing(6)
    staging = catalog.commit.staging("save-other")
    (staging / "__0_0.distcp").write_bytes(b"other weights")
    with pytest.raises(StepExistsError):
        catalog.commit_step(staging, manifest)
    assert content_of(catalog, 5) == FILES


@pytest.mark.parametrize("use", ["checkpoint", "manifest", "verify", "trash"])
def test_a_step_that_is_not_there_is_answered_with_the_ones_that_are(
    catalog: Catalog, use: str
) -> None:
    save_step(catalog, 4)
    save_step(catalog, 12)
    with pytest.raises(StepNotFoundError) as caught:
        getattr(catalog, use)(5)
    assert caught.value.what == "step-5 is not there; committed steps: 4, 12"
    assert caught.value.do == f"ray-ckpt ls {catalog.uri}"


def names_of_pins(catalog: Catalog) -> tuple[str, ...]:
    return tuple(pin.name for pin in catalog.checkpoint(5).pins)


def test_a_pin_stays_with_the_step_until_it_is_removed(catalog: Catalog) -> None:
    save_step(catalog, 5)
    catalog.pin(5, name="paper", reason="figure 2")
    catalog.pin(5, name="v1.0", reason="released")
    assert names_of_pins(catalog) == ("paper", "v1.0")
    document = json.loads(catalog.store.read(names.pin_key(5, "paper")))
    assert (document["name"], document["reason"]) == ("paper", "figure 2")
    assert catalog.damage(5) == []
    assert catalog.unpin(5, name="absent") == []
    assert catalog.unpin(5, name="paper") == ["paper"]
    assert names_of_pins(catalog) == ("v1.0",)
    assert catalog.unpin(5) == ["v1.0"]
    assert names_of_pins(catalog) == ()


def test_a_pin_needs_a_step_and_a_name_that_can_be_a_key(local: Catalog) -> None:
    with pytest.raises(StepNotFoundError):
        local.pin(5, name="paper", reason="")
    save_step(local, 5)
    with pytest.raises(ConfigError, match="cannot name a pin"):
        local.pin(5, name="../step-6/x", reason="")


def test_a_trashed_step_is_gone_and_comes_back_whole(catalog: Catalog) -> None:
    save_step(catalog, 4)
    save_step(catalog, 5)
    catalog.trash(5)
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.TRASHED)]
    with pytest.raises(StepNotFoundError, match="step-5 is in the trash") as caught:
        catalog.checkpoint(5)
    assert caught.value.do == f"ray-ckpt undo {catalog.uri} 5"
    catalog.restore(5)
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.COMMITTED)]
    assert content_of(catalog, 5) == FILES
    catalog.verify(5)


def test_only_what_is_in_the_trash_can_be_restored(catalog: Catalog) -> None:
    save_step(catalog, 5)
    with pytest.raises(StepNotFoundError, match="the trash holds no step-5"):
        catalog.restore(5)


def test_a_restore_never_replaces_a_step_that_was_saved_anew(catalog: Catalog) -> None:
    save_step(catalog, 5)
    catalog.trash(5)
    save_step(catalog, 5, files={"__0_0.distcp": b"the new one"}, save_id="second")
    with pytest.raises(StepExistsError):
        catalog.restore(5)
    assert content_of(catalog, 5) == {"__0_0.distcp": b"the new one"}


def test_the_trash_is_emptied_after_the_grace_time_and_not_before(catalog: Catalog) -> None:
    manifest = save_step(catalog, 5)
    purge(catalog, 5, at=1000.0)
    assert empty_trash(catalog, older_than_s=60.0, now=1059.0) == {}
    assert (5, CheckpointState.TRASHED) in states(catalog)
    freed = empty_trash(catalog, older_than_s=60.0, now=1060.0)
    assert list(freed) == [5]
    assert freed[5] >= manifest.total_bytes
    assert states(catalog) == []
    assert list(catalog.store.list_objects("step-5")) == []
    assert list(catalog.store.list_objects(names.TRASH)) == []
    assert empty_trash(catalog, older_than_s=60.0, now=1060.0) == {}


def test_the_grace_time_begins_anew_with_the_last_purge(local: Catalog) -> None:
    save_step(local, 5)
    graces = [60.0, 61.0, 62.0, 63.0]
    for number, grace_s in enumerate(graces):
        purge(local, 5, at=1000.0 * (len(graces) - number), grace_s=grace_s)
        local.restore(5)
    purge(local, 5, at=9000.0, grace_s=59.0)
    assert empty_trash(local, older_than_s=60.0, now=9001.0) == {}


def test_what_a_person_put_in_the_trash_is_left_alone(catalog: Catalog) -> None:
    save_step(catalog, 5)
    catalog.trash(5)
    assert empty_trash(catalog, older_than_s=0.0, now=1e9) == {}
    catalog.restore(5)
    catalog.verify(5)


def test_emptying_the_trash_spares_a_step_that_was_saved_anew(catalog: Catalog) -> None:
    save_step(catalog, 5)
    purge(catalog, 5, at=1000.0)
    save_step(catalog, 5, files={"__0_0.distcp": b"the new one"}, save_id="second")
    empty_trash(catalog, older_than_s=0.0, now=2000.0)
    assert content_of(catalog, 5) == {"__0_0.distcp": b"the new one"}
    catalog.verify(5)
    assert states(catalog) == [(5, CheckpointState.COMMITTED)]


def test_a_damaged_step_is_set_aside_and_kept(catalog: Catalog) -> None:
    save_step(catalog, 4)
    save_step(catalog, 5)
    catalog.pin(5, name="paper", reason="figure 2")
    flip(catalog)
    catalog.quarantine(5)
    assert states(catalog) == [(4, CheckpointState.COMMITTED), (5, CheckpointState.QUARANTINED)]
    with pytest.raises(IntegrityError):
        catalog.checkpoint(5)
    assert empty_trash(catalog, older_than_s=0.0, now=1e9) == {}
    assert (5, CheckpointState.QUARANTINED) in states(catalog)
    catalog.refuse_existing(5)


def test_an_export_is_found_by_name_and_step(catalog: Catalog) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    manifest = save_export(catalog, "hf", 5, files=files, save_id="e1")
    found = catalog.export("hf", 5)
    assert (found.name, found.step, found.manifest) == ("hf", 5, manifest)
    assert catalog.observe().exports == (found,)
    assert catalog.store.read("exports/hf/step-5/config.json") == b"{}"
    for name, step in (("hf", 6), ("other", 5)):
        with pytest.raises(StepNotFoundError, match="has no export called"):
            catalog.export(name, step)


def test_an_export_without_a_manifest_is_not_there(catalog: Catalog) -> None:
    catalog.store.write("exports/hf/step-5/model.safetensors", b"half")
    assert catalog.observe().exports == ()


def test_the_same_export_made_twice_is_there_once(catalog: Catalog) -> None:
    files = {"model.safetensors": b"weights"}
    first = save_export(catalog, "hf", 5, files=files, save_id="e1")
    save_export(catalog, "hf", 5, files=files, save_id="e2")
    assert catalog.export("hf", 5).manifest == first
    with pytest.raises(ObjectExistsError):
        save_export(catalog, "hf", 5, files={"model.safetensors": b"other"}, save_id="e3")
    assert catalog.store.read("exports/hf/step-5/model.safetensors") == b"weights"


def test_the_views_are_sorted_by_step(local: Catalog) -> None:
    for step in (100, 9, 20):
        save_step(local, step)
    local.trash(20)
    views: tuple[CheckpointView, ...] = local.observe().checkpoints
    assert [view.step for view in views] == [9, 20, 100]
