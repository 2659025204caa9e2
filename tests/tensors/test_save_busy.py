"""A save that is due while the one before is still being written."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ckpt.core.events import SaveEvent, SaveStats
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.writer import CommittingWriter
from tests.tensors.plain import Layer, before, plain_manager, saved_steps
from tests.tensors.ranks import run
from tests.tensors.tiny import record_log

SKIP = SaveConfig(every_steps=1, when_busy="skip")


def _train(root: str, config: SaveConfig) -> tuple[list[int], SaveStats, list[SaveEvent]]:
    """Five steps, during the first four of which the storage of rank 1 hangs."""
    events: list[SaveEvent] = []
    model = Layer()
    manager = plain_manager(root, model, config, on_event=events.append)
    goes_on, num_writers, most_writers = threading.Event(), [0], [0]
    begun: list[int] = []

    def write() -> None:
        num_writers[0] += 1
        most_writers[0] = max(most_writers[0], num_writers[0])
        if dist.get_rank() == 1:
            assert goes_on.wait(60.0)
        num_writers[0] -= 1

    before("writing", write, times=1_000_000)
    for step in range(1, 6):
        dist.all_reduce(torch.zeros(1))
        model.fill(step)
        if step == 5:
            goes_on.set()
        if manager.save(step, last_step=step == 5) is not None:
            begun.append(step)
        if config.when_busy == "wait":
            goes_on.set()
    manager.close()
    assert most_writers[0] == 1, "two saves are never written at once"
    return begun, manager.stats, events


def test_a_save_that_meets_another_is_skipped_on_all_ranks_and_the_last_one_is_saved(
    tmp_path: Path,
) -> None:
    """Scenario 16: a save takes longer than the interval."""
    ranks = run(_train, str(tmp_path), SKIP)
    for begun, stats, _ in ranks:
        assert begun == [1, 5]
        assert (stats.num_committed, stats.num_skipped, stats.num_failed) == (2, 3, 0)
    events = ranks[0][2]
    assert [(event.kind, event.step) for event in events] == [
        ("skipped", 2),
        ("skipped", 3),
        ("skipped", 4),
        ("committed", 1),
        ("committed", 5),
    ]
    assert events[0].reason == "every 1 steps; step-1 is still being written"
    assert ranks[1][2] == []
    assert saved_steps(tmp_path) == [1, 5]


def test_a_save_that_may_wait_is_never_skipped(tmp_path: Path) -> None:
    for begun, stats, _ in run(_train, str(tmp_path), replace(SKIP, when_busy="wait")):
        assert begun == [1, 2, 3, 4, 5]
        assert (stats.num_committed, stats.num_skipped) == (5, 0)
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 5]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves hang until it is set."""
    goes_on = threading.Event()
    finish = CommittingWriter.finish

    def waits(self: CommittingWriter, *args: Any) -> None:
        assert goes_on.wait(60.0)
        finish(self, *args)

    monkeypatch.setattr(CommittingWriter, "finish", waits)
    return goes_on


def test_what_somebody_asked_for_is_put_off_and_not_skipped(
    tmp_path: Path, hanging: threading.Event
) -> None:
    told = record_log()
    manager = plain_manager(tmp_path, Layer(), SaveConfig(every_steps=100, when_busy="skip"))
    manager.request_save()
    assert manager.save(1) is not None
    manager.request_save()
    assert [manager.save(step) for step in (2, 3, 4)] == [None, None, None]
    assert manager.stats.num_skipped == 0
    hanging.set()
    manager.wait()
    assert manager.save(5) is not None
    assert manager.save(6) is None
    manager.close()
    assert saved_steps(tmp_path) == [1, 5]
    assert not [line for line in told if line.startswith("WARNING")]


def test_a_save_by_the_clock_that_meets_another_is_skipped_once_an_interval(
    tmp_path: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr("ray_ckpt.tensors.manager.time", clock)
    config = SaveConfig(every_steps=None, every_s=10.0, when_busy="skip")
    manager = plain_manager(tmp_path, Layer(), config)
    for step, now[0] in enumerate((10.0, 15.0, 20.0, 21.0, 22.0, 29.0, 30.0), start=1):
        manager.save(step)
    assert (manager.stats.num_committed, manager.stats.num_skipped) == (0, 2)
    hanging.set()
    manager.wait()
    now[0] = 40.0
    assert manager.save(8) is not None
    manager.close()
    assert saved_steps(tmp_path) == [1, 8]
