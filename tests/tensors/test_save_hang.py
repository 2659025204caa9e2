"""A rank hangs during a save: it is named, training goes on, and the next save succeeds."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ray_ckpt.core.events import SaveStats
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.tensors import ranks
from ray_ckpt.tensors.manager import CheckpointManager
from tests.tensors.plain import (
    Layer,
    before,
    loaded,
    plain_manager,
    saved_steps,
    signal_self,
)
from tests.tensors.ranks import TIMEOUT_S, RankGroup, wait_until
from tests.tensors.tiny import error_of

PATIENCE_S = 6.0


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one rank knows when training has ended."""

    error: str
    stats: SaveStats


def _hang_before(root: str, rank: int, moment: str, mode: Mode, folder: str) -> Heard:
    """Step 4 of 6 is saved while the rank hangs; ranks meet in every step, as in any training."""
    model = Layer()
    timeout_s = PATIENCE_S if mode != "process" else 3 * PATIENCE_S  # two interpreters are to start
    config = SaveConfig(every_steps=2, timeout_s=timeout_s, when_busy="wait", mode=mode)
    manager = plain_manager(root, model, config)
    error = ""
    for step in range(1, 7):
        dist.all_reduce(torch.zeros(1))
        model.fill(step)
        if step == 4 and dist.get_rank() == rank:
            before(moment, signal_self(signal.SIGSTOP))
        outcome = error_of(lambda step=step: _save_and_wait(manager, step))
        if step == 4:
            error = str(outcome)
            Path(folder, f"error-{dist.get_rank()}").write_text(error)
    manager.close()
    return Heard(error=error, stats=manager.stats)


def _save_and_wait(manager: CheckpointManager, step: int) -> None:
    pending = manager.save(step)
    if pending is not None:
        pending.wait()


@pytest.mark.parametrize(
    ("rank", "moment", "mode", "said"),
    [
        (1, "planning", "async", "rank 1 did not finish planning"),
        (1, "writing", "async", "rank 1 did not finish writing"),
        (1, "writing", "sync", "rank 1 did not finish writing"),
        (0, "writing", "async", "rank 0 did not finish writing"),
        pytest.param(
            *(1, "staging", "process", "rank 1 did not finish staging"), marks=pytest.mark.slow
        ),
        (
            0,
            "committing",
            "async",
            "rank 0 did not answer, or had given up waiting, during the commit",
        ),
    ],
)
def test_a_rank_that_hangs_is_named_and_costs_one_save(
    tmp_path: Path, rank: int, moment: str, mode: Mode, said: str
) -> None:
    """Scenario 7: one rank is stopped, or its file system hangs."""
    root = tmp_path / "run"
    arguments = (str(root), rank, moment, mode, str(tmp_path))
    other = tmp_path / f"error-{1 - rank}"
    with RankGroup(_hang_before, *arguments, num_ranks=2) as group:
        wait_until(lambda: other.exists() and other.read_text())
        assert saved_steps(root) == [2], "nothing half-made is seen while the rank hangs"
        os.kill(group.pids[rank], signal.SIGCONT)
        outcomes = group.results()
    assert said in outcomes[1 - rank].error
    steps = saved_steps(root)
    # rank 0, which nobody waits for any more, may find that it can commit after all
    assert steps == [2, 6] or (steps == [2, 4, 6] and rank == 0)
    assert loaded(root) == (6, {6.0})
    assert outcomes[0].stats.num_committed == len(steps)
    assert outcomes[0].stats.num_failed == 3 - len(steps)
    assert (outcomes[0].error == "None") == (4 in steps), "rank 0 says what storage shows"
    assert list((root / ".ray_ckpt/staging").glob("*/*")) == []


def _hang_with_the_store(root: str, port: int, folder: str) -> Heard:
    """Rank 0 hangs, and with it the store that could tell who is missing."""
    ranks._ANSWER_S = 0.5
    rank = dist.get_rank()
    dist.destroy_process_group()
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=TIMEOUT_S), world_size=2, rank=rank)
    return _hang_before(root, 0, "writing", "async", folder)


def test_a_store_that_hangs_with_its_rank_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (str(root), port, str(tmp_path))
    other = tmp_path / "error-1"
    with RankGroup(_hang_with_the_store, *arguments, num_ranks=2) as group:
        wait_until(lambda: other.exists() and other.read_text())
        os.kill(group.pids[0], signal.SIGCONT)
        _, told = group.results()
    assert (
        "the process that holds the rendezvous store, mostly rank 0, does not answer" in told.error
    )
    assert loaded(root) == (6, {6.0})


def _train_past_a_stall(root: str, folder: str) -> int:
    """Rank 1 stalls between two saves for longer than a save may take."""
    config = SaveConfig(every_steps=2, timeout_s=PATIENCE_S, when_busy="wait")
    manager = plain_manager(root, Layer(), config)
    for step in range(1, 7):
        dist.all_reduce(torch.zeros(1))
        if step == 3 and dist.get_rank() == 1:
            Path(folder, "stalls").touch()
            signal_self(signal.SIGSTOP)()
        _save_and_wait(manager, step)
    manager.close()
    return manager.stats.num_committed


def test_a_stall_in_training_that_is_longer_than_a_save_may_take_costs_nothing(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    with RankGroup(_train_past_a_stall, str(root), str(tmp_path), num_ranks=2) as group:
        wait_until((tmp_path / "stalls").exists)
        over = time.monotonic() + 1.5 * PATIENCE_S
        wait_until(lambda: time.monotonic() > over)
        os.kill(group.pids[1], signal.SIGCONT)
        assert group.results() == [3, 3]
    assert saved_steps(root) == [2, 4, 6]
