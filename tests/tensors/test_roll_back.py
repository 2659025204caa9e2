"""A run that goes on from an older step: the newer ones go to the trash, none is lost or mixed."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt.core.errors import IntegrityError, RayCkptError, UsageError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.loading import FromWeights, LoadConfig
from ray_ckpt.core.saving import ModelOnly, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from tests.tensors.plain import (
    EVERY_STEP,
    EVERY_STEP_SYNC,
    Layer,
    loaded,
    plain_manager,
    save_steps,
    saved_steps,
)
from tests.tensors.tiny import error_of, files_in

COMMITTED, TRASHED = CheckpointState.COMMITTED, CheckpointState.TRASHED


def _states(root: Path) -> list[tuple[int, CheckpointState]]:
    return sorted((v.step, v.state) for v in open_catalog(str(root)).observe().checkpoints)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1, 2, 3 and 4, each full of its own number."""
    save_steps(tmp_path / "run", 1, 2, 3, 4)
    return tmp_path / "run"


def test_the_first_save_sets_the_newer_steps_aside_and_undo_brings_one_back(root: Path) -> None:
    """Scenario 12: resumed at a lower step, a step is saved that was there before; never a mix."""
    model = Layer()
    manager = plain_manager(root, model, EVERY_STEP)
    assert manager.load(step=2).step == 2
    assert saved_steps(root) == [1, 2, 3, 4], "a load alone changes nothing"
    model.fill(33.0)
    manager.save(3)
    manager.wait()
    assert _states(root) == [
        (1, COMMITTED),
        (2, COMMITTED),
        (3, COMMITTED),
        (3, TRASHED),
        (4, TRASHED),
    ]
    model.fill(44.0)
    manager.save(5)
    manager.close()
    assert saved_steps(root) == [1, 2, 3, 5], "its own steps are no other branch"
    open_catalog(str(root)).restore(4)
    model = Layer()
    manager = plain_manager(root, model)
    assert manager.load(step=4).step == 4
    manager.close()
    assert model.values() == {4.0}


def test_a_pinned_newer_step_refuses_every_save_and_nothing_is_changed(root: Path) -> None:
    catalog = open_catalog(str(root))
    catalog.pin(4, name="me", reason="the paper")
    before = {name: text for name, text in files_in(root).items() if name.startswith("step-")}
    manager = plain_manager(root, Layer(), EVERY_STEP_SYNC)
    manager.load(step=2)
    error = error_of(lambda: manager.save(3))
    manager.close()
    assert isinstance(error, UsageError)
    assert "step 4 is pinned" in error.what
    after = {name: text for name, text in files_in(root).items() if name.startswith("step-")}
    assert after == before
    assert _states(root) == [(step, COMMITTED) for step in (1, 2, 3, 4)]
    assert list((root / ".ray_ckpt/staging").iterdir()) == []


def test_a_save_that_fails_after_the_roll_back_leaves_the_step_that_was_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = plain_manager(root, Layer(), EVERY_STEP_SYNC)
    manager.load(step=2)
    with monkeypatch.context() as patched:
        patched.setattr("ray_ckpt.storage.catalog.Catalog.commit_step", _refuse)
        with pytest.raises(RayCkptError, match="no"):
            manager.save(3)
    manager.close()
    assert loaded(root) == (2, {2.0})
    assert _states(root) == [(1, COMMITTED), (2, COMMITTED), (3, TRASHED), (4, TRASHED)]


def _refuse(*_: object) -> None:
    raise IntegrityError("no")


def test_a_run_that_resumes_from_the_newest_step_rolls_nothing_back(root: Path) -> None:
    manager = plain_manager(root, Layer(), EVERY_STEP_SYNC)
    manager.load()
    manager.save(5)
    manager.close()
    assert _states(root) == [(step, COMMITTED) for step in (1, 2, 3, 4, 5)]


@pytest.mark.s3
def test_on_an_object_store_the_same_holds_and_plain_dcp_reads_what_was_saved_anew(
    s3_root: str, tmp_path: Path
) -> None:
    save_steps(s3_root, 1, 2, 3, 4)
    model = Layer()
    manager = plain_manager(s3_root, model, EVERY_STEP_SYNC)
    manager.load(step=2)
    model.fill(33.0)
    manager.save(3)
    manager.close()
    assert loaded(s3_root) == (3, {33.0})
    catalog = open_catalog(s3_root)
    states = sorted((v.step, v.state) for v in catalog.observe().checkpoints)
    assert states == [(1, COMMITTED), (2, COMMITTED), (3, COMMITTED), (3, TRASHED), (4, TRASHED)]
    catalog.restore(4)
    assert loaded(s3_root) == (4, {4.0})
    catalog.quarantine(3)
    catalog.restore(3)
    assert saved_steps(s3_root) == [1, 2, 3, 4]
    for info in list(catalog.store.list_objects("step-3")):
        catalog.store.download(info.key, tmp_path / Path(info.key).name)
    plain = {"weight": torch.zeros(8, 4)}
    dcp.load(plain, checkpoint_id=tmp_path)
    assert plain["weight"].unique().tolist() == [3.0]


def test_on_a_disk_shards_are_named_as_torch_names_them(root: Path) -> None:
    assert [path.name for path in sorted((root / "step-1").glob("*.distcp"))] == ["__0_0.distcp"]


# ---- a last step that holds the model alone ----


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Steps 1 and 2; the latter ended the run and holds the model alone."""
    model = Layer()
    config = SaveConfig(every_steps=1, mode="sync", last=ModelOnly())
    manager = plain_manager(tmp_path / "run", model, config)
    for step in (1, 2):
        model.fill(step)
        manager.save(step, last_step=step == 2)
    manager.close()
    return tmp_path / "run"


def test_a_step_that_holds_the_model_alone_is_passed_over_on_resume(finished: Path) -> None:
    model = Layer()
    manager = plain_manager(finished, model, EVERY_STEP_SYNC)
    report = manager.load()
    assert (report.step, model.values()) == (1, {1.0})
    ((step, why),) = report.skipped
    assert step == 2
    assert "holds the model only" in why
    model.fill(22.0)
    manager.save(2)
    manager.close()
    assert loaded(finished) == (2, {22.0})
    assert _states(finished) == [(1, COMMITTED), (2, COMMITTED), (2, TRASHED)]


def test_asked_for_by_number_it_is_refused_with_the_way_to_start_from_it(finished: Path) -> None:
    manager = plain_manager(finished, Layer())
    with pytest.raises(UsageError, match="holds the model only") as error:
        manager.load(step=2)
    manager.close()
    assert "FromWeights" in error.value.do


def test_another_run_starts_from_it(finished: Path, tmp_path: Path) -> None:
    model = Layer()
    manager = plain_manager(tmp_path / "another", model)
    start = FromWeights(path=f"{finished}/step-2")
    assert manager.load(config=LoadConfig(start=start)).step == 0
    manager.close()
    assert model.values() == {2.0}
