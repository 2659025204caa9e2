"""What makes a training save beside its steps: all ranks do it, at the same step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.manager import CheckpointManager
from tests.tensors.plain import NEVER, Layer, plain_manager, saved_steps, signal_self
from tests.tensors.ranks import run

NUM_STEPS = 8
SIGTERM = replace(NEVER, sigterm_notice_s=30.0)

# ---- among ranks: one of them learns of something at step 3 ----


def _ask_in_a_thread(manager: CheckpointManager) -> None:
    thread = threading.Thread(target=manager.request_save)
    thread.start()
    thread.join()


def _put_the_clock_forward(manager: CheckpointManager) -> None:
    """By this rank's clock an hour has passed since the last save."""
    manager._saved_at -= 3600.0


NEWS: dict[str, tuple[int, SaveConfig, Callable[[CheckpointManager], None]]] = {
    "a request of rank 0": (0, NEVER, lambda manager: manager.request_save()),
    "a request of rank 1": (1, NEVER, lambda manager: manager.request_save()),
    "a request in a thread": (1, NEVER, _ask_in_a_thread),
    "a stop of rank 1": (1, NEVER, lambda manager: manager.request_stop()),
    "SIGTERM to rank 0": (0, SIGTERM, lambda _: signal_self(signal.SIGTERM)()),
    "SIGTERM to rank 1": (1, SIGTERM, lambda _: signal_self(signal.SIGTERM)()),
    "the time": (0, replace(NEVER, every_s=1800.0), _put_the_clock_forward),
    "the time of rank 1 alone": (1, replace(NEVER, every_s=1800.0), _put_the_clock_forward),
}


def _learn_all(root: str) -> dict[str, tuple[list[int], list[int]]]:
    """For each piece of news, which is a run of its own, what `_learn` returns."""
    return {name: _learn(f"{root}/{name}", *news) for name, news in NEWS.items()}


def _learn(
    root: str, who: int, config: SaveConfig, learn: Callable[[CheckpointManager], None]
) -> tuple[list[int], list[int]]:
    """Steps whose save began, and steps after which training was to stop."""
    manager = plain_manager(root, Layer(), config)
    begun: list[int] = []
    stops: list[int] = []
    for step in range(1, NUM_STEPS + 1):
        dist.all_reduce(torch.zeros(1))
        if step == 3 and dist.get_rank() == who:
            learn(manager)
        if manager.save(step) is not None:
            begun.append(step)
        if manager.stop_reason:
            stops.append(step)
    manager.close()
    return begun, stops


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of all runs, and what each rank did in each of them."""
    folder = tmp_path_factory.mktemp("news")
    return folder, run(_learn_all, str(folder))


@pytest.mark.parametrize("name", NEWS)
def test_what_one_rank_learns_makes_all_of_them_save_one_step_later(
    learned: tuple[Path, list[Any]], name: str
) -> None:
    folder, ranks = learned
    expected = [] if name == "the time of rank 1 alone" else [4]
    assert [rank[name][0] for rank in ranks] == [expected, expected]
    is_stop = "stop" in name or "SIGTERM" in name
    stops = list(range(4, NUM_STEPS + 1)) if is_stop else []
    assert [rank[name][1] for rank in ranks] == [stops, stops]
    assert saved_steps(folder / name) == expected


# ---- SIGTERM, in one process ----


@pytest.fixture
def handler() -> Iterator[Callable[..., None]]:
    """What this process does about SIGTERM when no manager watches."""

    def ours(*_: object) -> None:
        raise AssertionError("nobody is to call it")

    before = signal.signal(signal.SIGTERM, ours)
    yield ours
    signal.signal(signal.SIGTERM, before)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_once_and_sets_the_reason_to_stop(
    root: str, handler: Callable[..., None]
) -> None:
    """Scenario 17: SIGTERM with a notice that is long enough."""
    manager = plain_manager(root, Layer(), SIGTERM)
    assert manager.save(1) is None
    _terminate()
    pending = manager.save(2)
    assert pending is not None
    assert pending.done(), "the loop breaks next, and the process ends"
    assert manager.stop_reason == "asked to stop"
    _terminate()
    assert [manager.save(step) for step in (3, 4)] == [None, None]
    assert signal.getsignal(signal.SIGTERM) is not handler
    manager.close()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert saved_steps(root) == [2]


def test_a_manager_that_is_told_no_notice_leaves_sigterm_alone(
    root: str, handler: Callable[..., None]
) -> None:
    manager = plain_manager(root, Layer(), NEVER)
    assert signal.getsignal(signal.SIGTERM) is handler
    manager.close()


@pytest.mark.parametrize(("elapsed_s", "fits"), [(17.0, True), (19.0, False)])
@pytest.mark.usefixtures("handler")
def test_a_save_that_would_not_end_before_the_kill_is_not_begun(
    root: str, monkeypatch: pytest.MonkeyPatch, elapsed_s: float, fits: bool
) -> None:
    """Scenario 17: a save takes 10 s, times 1.2 for caution; the notice is 30 s."""
    events: list[SaveEvent] = []
    now = [1000.0]
    monkeypatch.setattr("ray_ckpt.tensors.triggers.time", SimpleNamespace(monotonic=lambda: now[0]))
    manager = plain_manager(root, Layer(), SIGTERM, on_event=events.append)
    manager.save(1)
    manager.stats.last_save_s = 10.0
    _terminate()
    now[0] += elapsed_s
    assert (manager.save(2) is not None) == fits
    assert manager.stop_reason is not None
    manager.close()
    assert saved_steps(root) == ([2] if fits else [])
    (event,) = events
    if not fits:
        assert (event.kind, event.step) == ("skipped", 2)
        assert (
            event.reason == "a save takes 10.0 s, and 19.0 of the 30.0 s before the kill are over"
        )


@pytest.mark.usefixtures("handler")
def test_the_step_that_is_the_last_one_anyway_is_saved_as_such(root: str) -> None:
    manager = plain_manager(root, Layer(), SIGTERM)
    _terminate()
    manager.save(1, last_step=True)
    manager.close()
    assert open_catalog(root).manifest(1).is_last_step


# ---- who is listened to ----


def test_a_run_that_does_not_listen_refuses_requests(root: str) -> None:
    manager = plain_manager(root, Layer(), replace(NEVER, listen=False))
    for request in (manager.request_save, manager.request_stop):
        with pytest.raises(UsageError, match="listen"):
            request()
    manager.close()


def test_a_run_that_watches_for_signals_alone_can_still_be_stopped(root: str) -> None:
    manager = plain_manager(root, Layer(), replace(SIGTERM, listen=False))
    with pytest.raises(UsageError, match="listen"):
        manager.request_save()
    manager.request_stop()
    assert manager.save(1) is not None
    assert manager.stop_reason is not None
    manager.close()


def test_the_first_and_the_last_step_are_saved_beside_the_interval(root: str) -> None:
    config = SaveConfig(every_steps=4, first_step=True, when_busy="wait")
    manager = plain_manager(root, Layer(), config)
    begun = [s for s in range(1, 11) if manager.save(s, last_step=s == 10) is not None]
    manager.close()
    assert begun == saved_steps(root) == [1, 4, 8, 10]
