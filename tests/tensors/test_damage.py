"""Damage is found before training goes on: told, set aside, and trained anew; or it is an error."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, RayCkptError, StepExistsError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.adopt import adopt_step
from ray_ckpt.tensors.loading import LoadReport
from tests.tensors.plain import (
    EVERY_STEP_SYNC,
    Layer,
    loaded,
    plain_manager,
    save_steps,
    saved_steps,
)
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of, files_in, record_log

STRICT = LoadConfig(on_damage="raise")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap(step: Path) -> None:
    """The shards of two ranks change places."""
    one, other = step / "__0_0.distcp", step / "__1_0.distcp"
    one.rename(step / "aside")
    other.rename(one)
    (step / "aside").rename(other)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a flipped bit in a shard": ("__1_0.distcp", lambda step: _flip(step / "__1_0.distcp")),
    "a flipped bit in the index": (".metadata", lambda step: _flip(step / ".metadata")),
    "a flipped bit in an asset": ("tokenizer", lambda step: _flip(step / "hf_assets/tokenizer.x")),
    "a truncated shard": ("__1_0.distcp", lambda step: os.truncate(step / "__1_0.distcp", 99)),
    "a shard without a byte": ("__0_0.distcp", lambda step: os.truncate(step / "__0_0.distcp", 0)),
    "a missing shard": ("__0_0.distcp", lambda step: (step / "__0_0.distcp").unlink()),
    "shards that were swapped": ("__0_0.distcp", _swap),
    "a missing index": (".metadata", lambda step: (step / ".metadata").unlink()),
    "a truncated manifest": ("manifest", lambda step: os.truncate(step / names.MANIFEST, 500)),
    "an empty manifest": ("manifest", lambda step: os.truncate(step / names.MANIFEST, 0)),
    "an altered manifest": ("manifest", lambda step: _flip(step / names.MANIFEST)),
}


@dataclass(frozen=True, kw_only=True)
class Met:
    """How one rank met a damaged step."""

    by_number: RayCkptError | None
    strict: RayCkptError | None
    is_untouched: bool
    """Whether these two left storage as it was."""
    held: set[float]
    """Of the model, after these two."""
    report: LoadReport
    values: set[float]
    """Of the model, after a load that may fall back."""
    told: list[str]


def _write(root: str) -> None:
    model = Layer()
    manager = plain_manager(root, model, EVERY_STEP_SYNC, assets={"tokenizer.x": b"words" * 9})
    for step in (1, 2):
        model.fill(step)
        manager.save(step)
    manager.close()


def _meet_all(roots: dict[str, str]) -> dict[str, Met]:
    """Each root is loaded from, and step 2 is saved anew."""
    return {name: _meet(root) for name, root in roots.items()}


def _meet(root: str) -> Met:
    told = record_log()
    model = Layer(value=-1.0)
    manager = plain_manager(root, model, EVERY_STEP_SYNC)
    before = files_in(root)
    by_number = error_of(lambda: manager.load(step=2))
    strict = error_of(lambda: manager.load(config=STRICT))
    is_untouched = files_in(root) == before
    held = model.values()
    report = manager.load()
    met = Met(
        by_number=by_number,
        strict=strict,
        is_untouched=is_untouched,
        held=held,
        report=report,
        values=model.values(),
        told=told[:],
    )
    model.fill(22.0)
    manager.save(2)
    manager.close()
    return met


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Met]]]:
    """By kind of damage the root that had it, and how both ranks met it."""
    folder = tmp_path_factory.mktemp("damage")
    run(_write, str(folder / "sound"))
    roots = {name: str(folder / name.replace(" ", "-")) for name in DAMAGES}
    for name, root in roots.items():
        shutil.copytree(folder / "sound", root)
        DAMAGES[name][1](Path(root) / "step-2")
    ranks = run(_meet_all, roots)
    return {name: (Path(root), [rank[name] for rank in ranks]) for name, root in roots.items()}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_refused_by_number_and_to_whoever_is_strict(
    met: dict[str, tuple[Path, list[Met]]], name: str
) -> None:
    """Scenarios 18 to 21: a flipped bit, a lost or short shard, a bad index, a bad manifest."""
    for rank in met[name][1]:
        for error in (rank.by_number, rank.strict):
            assert isinstance(error, IntegrityError)
            assert DAMAGES[name][0] in f"{error}"
            assert "step-2" in f"{error}"
            says_so = "do not train on" in error.safe
            assert says_so or rank.held == {-1.0}, "the model is as it was, or the error tells"
        assert rank.is_untouched


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_passed_over_told_and_trained_anew(
    met: dict[str, tuple[Path, list[Met]]], name: str
) -> None:
    """Scenarios 18 to 21: the step before it is loaded, and the damaged one is kept aside."""
    root, ranks = met[name]
    for rank in ranks:
        assert (rank.report.step, rank.values) == (1, {1.0})
        ((step, why),) = rank.report.skipped
        assert step == 2
        assert DAMAGES[name][0] in why
    warnings = [line for line in ranks[0].told if line.startswith("WARNING")]
    assert len(warnings) == 2, "moved, and passed over"
    assert all("step-2" in line and DAMAGES[name][0] in line for line in warnings)
    assert ranks[1].told == [], "rank 0 speaks for all"
    views = open_catalog(str(root)).observe().checkpoints
    assert [v.step for v in views if v.state is CheckpointState.QUARANTINED] == [2]
    assert saved_steps(root) == [1, 2]
    assert loaded(root) == (2, {22.0})


def test_when_all_steps_are_damaged_no_run_starts_from_scratch_beside_them(
    tmp_path: Path,
) -> None:
    run(_write, str(tmp_path))
    for step in ("step-1", "step-2"):
        _flip(tmp_path / step / "__0_0.distcp")
    manager = plain_manager(tmp_path, Layer())
    with pytest.raises(IntegrityError, match="training did not start from scratch"):
        manager.load()
    manager.close()


@pytest.mark.s3
@pytest.mark.parametrize("name", [names.MANIFEST, ".distcp"])
def test_a_damaged_step_of_an_object_store_is_passed_over_and_saved_anew(
    s3_root: str, name: str
) -> None:
    save_steps(s3_root, 1, 2)
    store = open_catalog(s3_root).store
    (key,) = (info.key for info in store.list_objects("step-2") if info.key.endswith(name))
    store.write(key, store.read(key)[:99])
    model = Layer(value=-1.0)
    manager = plain_manager(s3_root, model, EVERY_STEP_SYNC)
    assert (manager.load().step, model.values()) == (1, {1.0})
    model.fill(22.0)
    manager.save(2)
    manager.close()
    assert saved_steps(s3_root) == [1, 2]
    assert loaded(s3_root) == (2, {22.0})


# ---- what would run code ----


class _Call:
    """Pickled, it is a call that leaves a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def test_code_in_an_adopted_step_is_never_run(tmp_path: Path) -> None:
    """It hides beside the tensors, in a shard whose digest adoption has recorded."""
    mark = tmp_path / "was-here"
    state = {
        "weight": torch.full((8, 4), 7.0),
        "bias": torch.full((4,), 7.0),
        "train_state": {"step": _Call(mark), "num_samples": 7},
    }
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save(state, checkpoint_id=tmp_path / "run/step-7")
    adopt_step(open_catalog(str(tmp_path / "run")), 7)
    model = Layer(value=-1.0)
    manager = plain_manager(tmp_path / "run", model)
    with pytest.raises(IntegrityError, match=r"train_state\.step holds a pickle") as error:
        manager.load()
    assert not mark.exists()
    assert "exclude=('train_state',)" in error.value.do
    assert manager.load(config=LoadConfig(exclude=("train_state",))).step == 7
    assert (model.values(), mark.exists()) == ({7.0}, False)
    manager.close()


def test_an_index_that_would_run_code_is_set_aside_unread(tmp_path: Path) -> None:
    """Scenario 20: a malicious index."""
    run(_write, str(tmp_path / "run"))
    mark = tmp_path / "was-here"
    index = tmp_path / "run/step-2/.metadata"
    index.write_bytes(pickle.dumps(_Call(mark)).ljust(index.stat().st_size, b"."))
    assert loaded(tmp_path / "run") == (1, {1.0})
    assert not mark.exists()


def test_a_step_of_a_newer_version_is_passed_over_and_never_touched(tmp_path: Path) -> None:
    """Scenario 25: the manifest has a schema that this version does not know."""
    root = tmp_path / "run"
    save_steps(root, 1, 2)
    key = root / "step-2" / names.MANIFEST
    document = json.loads(key.read_text())
    key.write_text(json.dumps({**document, "schema": "ray_ckpt.manifest/9"}))
    before = files_in(root / "step-2")
    model = Layer(value=-1.0)
    manager = plain_manager(root, model, EVERY_STEP_SYNC)
    report = manager.load()
    assert (report.step, model.values()) == (1, {1.0})
    ((step, why),) = report.skipped
    assert (step, "schema 'ray_ckpt.manifest/9'" in why) == (2, True)
    with pytest.raises(StepExistsError):
        manager.do_save(2, "test", last_step=False, metrics={}).wait()
    manager.close()
    assert files_in(root / "step-2") == before
