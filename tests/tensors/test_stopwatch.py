"""How long a save took and kept training waiting, by a clock that only the test moves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.tensors.staging import Stager
from ray_ckpt.tensors.stopwatch import Stopwatch
from ray_ckpt.tensors.writer import CommittingWriter
from tests.tensors.plain import Layer, plain_manager


class Clock:
    """Seconds since it was made, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._monkeypatch = monkeypatch
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("ray_ckpt.tensors.stopwatch.time", clock)

    def takes(self, owner: type, name: str, seconds: float) -> None:
        """The method takes that long from now on."""
        original = getattr(owner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return original(*arguments, **named)

        self._monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(monkeypatch)
    made.takes(Stager, "stage", 1.0)
    made.takes(CommittingWriter, "write_data", 10.0)
    made.takes(CommittingWriter, "finish", 100.0)
    return made


@pytest.mark.parametrize(
    ("mode", "stage_s", "blocked_s"), [("async", 1.0, 1.0), ("sync", 0.0, 110.0)]
)
def test_training_waits_for_the_copy_alone_unless_the_mode_is_sync(
    tmp_path: Path, clock: Clock, mode: Mode, stage_s: float, blocked_s: float
) -> None:
    events: list[SaveEvent] = []
    config = SaveConfig(every_steps=1, mode=mode)
    manager = plain_manager(tmp_path, Layer(), config, on_event=events.append)
    manager.save(1)
    manager.close()
    assert events[0].phases == {"wait": 0.0, "stage": stage_s, "write": 10.0, "commit": 100.0}
    assert events[0].blocked_s == blocked_s
    assert manager.stats.blocked_s == blocked_s


def test_a_save_process_tells_when_it_has_written(tmp_path: Path) -> None:
    events: list[SaveEvent] = []
    config = SaveConfig(every_steps=1, mode="process")
    manager = plain_manager(tmp_path, Layer(), config, on_event=events.append)
    manager.save(1)
    manager.close()
    assert set(events[0].phases) == {"wait", "stage", "write", "commit"}
    assert events[0].blocked_s == events[0].phases["wait"] + events[0].phases["stage"]


def test_what_fails_before_it_has_written_has_no_commit(clock: Clock) -> None:
    stopwatch = Stopwatch()
    clock.now = 3.0
    stopwatch.end_of("wait")
    clock.now = 5.0
    stopwatch.end()
    assert stopwatch.seconds == {"wait": 3.0, "write": 2.0}
    assert stopwatch.blocked_s(until_end=False) == 3.0
