"""A disk without room: nothing half is left, people hear of it, and all goes on by itself."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.reconciler import Reconciler, Round
from ray_ckpt.core.failures import BLOCKED_FOR_S
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from tests.disks import fill, small_file_system
from tests.roots import make_root
from tests.waiting import wait_for


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", size="8m") as folder:
        yield folder


class Clock:
    """Rounds of one manager, at times that the test chooses."""

    def __init__(self, root: str) -> None:
        self.catalog = open_catalog(root)
        self.manager = Reconciler(self.catalog, Threads(), owner="test")
        self.now = time.time()

    def settle(self) -> Round:
        """The round after which nothing runs and nothing may start at this time."""

        def look() -> Round | None:
            done = self.manager.round(self.now)
            return None if done.running or done.waiting else done

        return wait_for(look)

    def pass_s(self, seconds: float) -> Round:
        self.now += seconds
        return self.settle()

    def states(self, kind: ActionKind) -> list[ActionState]:
        records = self.catalog.records.actions().values()
        return [record.state for record in records if record.action.kind is kind]


def block(clock: Clock) -> str:
    """How the last try failed, after the one retry that a lack of room deserves."""
    clock.settle()
    clock.pass_s(BLOCKED_FOR_S)
    blocked = [r for r in clock.catalog.records.actions().values() if r.error is not None]
    (record,) = blocked
    assert record.state is ActionState.BLOCKED
    return record.error or ""


def staged(root: Path) -> list[str]:
    folder = root / ".ray_ckpt" / "staging"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_an_export_waits_for_room_and_is_made_once_there_is_some(small_disk: Path) -> None:
    """Scenario 47: the exporter's disk is full."""
    root = small_disk / "run"
    make_root(str(root), (10,), LifecyclePolicy(export=(ExportPolicy(name="hf"),)))
    filler = fill(small_disk, but_bytes=60_000)
    clock = Clock(str(root))
    error = block(clock)
    assert "hf of step-10 needs" in error
    assert "are free" in error
    assert staged(root) == []
    (problem,) = [p for p in clock.settle().planned.problems if "room for" in p]
    assert problem.startswith("room for no more checkpoint: ")
    filler.unlink()
    clock.pass_s(BLOCKED_FOR_S)
    assert clock.states(ActionKind.EXPORT) == [ActionState.SUCCEEDED]
    assert [export.name for export in clock.catalog.observe().exports] == ["hf"]
    assert clock.settle().planned.problems == ()
    clock.manager.close()


def test_a_copy_waits_for_room_at_its_destination(small_disk: Path, root: str) -> None:
    """Scenario 47: nothing half is left there, and the checkpoint stays as it is."""
    policy = LifecyclePolicy(
        export=(ExportPolicy(name="hf"),),
        publish=(PublishPolicy(export="hf", to=str(small_disk / "copies")),),
    )
    make_root(root, (10,), policy)
    filler = fill(small_disk, but_bytes=20_000)
    clock = Clock(root)
    assert "a copy of export hf of step-10 needs" in block(clock)
    assert not list((small_disk / "copies").rglob("*.safetensors"))
    assert staged(small_disk / "copies") == []
    filler.unlink()
    clock.pass_s(BLOCKED_FOR_S)
    assert clock.states(ActionKind.PUBLISH) == [ActionState.SUCCEEDED]
    clock.manager.close()
