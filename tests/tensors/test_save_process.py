"""Saves by the children: the same bytes, the same errors; a death costs one save and no more."""

import copy
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    LeaseHeldError,
    SaveError,
    StateDictError,
    StepExistsError,
    StorageError,
)
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import Lease, LeaseGuard
from ray_ckpt.tensors.ranks import Phase, Ranks, causes, ours, sentence
from ray_ckpt.tensors.save_planner import ValueSavePlanner
from ray_ckpt.tensors.save_process import SaveProcess
from ray_ckpt.tensors.save_protocol import SaveProtocol
from ray_ckpt.tensors.staging import HostMemory, Stager
from ray_ckpt.tensors.writer import CommittingWriter, SaveJob
from tests.tensors.ranks import RankGroup, run, stopped, wait_until
from tests.tensors.test_staging import sharded_model

TIMEOUT_S = 30.0
BOTH = pytest.mark.parametrize("num_ranks", [1, 2])


class Trainer:
    """One rank: a state, the memory it is staged in, and the process that saves it."""

    def __init__(self, root: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.catalog = open_catalog(root)
        self.model, self.optimizer = _trained()
        self.lease = Lease(self.catalog.store, "trainer", owner="job")
        self.ranks = Ranks(timeout_s=timeout_s)
        self.ranks.on_coordinator(self.lease.acquire)
        self.stager = Stager(HostMemory.SHARED)
        self.process = SaveProcess(self.ranks, self.stager, timeout_s=timeout_s)

    def state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        own = {"torch": torch.get_rng_state(), "words": list(random.getstate()[1])}
        return {
            **self.model.state_dict(),
            "optimizer": optimizer,
            "rng": {f"rank_{self.ranks.rank}": own},
            "data": {"seen": [1, 2, {"epoch": torch.tensor(3)}], "order": range(3), "shards": {}},
        }

    def job(self, step: int, **changes: Any) -> SaveJob:
        draft = Manifest(
            step=step,
            save_id=f"save{step}",
            created_at="",
            lineage=Lineage(run_id="run", resumed_from=None),
            files=(),
            world_size=self.ranks.size,
            is_last_step=False,
            metrics={"loss": 0.5},
            versions={},
        )
        job = SaveJob(
            catalog=self.catalog,
            draft=draft,
            assets={"config.json": b"{}"},
            reserved=frozenset({"optimizer", "rng", "data"}),
            check_lease=self.lease.guard(),
        )
        return replace(job, **changes)

    def save(self, step: int, **changes: Any) -> Exception | None:
        """How the save ended: None for committed, else the error that was meant."""
        staged = self.stager.stage(self.state())
        try:
            self.process.save(self.job(step, **changes), staged)
        except CheckpointException as error:
            raised = causes(error)
            return ours(raised) or SaveError(sentence(raised))
        except Exception as error:  # noqa: BLE001  what the manager would hear of
            return error
        return None

    def save_here(self, step: int) -> None:
        """As `sync` mode does."""
        writer = CommittingWriter(self.job(step))
        SaveProtocol(self.ranks.group).save(self.state(), ValueSavePlanner(), writer)

    def close(self) -> None:
        self.process.close()
        self.ranks.on_coordinator(self.lease.release)
        self.ranks.close()


def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def _steps(root: Path | str) -> list[int]:
    """Committed ones, each with every digest right."""
    catalog = open_catalog(str(root))
    steps = [view.step for view in catalog.observe().readable()]
    for step in steps:
        catalog.verify(step)
    return steps


def _is_gone(pid: int) -> bool:
    """Also if nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- the same bytes ----


def _save_both_ways(root: str) -> None:
    trainer = Trainer(root)
    for step in (1, 3):
        trainer.save_here(step)
        assert trainer.save(step + 1) is None
        for parameter in trainer.model.parameters():
            parameter.data.mul_(-2.0)
    trainer.close()


@BOTH
def test_the_child_writes_what_a_sync_save_writes_byte_for_byte(root: str, num_ranks: int) -> None:
    run(_save_both_ways, root, num_ranks=num_ranks)
    assert _steps(root) == [1, 2, 3, 4]
    catalog = open_catalog(root)
    for step in (1, 3):
        here, there = catalog.manifest(step), catalog.manifest(step + 1)
        assert _without_names(here) == _without_names(there)
        assert there.tensors == here.tensors
        assert there.model == here.model
    assert catalog.manifest(2).content_id != catalog.manifest(4).content_id


def _without_names(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Files but for `.metadata`, which tells its step; see the next test for that one."""
    return [(f.path, f.size_bytes, f.digest) for f in manifest.files if f.path != names.METADATA]


def _save_the_same_step(root: str) -> None:
    for name in ("here", "there"):
        trainer = Trainer(f"{root}/{name}")
        torch.manual_seed(7)
        random.seed(7)
        if name == "here":
            trainer.save_here(5)
        else:
            assert trainer.save(5) is None
        trainer.close()


@BOTH
def test_the_content_id_is_that_of_a_sync_save(root: str, num_ranks: int) -> None:
    run(_save_the_same_step, root, num_ranks=num_ranks)
    ids = [open_catalog(f"{root}/{n}").manifest(5).content_id for n in ("here", "there")]
    assert ids[0] == ids[1]


def _save_then_load(root: str) -> None:
    trainer = Trainer(root)
    assert trainer.save(1) is None
    expected = copy.deepcopy({key: v.to_local() for key, v in trainer.model.state_dict().items()})
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    dcp.load(trainer.model.state_dict(), checkpoint_id=f"{root}/step-1")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value.to_local(), expected[key])
    trainer.close()


def test_what_the_child_saved_is_loaded(root: str) -> None:
    run(_save_then_load, root, num_ranks=2)


def _save_on_s3(root: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    trainer = Trainer(root)
    assert trainer.save(1) is None
    trainer.close()


@pytest.mark.s3
def test_the_child_saves_to_an_object_store(s3_root: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    run(_save_on_s3, s3_root, environment, num_ranks=2)
    assert _steps(s3_root) == [1]


SCRIPT = """
import sys, torch
from pathlib import Path
from ray_ckpt.tensors import ranks, save_process, staging
from tests.tensors.test_save_process import plain_job

class Position:
    pass

with Path(sys.argv[1], "runs").open("a") as file:
    file.write("x")
stager = staging.Stager(staging.HostMemory.SHARED)
process = save_process.SaveProcess(ranks.Ranks(timeout_s=30.0), stager, timeout_s=30.0)
process.save(plain_job(sys.argv[1]), stager.stage({"a": torch.ones(3), "at": Position()}))
process.close()
"""


def no_lease() -> None:
    """Nobody else writes."""


def plain_job(root: str) -> SaveJob:
    """Of step 1, without a lease."""
    return SaveJob(
        catalog=open_catalog(root),
        draft=Manifest(
            step=1,
            save_id="save1",
            created_at="",
            lineage=Lineage(run_id="run", resumed_from=None),
            files=(),
            world_size=1,
            is_last_step=False,
            metrics={},
            versions={},
        ),
        assets={},
        reserved=frozenset({"at"}),
        check_lease=no_lease,
    )


def test_a_script_without_a_main_guard_runs_once_and_may_have_classes_of_its_own(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, script, tmp_path], check=True, env=environment)
    assert (tmp_path / "runs").read_text() == "x"
    assert _steps(tmp_path) == [1]


# ---- the same errors ----


def _fail_in_every_way(root: str) -> list[Exception | None]:
    trainer = Trainer(root)
    errors = [trainer.save(1), trainer.save(1, draft=replace(trainer.job(1).draft, save_id="x"))]
    pid = trainer.process.pid
    if trainer.ranks.rank == trainer.ranks.size - 1:  # as a full disk, or a quota
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    errors.append(trainer.save(2))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    errors.append(trainer.save(2))
    assert trainer.process.pid == pid, "an error that all ranks hear of costs no child"
    if trainer.ranks.is_coordinator:
        taken = Lease(trainer.catalog.store, "trainer", owner="job")
        taken.acquire()
    errors.append(trainer.save(3))
    trainer.process.close()
    return errors


@BOTH
def test_an_error_in_one_child_is_the_same_error_on_every_rank(root: str, num_ranks: int) -> None:
    for errors in run(_fail_in_every_way, root, num_ranks=num_ranks):
        expected = [type(None), StepExistsError, StorageError, type(None), LeaseHeldError]
        assert [type(error) for error in errors] == expected
        assert "File too large" in str(errors[2])
    assert _steps(root) == [1, 2]
    assert list(Path(root, ".ray_ckpt/staging").iterdir()) == []


def _fail_before_the_children_are_asked(root: str) -> list[Exception | None]:
    trainer = Trainer(root)
    rank_1_fails = (lambda: None) if trainer.ranks.rank == 1 else trainer.lease.guard()
    errors = [trainer.save(1, check_lease=rank_1_fails), trainer.save(1)]
    trainer.close()
    return errors


def test_a_job_that_one_rank_cannot_hand_over_fails_on_all_and_hangs_none(root: str) -> None:
    for errors in run(_fail_before_the_children_are_asked, root, num_ranks=2):
        assert "lambda" in str(errors[0])
        assert errors[1] is None


def test_an_error_of_ours_outweighs_the_broken_collective_of_another_rank() -> None:
    from ray_ckpt.tensors.save_process import _meant

    ours = StateDictError("x")
    assert _meant([RuntimeError("connection closed by peer"), None, ours]) is ours


# ---- death ----


def _kill_own_child_on(phase: Phase, trainer: Trainer) -> Callable[[str, Phase], None]:
    """A listener that kills this rank's child as soon as it has come so far."""

    def note(save: str, reached: Phase) -> None:
        if reached is phase:
            os.kill(trainer.process.pid, signal.SIGKILL)

    return note


def _lose_children(root: str, phase: Phase) -> list[Exception | None]:
    trainer = Trainer(root)
    errors = [trainer.save(1)]
    pids = [trainer.process.pid]
    is_victim = trainer.ranks.rank == trainer.ranks.size - 1
    changes = {"note": _kill_own_child_on(phase, trainer)} if is_victim else {}
    errors.append(trainer.save(2, **changes))
    errors.append(trainer.save(3))
    pids.append(trainer.process.pid)
    if is_victim:  # between two saves
        os.kill(pids[1], signal.SIGKILL)
        os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)
    errors.append(trainer.save(4))
    pids.append(trainer.process.pid)
    assert len(set(pids)) == 3, "one broken group, one new group, on every rank"
    trainer.close()
    assert all(map(_is_gone, pids))
    return errors


@BOTH
def test_a_killed_child_fails_the_save_on_every_rank_and_the_next_one_works(
    root: str, num_ranks: int
) -> None:
    for errors in run(_lose_children, root, Phase.PLANNED, num_ranks=num_ranks):
        assert [type(e) for e in errors] == [type(None), SaveError, type(None), type(None)]
        assert f"rank {num_ranks - 1} ended by SIGKILL during the save of step-2" in str(errors[1])
    assert _steps(root) == [1, 3, 4]
    assert list(Path(root, ".ray_ckpt/staging").iterdir()) == []


def _lose_a_child_before_anybody_spoke_with_it(root: str) -> list[Exception | None]:
    trainer = Trainer(root)
    if trainer.ranks.rank == 1:
        os.kill(trainer.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, trainer.process.pid, os.WEXITED | os.WNOWAIT)
    errors = [trainer.save(1), trainer.save(2)]
    trainer.close()
    return errors


def test_a_child_that_dies_before_the_first_save_costs_none(root: str) -> None:
    assert run(_lose_a_child_before_anybody_spoke_with_it, root, num_ranks=2) == [[None] * 2] * 2


def _lose_a_child_while_they_meet(root: str) -> list[Exception | None]:
    trainer = Trainer(root, timeout_s=10.0)
    if trainer.ranks.rank == 1:
        trainer.process._child.greet = _killing(trainer)  # pyright: ignore[reportPrivateUsage]
    errors = [trainer.save(1), trainer.save(2)]
    trainer.close()
    return errors


def _killing(trainer: Trainer) -> Callable[[], None]:
    """Greets, and the child is dead when it is spoken to next."""
    greet = trainer.process._child.greet  # pyright: ignore[reportPrivateUsage]

    def greet_and_kill() -> None:
        greet()
        os.kill(trainer.process.pid, signal.SIGKILL)

    return greet_and_kill


def test_a_child_that_dies_while_they_meet_fails_the_save_on_all_and_the_next_works(
    root: str,
) -> None:
    for errors in run(_lose_a_child_while_they_meet, root, num_ranks=2):
        assert [type(error) for error in errors] == [SaveError, type(None)]
        assert "rank 1 ended by SIGKILL during its start" in str(errors[0])
    assert _steps(root) == [2]


def test_when_a_child_dies_at_the_commit_all_ranks_say_what_storage_says(root: str) -> None:
    outcomes = run(_lose_children, root, Phase.WRITTEN, num_ranks=2)
    is_committed = 2 in _steps(root)
    assert [errors[1] is None for errors in outcomes] == [is_committed] * 2
    assert set(_steps(root)) >= {1, 3, 4}


def _save_until_killed(root: str, pids: str) -> None:
    trainer = Trainer(root)
    (Path(pids) / str(trainer.ranks.rank)).write_text(str(trainer.process.pid))
    for step in range(1, 100_000):
        trainer.save(step)


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=str)
def test_a_child_ends_with_its_parent_and_leaves_nothing_half_visible(
    root: str, tmp_path: Path, victims: tuple[int, ...]
) -> None:
    with RankGroup(_save_until_killed, root, str(tmp_path), num_ranks=2) as group:
        wait_until(lambda: Path(root, "step-3").exists())
        group.kill(*victims)
        for rank in victims:
            child = int((tmp_path / str(rank)).read_text())
            wait_until(lambda child=child: _is_gone(child), 5.0)
    for rank in (0, 1):
        child = int((tmp_path / str(rank)).read_text())
        wait_until(lambda child=child: _is_gone(child), 5.0)
    steps = _steps(root)
    assert steps == list(range(1, len(steps) + 1))
    assert not [v for v in open_catalog(root).observe().checkpoints if v.problem]


def _die_with_a_child_that_stands_still(root: str, pids: str) -> None:
    trainer = Trainer(root)

    def note(save: str, phase: Phase) -> None:
        os.kill(trainer.process.pid, signal.SIGSTOP)
        (Path(pids) / "0").write_text(str(trainer.process.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.save(1, note=note)


def test_a_child_that_wakes_up_after_a_takeover_commits_nothing(root: str, tmp_path: Path) -> None:
    with RankGroup(_die_with_a_child_that_stands_still, root, str(tmp_path), num_ranks=1) as group:
        group.wait()
        child = int((tmp_path / "0").read_text())
        with stopped(child):
            successor = Lease(open_catalog(root).store, "trainer", owner="job")
            successor.acquire()
        wait_until(lambda: _is_gone(child), 5.0)
    successor.release()
    assert _steps(root) == []


def test_a_guard_is_a_value_that_knows_when_the_lease_is_lost(root: str) -> None:
    store = open_catalog(root).store
    first, second = (Lease(store, "trainer", owner="job") for _ in range(2))
    first.acquire()
    guard = copy.deepcopy(first.guard())
    assert isinstance(guard, LeaseGuard)
    guard()
    second.acquire()
    with pytest.raises(LeaseHeldError):
        guard()
    first.release()
    second.release()
