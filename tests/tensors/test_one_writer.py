"""One trainer writes to a root, and nobody writes where something is."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ckpt.core.errors import (
    ForeignFolderError,
    LeaseHeldError,
    RayCkptError,
    StepExistsError,
)
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.loading import LoadReport
from tests.tensors.plain import (
    EVERY_STEP,
    EVERY_STEP_SYNC,
    NEVER,
    Layer,
    plain_manager,
    save_steps,
    saved_steps,
)
from tests.tensors.ranks import RankGroup, run, wait_until
from tests.tensors.tiny import error_of, files_in, record_log

# ---- what may not be overwritten ----


def _save_where_something_is(root: str) -> tuple[LoadReport, list[RayCkptError | None]]:
    manager = plain_manager(root, Layer(), EVERY_STEP_SYNC)
    report = manager.load()
    errors = [error_of(lambda step=step: manager.save(step)) for step in (12, 15)]
    manager.close()
    manager = plain_manager(root, Layer(), EVERY_STEP)
    manager.save(12)
    errors.append(error_of(manager.wait))
    manager.close()
    return report, errors


def test_neither_a_committed_step_nor_a_foreign_folder_is_ever_written(tmp_path: Path) -> None:
    save_steps(tmp_path, 9, 12)
    foreign = tmp_path / "step-15"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    before = files_in(tmp_path)
    for report, errors in run(_save_where_something_is, str(tmp_path)):
        assert (report.step, [step for step, _ in report.skipped]) == (12, [15])
        assert [type(e) for e in errors] == [StepExistsError, ForeignFolderError, StepExistsError]
    assert files_in(tmp_path) == before
    assert list((tmp_path / ".ray_ckpt/staging").iterdir()) == []


def test_a_background_failure_is_logged_and_training_goes_on(tmp_path: Path) -> None:
    """Scenario 15: a save fails in the background."""
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1/notes.txt").write_text("mine")
    told = record_log()
    manager = plain_manager(tmp_path, Layer(), EVERY_STEP)
    for step in (1, 2, 3):
        manager.save(step)
    manager.close()
    assert any(line.startswith("ERROR") and "step-1" in line for line in told)
    assert (manager.stats.num_failed, saved_steps(tmp_path)) == (1, [2, 3])


# ---- one writer ----


def _hold_the_root(root: str) -> None:
    plain_manager(root, Layer(), NEVER)
    threading.Event().wait()


def test_a_second_trainer_is_refused_while_the_first_lives_and_welcome_once_it_is_dead(
    tmp_path: Path,
) -> None:
    """Scenario 14: two trainers on one root."""
    with RankGroup(_hold_the_root, str(tmp_path), num_ranks=1) as group:
        wait_until(lambda: list(tmp_path.glob(".ray_ckpt/lease/trainer-*.json")))
        with pytest.raises(LeaseHeldError, match=str(group.pids[0])):
            plain_manager(tmp_path, Layer())
        os.kill(group.pids[0], signal.SIGKILL)
        group.wait()
        plain_manager(tmp_path, Layer()).close()


def test_a_trainer_that_was_taken_over_commits_nothing_more(tmp_path: Path) -> None:
    old = plain_manager(tmp_path, Layer(), EVERY_STEP_SYNC, owner="job")
    new = plain_manager(tmp_path, Layer(), EVERY_STEP_SYNC, owner="job")
    with pytest.raises(LeaseHeldError):
        old.save(1)
    assert open_catalog(str(tmp_path)).observe().checkpoints == ()
    new.save(1)
    old.close()
    new.save(2)
    new.close()
    assert saved_steps(tmp_path) == [1, 2]


def test_a_manager_lets_go_of_everything_even_after_a_save_that_failed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    handler = signal.getsignal(signal.SIGTERM)
    config = replace(EVERY_STEP, sigterm_notice_s=30.0)
    manager = plain_manager(tmp_path, Layer(), config, owner="one")
    manager.save(1)
    with pytest.raises(StepExistsError):
        manager.close()
    assert signal.getsignal(signal.SIGTERM) is handler
    plain_manager(tmp_path, Layer(), owner="another").close()
