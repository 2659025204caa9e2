"""Storage that refuses a save: told in full, cleaned up, and the next save is a save like any."""

import errno
import itertools
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ray_ckpt.core.errors import RayCkptError, SaveError, StorageFullError, TransientError
from ray_ckpt.core.events import SaveEvent, SaveStats
from ray_ckpt.core.saving import Mode, SaveConfig
from tests.disks import fill, small_file_system
from tests.tensors.faults import DIED, SURVIVED, Refuse, arm, attempts
from tests.tensors.plain import (
    EVERY_STEP,
    EVERY_STEP_SYNC,
    Layer,
    before,
    loaded,
    plain_manager,
    save_steps,
    saved_steps,
)
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of, record_log

KINDS = {
    errno.ENOSPC: StorageFullError,
    errno.EIO: TransientError,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one process knows of a save that was refused, and of the one after it."""

    error: RayCkptError | None
    steps: list[int]
    """That can be read after the refusal."""
    staged: list[str]
    events: list[SaveEvent]


def _save_twice(root: str, number: int, code: int) -> None:
    """Step 2 meets the fault, step 3 does not."""
    events: list[SaveEvent] = []
    model = Layer()
    manager = plain_manager(root, model, EVERY_STEP, on_event=events.append)
    manager.load()
    model.fill(2.0)
    refuse = Refuse(code)
    fault = arm(Path(root), number, refuse)
    pending = manager.do_save(2, "test", last_step=False, metrics={})
    error = pending.error()
    fault.stop()
    steps = saved_steps(root)
    staged = [path.name for path in Path(root, ".ray_ckpt/staging").iterdir()]
    model.fill(3.0)
    manager.save(3)
    manager.close()
    outcome = Outcome(error=error, steps=steps, staged=staged, events=events)
    Path(f"{root}.outcome").write_bytes(pickle.dumps(outcome))
    os._exit(DIED if refuse.was_asked else SURVIVED)


@pytest.mark.parametrize(
    "code",
    [c if c == errno.ENOSPC else pytest.param(c, marks=pytest.mark.slow) for c in KINDS],
    ids=errno.errorcode.get,
)
def test_a_save_that_is_refused_anywhere_is_told_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, code: int
) -> None:
    """Scenarios 8 and 9: no space, or the device fails, at any call of a save."""
    save_steps(tmp_path / "old", 1)

    def roots() -> Iterator[str]:
        for number in itertools.count():
            yield shutil.copytree(tmp_path / "old", tmp_path / f"run{number}").as_posix()

    for _, root in attempts(_save_twice, roots(), code):
        outcome: Outcome = pickle.loads(Path(f"{root}.outcome").read_bytes())
        error = outcome.error
        assert outcome.staged == []
        assert outcome.steps in ([1], [1, 2])
        assert [event.kind for event in outcome.events] == [
            "failed" if error else "committed",
            "committed",
        ]
        if error is not None:
            assert isinstance(error, KINDS[code])
            assert f"step-2 failed on rank 0: {os.strerror(code)}" in error.what
            assert root in error.where
            assert error.safe
            assert error.do
            assert error.what in outcome.events[0].reason
        assert saved_steps(root) == [*outcome.steps, 3]
        assert loaded(root) == (3, {3.0})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", size="1m") as folder:
        yield folder


@pytest.mark.parametrize("mode", ["async", "process"])
def test_a_disk_that_is_full_costs_the_saves_until_there_is_room_again(
    small_disk: Path, mode: Mode
) -> None:
    """Scenario 8: no space for a save; training goes on, the steps that are there stay."""
    model, events = Layer(num_rows=20_000), list[SaveEvent]()
    config = replace(EVERY_STEP, mode=mode)
    manager = plain_manager(small_disk / "run", model, config, on_event=events.append)
    model.fill(1.0)
    manager.save(1)
    manager.wait()
    filler = fill(small_disk)
    assert manager.save(2).error() is not None
    assert saved_steps(small_disk / "run") == [1]
    assert list((small_disk / "run/.ray_ckpt/staging").iterdir()) == []
    filler.unlink()
    model.fill(3.0)
    manager.save(3)
    manager.close()
    assert [(event.kind, event.step) for event in events] == [
        ("committed", 1),
        ("failed", 2),
        ("committed", 3),
    ]
    assert re.search(r"step-2 needs \d+ bytes, 0 are free", events[1].reason)
    assert saved_steps(small_disk / "run") == [1, 3]


def _refused_on_rank_1(
    root: str, config: SaveConfig
) -> tuple[dict[int, RayCkptError | None], SaveStats, list[str]]:
    """What the saves of steps 1 to 6 raised; the disk of rank 1 is full during that of step 2."""
    told = record_log()
    model = Layer()
    manager = plain_manager(root, model, config)
    raised: dict[int, RayCkptError | None] = {}
    for step in range(1, 7):
        dist.all_reduce(torch.zeros(1))
        model.fill(step)
        if step == 2:
            manager.wait()
        if step == 2 and dist.get_rank() == 1:
            before("writing", Refuse(errno.ENOSPC))
        raised[step] = error_of(lambda step=step: manager.save(step))
    manager.close()
    return raised, manager.stats, told


def test_training_goes_on_when_the_storage_of_one_rank_refuses_a_save(tmp_path: Path) -> None:
    """Scenario 8: no space on one rank while it writes."""
    ranks = run(_refused_on_rank_1, str(tmp_path), EVERY_STEP)
    for raised, stats, told in ranks:
        assert set(raised.values()) == {None}
        assert (stats.num_committed, stats.num_failed) == (5, 1)
        (line,) = [line for line in told if line.startswith("ERROR")]
        assert "step-2 failed on rank 1: No space left on device" in line
    assert saved_steps(tmp_path) == [1, 3, 4, 5, 6]


def test_a_save_that_is_waited_for_raises_on_every_rank(tmp_path: Path) -> None:
    for raised, stats, _ in run(_refused_on_rank_1, str(tmp_path), EVERY_STEP_SYNC):
        assert {step for step, error in raised.items() if error is not None} == {2}
        assert isinstance(raised[2], StorageFullError)
        assert "rank 1" in raised[2].what
        assert (stats.num_committed, stats.num_failed) == (5, 1)
    assert saved_steps(tmp_path) == [1, 3, 4, 5, 6]


def test_a_failure_stops_training_on_every_rank_at_the_same_step_if_asked_to(
    tmp_path: Path,
) -> None:
    """Scenario 15: a save fails in the background, and the config says to stop."""
    config = SaveConfig(every_steps=2, when_busy="wait", on_failure="stop")
    ranks = run(_refused_on_rank_1, str(tmp_path), config)
    steps = [
        [step for step, error in raised.items() if isinstance(error, SaveError)]
        for raised, _, _ in ranks
    ]
    assert steps[0] == steps[1]
    assert 3 <= steps[0][0] <= 6
    for raised, _, _ in ranks:
        assert "rank 1: No space left on device" in raised[steps[0][0]].what
    assert 2 not in saved_steps(tmp_path)
