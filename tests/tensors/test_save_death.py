"""A rank is killed during a save: what was said committed stays, nothing half-made is seen."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from ray_ckpt.core.errors import RayCkptError, SaveError
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from tests.tensors.plain import (
    EVERY_STEP,
    Layer,
    before,
    loaded,
    plain_manager,
    save_steps,
    saved_steps,
    signal_self,
)
from tests.tensors.ranks import RankGroup, stopped, wait_until
from tests.tensors.tiny import error_of

SOON_S = 10.0
NUM_ROWS = 200_000


def _die_before(root: str, rank: int, moment: str, folder: str) -> None:
    """The save of step 2 is the last thing that the rank does; the other tells what it hears."""
    model = Layer()
    manager = plain_manager(root, model, EVERY_STEP)
    model.fill(1.0)
    manager.do_save(1, "test", last_step=False, metrics={}).wait()
    if dist.get_rank() == rank:
        before(moment, signal_self(signal.SIGKILL))
    model.fill(2.0)
    began_at = time.monotonic()
    pending = manager.do_save(2, "test", last_step=False, metrics={})
    error = error_of(pending.wait)
    seconds = time.monotonic() - began_at
    Path(folder, "error").write_text(f"{type(error).__name__}\n{seconds}\n{error}")
    os._exit(0)  # the process group has lost a rank


@pytest.mark.parametrize(
    ("rank", "moment", "said"),
    [
        (1, "staging", "rank 1 did not finish staging"),
        (0, "planning", "rank 0 did not finish planning"),
        (0, "writing", "rank 0 did not finish writing"),
        (1, "writing", "rank 1 did not finish writing"),
        (0, "written", "rank 0 did not finish writing"),
        (1, "written", "rank 1 did not finish writing"),
        (0, "finishing", "rank 0 did not answer, or had given up waiting, during the commit"),
        (0, "committing", "rank 0 did not answer, or had given up waiting, during the commit"),
    ],
)
def test_a_rank_that_dies_is_named_and_the_step_before_is_all_there_is(
    tmp_path: Path, rank: int, moment: str, said: str
) -> None:
    """Scenarios 1, 2 and 6: a rank dies while it stages, writes, or is waited for."""
    root = tmp_path / "run"
    with RankGroup(_die_before, str(root), rank, moment, str(tmp_path), num_ranks=2) as group:
        assert group.wait() == [rank != 0, rank != 1]
    kind, seconds, *text = (tmp_path / "error").read_text().splitlines()
    assert (kind, float(seconds) < SOON_S) == (SaveError.__name__, True)
    assert said in "\n".join(text)
    assert saved_steps(root) == [1]
    assert loaded(root) == (1, {1.0})
    assert list((root / ".ray_ckpt/staging").iterdir()) == [], "a new trainer cleans up"
    save_steps(root, 2)
    assert loaded(root) == (2, {2.0})


def _train_and_note_commits(root: str, journal: str, mode: Mode) -> None:
    """Saves after every step, until it is killed; the journal holds what was said committed."""

    def note(event: object) -> None:
        if event.kind == "committed":
            with Path(journal).open("a") as file:
                file.write(f"{event.step}\n")

    model = Layer(num_rows=NUM_ROWS)
    config = SaveConfig(every_steps=1, when_busy="wait", mode=mode)
    manager = plain_manager(root, model, config, on_event=note)
    report = manager.load()
    for step in range(report.step + 1, report.step + 1000):
        model.fill(step)
        manager.save(step)


@pytest.mark.parametrize("mode", ["async", "process"])
def test_a_rank_killed_at_any_moment_of_a_save_costs_no_step_that_was_said_committed(
    tmp_path: Path, mode: Mode
) -> None:
    """Scenarios 1, 2 and 6, with SIGKILL at moments that nobody has chosen."""
    root, journal = tmp_path / "run", tmp_path / "journal"
    journal.touch()
    chance = random.Random(0)
    catalog = open_catalog(str(root))
    for rank in (1, 0, 1, 0):
        said = len(journal.read_text().split())
        moment = chance.uniform(0.0, 0.99)  # of a whole save, measured in bytes staged
        arguments = (str(root), str(journal), mode)
        with RankGroup(_train_and_note_commits, *arguments, num_ranks=2) as group:
            wait_until(lambda said=said: len(journal.read_text().split()) > said)
            whole = catalog.observe().readable()[-1].manifest.total_bytes
            wait_until(lambda m=moment, w=whole: _staged_bytes(root) >= m * w)
            group.kill(rank)
            assert group.wait(20.0) == [False, False], "the other must not hang on a dead rank"
        committed = {int(line) for line in journal.read_text().split()}
        assert committed <= set(saved_steps(root))
        assert not [v for v in catalog.observe().checkpoints if v.problem]
    newest = saved_steps(root)[-1]
    model = Layer(num_rows=NUM_ROWS)
    manager = plain_manager(root, model)
    report = manager.load()
    manager.close()
    assert (report.step, report.skipped, model.values()) == (newest, (), {float(newest)})


def _staged_bytes(root: Path) -> int:
    """Of the save that is being written; files may vanish while they are counted."""
    size = 0
    for path in (root / ".ray_ckpt/staging").glob("save-*/*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            return 0
    return size


def _save_with_a_short_patience(root: str) -> RayCkptError | None:
    config = SaveConfig(every_steps=1, mode="sync", timeout_s=2.0)
    manager = plain_manager(root, Layer(num_rows=NUM_ROWS), config)
    return error_of(lambda: manager.save(1))


def test_a_rank_that_gives_up_leaves_the_files_to_the_one_that_commits(tmp_path: Path) -> None:
    """Rank 0 hangs between its last shard and the commit for longer than rank 1 waits."""
    with RankGroup(_save_with_a_short_patience, str(tmp_path), num_ranks=2) as group:
        wait_until(lambda: list(tmp_path.glob(".ray_ckpt/staging/save-*/.metadata*")))
        with stopped(group.pids[0]):
            wait_until(lambda: _has_ended(group.pids[1]))
            staged = list(tmp_path.glob(".ray_ckpt/staging/save-*/__1_0.distcp"))
            committed = (tmp_path / "step-1").exists()
        group.wait()
    assert staged or committed
    saved_steps(tmp_path)


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
