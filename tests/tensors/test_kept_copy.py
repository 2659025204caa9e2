"""A restart on the same host reads no shard from storage, and never takes a bad copy for good."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.host_memory import copies
from ray_ckpt.tensors.staging import Stager
from tests.tensors.plain import Layer, before, plain_manager, saved_steps, signal_self
from tests.tensors.ranks import RankGroup, run, wait_until
from tests.tensors.shard_reads import counted_shard_reads

ROWS = 96_000
"""1.5 MB in float32: what is read beside the tensors does not count."""
SMALL_BYTES = 100_000
MODES = pytest.mark.parametrize("mode", ["async", "process"])
_DIE = signal_self(signal.SIGKILL)


def _config(mode: Mode, **more: Any) -> SaveConfig:
    return SaveConfig(every_steps=1, when_busy="wait", mode=mode, keep_in_memory_s=60.0, **more)


class Frozen(Layer):
    """A layer beside weights that never change: 12 MB."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__(value, ROWS)
        self.base = nn.Parameter(torch.full((3_000_000,), 7.0), requires_grad=False)

    def values(self) -> set[float]:
        return {*super().values(), self.base.sum().item() / 3_000_000}


def _train(root: str, steps: int, config: SaveConfig, frozen: bool = False) -> None:
    """Steps are saved, each full of its own number; then this process is killed."""
    model = Frozen() if frozen else Layer(num_rows=ROWS)
    manager = plain_manager(root, model, config)
    for step in range(1, steps + 1):
        model.fill(step)
        pending = manager.save(step)
        assert pending is not None
        pending.wait()
    manager._ranks.gather(None)
    _DIE()


def _dies_while_it_saves(root: str, moment: str, config: SaveConfig) -> None:
    model = Layer(value=1.0, num_rows=ROWS)
    manager = plain_manager(root, model, config)
    pending = manager.save(1)
    assert pending is not None
    pending.wait()
    before(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    model.fill(2.0)
    manager.save(2)
    signal.pause()


def _dies_with_other_values_in_memory(root: str, config: SaveConfig) -> None:
    find: Callable[..., Any] = Stager.find
    model = Layer(value=1.0, num_rows=ROWS)
    manager = plain_manager(root, model, config)
    touched: list[torch.Tensor] = []

    def noted(self: Stager, tensor: torch.Tensor) -> Any:
        touched.append(tensor)
        return find(self, tensor)

    Stager.find = noted  # type: ignore[method-assign]
    pending = manager.save(1)
    assert pending is not None
    pending.wait()
    max(touched, key=lambda tensor: tensor.nbytes).view(-1)[5] = 9.0
    _DIE()


def _load(root: str, frozen: bool = False) -> tuple[int, set[float], int, int]:
    """Step, numbers found, bytes of shards from storage, bytes from memory."""
    taken = counted_shard_reads()
    model = Frozen(value=-1.0) if frozen else Layer(value=-1.0, num_rows=ROWS)
    manager = plain_manager(root, model)
    report = manager.load(config=LoadConfig(on_damage="raise"))
    found = report.step, model.values(), sum(taken), report.memory_bytes
    manager.close()
    return found


def _killed(function: Callable[..., None], *args: Any, num_ranks: int = 1) -> None:
    with RankGroup(function, *args, num_ranks=num_ranks) as group:
        group.wait()
        assert group.exit_codes == [-signal.SIGKILL] * num_ranks


@MODES
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_restart_reads_no_shard(root: str, mode: Mode, saved_by: int, loaded_by: int) -> None:
    _killed(_train, root, 2, _config(mode), num_ranks=saved_by)
    for step, values, from_storage, from_memory in run(_load, root, num_ranks=loaded_by):
        assert (step, values) == (2, {2.0})
        assert from_storage < SMALL_BYTES
        assert from_memory > 4 * 4 * ROWS


@MODES
def test_what_stands_still_is_there_too(root: str, mode: Mode) -> None:
    _killed(_train, root, 4, _config(mode, full_every_saves=10), True)
    [(step, values, from_storage, from_memory)] = run(_load, root, True, num_ranks=1)
    assert (step, values) == (4, {4.0, 7.0})
    assert from_storage < SMALL_BYTES
    assert from_memory > 12_000_000


@pytest.mark.parametrize("moment", ["staging", "writing", "committing"])
def test_a_copy_of_what_was_never_committed_is_not_taken(root: str, moment: str) -> None:
    _killed(_dies_while_it_saves, root, moment, _config("async"))
    [(step, values, from_storage, from_memory)] = run(_load, root, num_ranks=1)
    assert (step, values, from_memory) == (1, {1.0}, 0)
    assert from_storage > 4 * 4 * ROWS


def test_a_copy_that_was_changed_is_told_and_storage_is_read(root: str) -> None:
    """The step itself is whole: it stays where it is."""
    _killed(_dies_with_other_values_in_memory, root, _config("async"))
    [(step, values, from_storage, from_memory)] = run(_load, root, num_ranks=1)
    assert (step, values, from_memory) == (1, {1.0}, 0)
    assert from_storage > 4 * 4 * ROWS
    assert saved_steps(root) == [1]


def _shards(root: str, step: int) -> list[copies.HeldFile]:
    files = open_catalog(root).manifest(step).files
    return [file for entry in files if (file := copies.held(entry)) is not None]


def _wait_for_the_copy(root: str, step: int) -> None:
    """The keeper, which is told of it once the step is committed, has heard."""
    wait_until(lambda: [file.close() for file in _shards(root, step)])


@MODES
def test_a_trainer_that_ends_well_leaves_nothing(root: str, mode: Mode) -> None:
    model = Layer(value=1.0)
    manager = plain_manager(root, model, _config(mode))
    manager.save(1)
    manager.wait()
    _wait_for_the_copy(root, 1)
    manager.close()
    wait_until(lambda: not _shards(root, 1))


def test_the_copy_of_a_dead_trainer_goes_when_the_next_one_saves(root: str) -> None:
    _killed(_train, root, 1, _config("async"))
    model = Layer(num_rows=ROWS)
    manager = plain_manager(root, model, SaveConfig(every_steps=1, mode="sync"))
    assert manager.load().memory_bytes > 4 * 4 * ROWS
    manager.close()
    again = plain_manager(root, model, SaveConfig(every_steps=1, mode="sync"))
    assert again.load().memory_bytes > 4 * 4 * ROWS
    again.save(2)
    again.close()
    wait_until(lambda: not _shards(root, 1))


def test_a_save_whose_keeper_was_killed_is_a_save(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Layer(value=1.0)
    manager = plain_manager(root, model, _config("async"))
    kept = manager._saver._kept_copy
    assert kept is not None
    kept._keeper._socket.close()
    with caplog.at_level(logging.WARNING):
        manager.save(1)
        manager.wait()
    assert "step-1 is safe, but this host's memory does not keep a copy of it" in caplog.text
    assert not _shards(root, 1)
    manager.save(2)
    manager.wait()
    _wait_for_the_copy(root, 2)
    manager.close()
    assert saved_steps(root) == [1, 2]


def test_a_save_that_makes_no_copy_keeps_none() -> None:
    with pytest.raises(ConfigError, match="choose 'async' or 'process'"):
        SaveConfig(mode="sync", keep_in_memory_s=60.0)


def test_the_seconds_are_more_than_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_in_memory_s must be more than 0 seconds"):
        SaveConfig(keep_in_memory_s=0.0)
