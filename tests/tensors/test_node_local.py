"""Saves to each node's own disk: ranks leave them there, and what brings them to the root."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.core.errors import StepExistsError
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.names import run_name
from ray_ckpt.core.observation import CheckpointView
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.core.saving import Mode
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.history import EventReader
from tests.roots import flip_byte
from tests.staged import HERE, config, rounds, stage
from tests.tensors.plain import EVERY_STEP_SYNC, Layer, loaded, plain_manager, saved_steps
from tests.tensors.tiny import error_of, record_log
from tests.waiting import PATIENCE_S


def view_of(catalog: Catalog, step: int) -> CheckpointView:
    return next(view for view in catalog.observe().checkpoints if view.step == step)


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


def left_on(disks: Path) -> list[str]:
    """Every file on the disks of the nodes."""
    return sorted(path.name for path in disks.rglob("*") if path.is_file())


def ended(catalog: Catalog, kind: ActionKind) -> list[ActionState]:
    return [r.state for r in catalog.records.actions().values() if r.action.kind is kind]


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    return tmp_path / "disks"


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def durable(request: pytest.FixtureRequest, root: str) -> str:
    """An empty root on a shared disk, and on an object store."""
    return root if request.param == "disk" else request.getfixturevalue("s3_root")


SLOW_ON_S3 = pytest.mark.parametrize(
    "durable",
    ["disk", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.slow])],
    indirect=True,
)


def test_a_staged_save_is_no_checkpoint_until_all_of_it_was_brought(
    durable: str, disks: Path
) -> None:
    told = stage(durable, disks, 5)
    assert told == [["staged 5"], []]
    catalog = open_catalog(durable)
    staged = view_of(catalog, 5)
    assert staged.state is CheckpointState.SAVING
    assert staged.problem == "staged on 2 nodes, 0 of 2 brought here"
    assert plan_resume(catalog.observe().checkpoints).skipped == (
        (5, "saving: staged on 2 nodes, 0 of 2 brought here"),
    )
    assert saved_steps(durable) == []

    drain(catalog, Threads())
    assert states(catalog) == {5: CheckpointState.VERIFIED}
    assert loaded(durable) == (5, {5.0})
    assert left_on(disks) == []
    assert catalog.observe().drafts == ()
    assert [p.key for p in catalog.store.list_objects(".ray_ckpt/staging")] == []
    assert [p.key for p in catalog.store.list_objects(".ray_ckpt/drafts")] == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "process"])
def test_every_mode_stages_and_saves_go_on_beside_what_is_still_to_be_brought(
    root: str, disks: Path, mode: Mode
) -> None:
    told = stage(root, disks, 5, 6, mode=mode)
    assert told[0] == ["staged 5", "staged 6"]
    catalog = open_catalog(root)
    assert states(catalog) == {5: CheckpointState.SAVING, 6: CheckpointState.SAVING}
    drain(catalog, Threads())
    assert saved_steps(root) == [5, 6]


def test_each_host_brings_its_own_part_and_the_first_says_which_others_are_needed(
    root: str, disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(root, disks, 5, hosts=(HERE, "host-b"))
    catalog = open_catalog(root)
    drain(catalog, Threads())
    assert view_of(catalog, 5).problem == "staged on 2 nodes, 1 of 2 brought here"
    command = [sys.executable, "-m", "ray_ckpt", "drain", root]
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE_S
    ).stdout
    assert f"step-5 is on host-b: type this there too: ray-ckpt drain {root}" in said

    monkeypatch.setattr(socket, "gethostname", lambda: "host-b")
    drain(catalog, Threads())
    assert loaded(root) == (5, {5.0})
    assert left_on(disks / "1") == []
    monkeypatch.undo()
    drain(catalog, Threads())
    assert left_on(disks) == []
    assert catalog.observe().drafts == ()


@SLOW_ON_S3
def test_a_node_that_is_lost_takes_only_what_was_never_committed_and_says_so(
    durable: str, disks: Path
) -> None:
    """Scenario 11: a node with saves on its own disk is lost."""
    stage(durable, disks, 4)
    catalog = open_catalog(durable)
    drain(catalog, Threads())
    stage(durable, disks, 5)
    shutil.rmtree(disks / "1")
    rounds(catalog)
    lost = view_of(catalog, 5)
    assert lost.state is CheckpointState.ABANDONED
    assert lost.problem is not None
    assert lost.problem.startswith(f"node lost: {HERE} (node id-1) held 1 files of step-5")
    assert "which was never committed" in lost.problem
    dead = [r for r in catalog.records.actions().values() if r.state is ActionState.DEAD]
    assert [r.error_kind for r in dead] == ["NodeLostError"]
    told = [event.text for event in EventReader(catalog.store).read()]
    assert any(text.startswith("step-5: saving -> abandoned: node lost") for text in told)
    assert loaded(durable) == (4, {4.0})
    assert left_on(disks) == [], "what the other node held is of no use"
    assert _of_step(catalog, 5) == []

    stage(durable, disks, 6)
    drain(catalog, Threads())
    assert loaded(durable) == (6, {6.0})


def _of_step(catalog: Catalog, step: int) -> list[str]:
    """What lies at the root of a step that is none, in its place or waiting for it."""
    folders = (f"step-{step}", ".ray_ckpt/staging")
    return [info.key for folder in folders for info in catalog.store.list_objects(folder)]


def test_a_file_that_was_damaged_on_its_node_never_becomes_part_of_a_checkpoint(
    root: str, disks: Path
) -> None:
    stage(root, disks, 5)
    flip_byte(next((disks / "1").rglob("*.distcp")), offset=10)
    catalog = open_catalog(root)
    rounds(catalog)
    assert view_of(catalog, 5).state is CheckpointState.ABANDONED
    assert "damaged" in (view_of(catalog, 5).problem or "")
    assert "__1_0.distcp" in (view_of(catalog, 5).problem or "")
    assert left_on(disks) == []


def test_an_abandoned_save_is_told_of_for_the_grace_time_and_then_forgotten(
    root: str, disks: Path
) -> None:
    stage(root, disks, 5)
    shutil.rmtree(disks / "1")
    catalog = open_catalog(root)
    rounds(catalog)
    assert states(catalog) == {5: CheckpointState.ABANDONED}
    rounds(catalog, count=12)
    assert states(catalog) == {}
    whats = {(event.what, event.step) for event in EventReader(catalog.store).read()}
    assert ("checkpoint.purged", 5) in whats


@SLOW_ON_S3
def test_a_roll_back_happens_when_the_new_branch_is_committed_and_not_before(
    durable: str, disks: Path
) -> None:
    stage(durable, disks, 4, 5, 6)
    catalog = open_catalog(durable)
    drain(catalog, Threads())
    stage(durable, disks, 5, resume=4, value=55.0)
    assert loaded(durable) == (6, {6.0})
    drain(catalog, Threads())
    assert loaded(durable) == (5, {55.0})
    trashed = {v.step for v in catalog.observe().checkpoints if v.state is CheckpointState.TRASHED}
    assert trashed == {5, 6}


@SLOW_ON_S3
def test_what_was_staged_by_a_run_that_died_gives_way_to_the_one_that_did_it_again(
    durable: str, disks: Path
) -> None:
    stage(durable, disks, 4)
    catalog = open_catalog(durable)
    drain(catalog, Threads())
    stage(durable, disks, 5, 6, value=-5.0)
    stage(durable, disks, 5, resume=4, value=55.0)
    drain(catalog, Threads())
    assert loaded(durable) == (5, {55.0})
    assert left_on(disks) == []


def test_a_pinned_step_of_the_branch_that_is_left_refuses_the_save(root: str, disks: Path) -> None:
    stage(root, disks, 4, 5)
    catalog = open_catalog(root)
    drain(catalog, Threads())
    catalog.pin(5, name="me", reason="the paper")
    with pytest.raises(AssertionError, match="steps \\[5\\] are here and step 5 is pinned"):
        stage(root, disks, 5, resume=4)
    assert left_on(disks) == []


def test_a_trainer_that_starts_keeps_what_is_to_be_brought_and_removes_the_rest(
    root: str, disks: Path
) -> None:
    stage(root, disks, 5)
    left = disks / "0" / run_name(root) / "save-0123456789ab0001"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"of a save that died")
    stage(root, disks)
    assert not left.exists()
    catalog = open_catalog(root)
    drain(catalog, Threads())
    assert loaded(root) == (5, {5.0})


def test_a_step_that_is_staged_is_not_saved_twice(root: str, tmp_path: Path) -> None:
    manager = plain_manager(root, Layer(), config(tmp_path / "disk"))
    manager.save(5)
    error = error_of(lambda: manager.save(5))
    told = record_log()
    manager.close()
    assert isinstance(error, StepExistsError)
    assert "on its way to the root" in error.what
    assert f"step-5 lies on {HERE} and is no checkpoint yet" in told[-1]
    assert f"ray-ckpt drain {root}" in told[-1]


def test_a_run_that_saves_to_the_root_again_gives_up_what_it_does_not_know_of(
    durable: str, tmp_path: Path
) -> None:
    first = plain_manager(durable, Layer(), config(tmp_path / "disk"))
    first.save(5)
    first.close()
    model = Layer()
    second = plain_manager(durable, model, EVERY_STEP_SYNC)
    second.load()
    model.fill(55.0)
    second.save(5)
    second.close()
    drain(open_catalog(durable), Threads())
    assert loaded(durable) == (5, {55.0})
    assert left_on(tmp_path / "disk") == []
