"""A purge that a person asks for is carried out by whoever manages the root, and by nobody else."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.purge import PurgePlan, apply_purge
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Command
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.core.wanted import purge_action
from ray_ckpt.storage import lease
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.history import EventReader
from ray_ckpt.storage.lease import MANAGER, holder_of
from ray_ckpt.storage.records import who_asks
from tests.roots import flip_byte, make_root
from tests.waiting import wait_for

KEEP_TWO = KeepConfig(latest=2)
TRASHED, VERIFIED = CheckpointState.TRASHED, CheckpointState.VERIFIED

MANAGE = """
import os, signal, sys, time
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.storage.backends import open_catalog

class Mortal(Threads):
    def start(self, root, attempt, placement):
        if attempt.action.kind == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().start(root, attempt, placement)

manager = Reconciler(open_catalog(sys.argv[1]), Mortal(), owner="manager of another process")
while True:
    manager.round(time.time())
    time.sleep(0.1)
"""


@contextmanager
def managed(root: str, *, dies_at: str = "nothing") -> Iterator["subprocess.Popen[bytes]"]:
    """A manager in a process of its own; it kills itself when it is to start such an action."""
    process = subprocess.Popen([sys.executable, "-c", MANAGE, root, dies_at])
    try:
        wait_for(lambda: holder_of(open_catalog(root).store, MANAGER))
        yield process
    finally:
        process.kill()
        process.wait()


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


def purged(plan: PurgePlan) -> list[int]:
    return plan.doomed


def of_kind(catalog: Catalog, kind: ActionKind) -> list[ActionRecord]:
    return [r for r in catalog.records.actions().values() if r.action.kind is kind]


def ask_to_purge(catalog: Catalog, *steps: int) -> list[Action]:
    """What `ray-ckpt purge --apply` writes down, once all is verified and it has decided."""
    drain(catalog, Threads())
    actions = [purge_action(catalog.checkpoint(step), grace_s=3600.0) for step in steps]
    for action in actions:
        command = Command(verb="purge", action=action, by="ann@host")
        catalog.records.add_command(command)
    return actions


def epochs(root: str) -> list[str]:
    return sorted(path.name for path in Path(root, ".ray_ckpt/lease").glob("manager-*"))


def test_a_live_manager_in_another_process_does_it_and_this_one_only_waits(root: str) -> None:
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    told: list[str] = []
    with managed(root):
        assert purged(apply_purge(catalog, KEEP_TWO, told=told.append)) == [10, 20]
        assert epochs(root) == ["manager-1.json"], "nobody else ever managed"
    assert states(catalog) == {10: TRASHED, 20: TRASHED, 30: VERIFIED, 40: VERIFIED}
    assert "waiting: another manager writes to this root" in told[0]
    purges = of_kind(catalog, ActionKind.PURGE)
    assert {(r.attempts, r.asked_by) for r in purges} == {(1, who_asks())}
    assert catalog.records.commands() == ()


def test_when_the_manager_is_killed_in_the_middle_whoever_asked_goes_on_in_its_place(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 49: a purge is interrupted by a kill, and ends all the same."""
    monkeypatch.setattr(lease, "PATIENCE_S", 3.0)
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    with managed(root, dies_at="purge") as manager:
        assert purged(apply_purge(catalog, KEEP_TWO)) == [10, 20]
        assert manager.wait() == -signal.SIGKILL
    assert states(catalog) == {10: TRASHED, 20: TRASHED, 30: VERIFIED, 40: VERIFIED}
    assert epochs(root) == ["manager-2.json"], "this process took over"
    assert sorted(r.attempts for r in of_kind(catalog, ActionKind.PURGE)) == [1, 2]


def test_what_was_asked_for_is_done_although_whoever_asked_is_gone(root: str) -> None:
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    ask_to_purge(catalog, 20)
    drain(catalog, Threads())
    assert states(catalog) == {10: VERIFIED, 20: TRASHED, 30: VERIFIED, 40: VERIFIED}
    told = [e.text for e in EventReader(catalog.store).read() if e.text.startswith("purge")]
    assert told[0] == "purge step-20: pending: asked for by ann@host"
    assert told[-1] == "purge step-20: succeeded"


def test_a_pin_between_plan_and_apply_keeps_the_step_and_the_record_says_so(root: str) -> None:
    """Scenario 51."""
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    pinned, free = ask_to_purge(catalog, 10, 20)
    catalog.pin(10, name="ada", reason="the paper")
    drain(catalog, Threads())
    assert states(catalog) == {10: VERIFIED, 20: TRASHED, 30: VERIFIED, 40: VERIFIED}
    record = catalog.records.action(pinned)
    assert (record.state, record.error_class) == (ActionState.CANCELLED, ErrorClass.HELD)
    assert (record.error or "").splitlines() == [
        "step-10 stays: pinned: ada",
        "  safe:  it was not touched",
        "  do:    ray-ckpt show ROOT 10; once nothing keeps it: ray-ckpt retry ROOT --step 10",
    ]
    assert catalog.records.action(free).state is ActionState.SUCCEEDED

    catalog.unpin(10)
    drain(catalog, Threads())
    assert states(catalog)[10] is VERIFIED, "nobody asks any more"
    catalog.records.add_command(Command(verb="retry", action=pinned, by="ann@host"))
    drain(catalog, Threads())
    assert states(catalog)[10] is TRASHED


def test_a_refusal_does_not_bind_the_policy(root: str) -> None:
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    catalog.pin(10, name="ada", reason="the paper")
    ask_to_purge(catalog, 10)
    drain(catalog, Threads())
    catalog.unpin(10)
    catalog.records.begin_run("run", LifecyclePolicy(keep=KEEP_TWO))
    drain(catalog, Threads())
    assert states(catalog)[10] is TRASHED


def test_nobody_can_ask_for_the_newest_two(root: str) -> None:
    """Scenario 55: a mistake, by hand this time."""
    make_root(root, (10, 20, 30))
    catalog = open_catalog(root)
    asked = ask_to_purge(catalog, 10, 20, 30)
    drain(catalog, Threads())
    assert states(catalog) == {10: TRASHED, 20: VERIFIED, 30: VERIFIED}
    errors = [(catalog.records.action(action).error or "").partition("\n")[0] for action in asked]
    assert errors[1:] == [f"step-{step} stays: newest two verified" for step in (20, 30)]


def test_what_only_the_runs_own_policy_lets_go_is_left_to_it(root: str) -> None:
    make_root(root, (10, 20, 30, 40, 50), LifecyclePolicy(keep=KEEP_TWO))
    catalog = open_catalog(root)
    assert purged(apply_purge(catalog, KeepConfig(latest=3))) == [10, 20]
    assert {s for s, state in states(catalog).items() if state is TRASHED} == {10, 20}


def test_a_step_that_was_brought_back_can_be_purged_again(root: str) -> None:
    make_root(root, (10, 20, 30))
    catalog = open_catalog(root)
    for _ in range(2):
        assert purged(apply_purge(catalog, KEEP_TWO)) == [10]
        assert states(catalog)[10] is TRASHED
        catalog.restore(10)


def test_a_damaged_step_that_should_stay_is_found_by_the_manager_and_nothing_goes(
    root: str,
) -> None:
    make_root(root, (10, 20, 30, 40))
    flip_byte(Path(root) / "step-40" / "__0_0.distcp")
    catalog = open_catalog(root)
    with managed(root), pytest.raises(Exception, match=r"step-40 is corrupt.*nothing is purged"):
        apply_purge(catalog, KEEP_TWO)
    assert states(catalog)[40] is CheckpointState.QUARANTINED
    assert TRASHED not in states(catalog).values()


@pytest.mark.ray
def test_the_actor_that_manages_the_root_does_it(root: str, manage: Callable[[str], Any]) -> None:
    make_root(root, (10, 20, 30, 40))
    catalog = open_catalog(root)
    manage(root)
    wait_for(lambda: holder_of(catalog.store, MANAGER))
    assert purged(apply_purge(catalog, KEEP_TWO)) == [10, 20]
    assert states(catalog) == {10: TRASHED, 20: TRASHED, 30: VERIFIED, 40: VERIFIED}
    assert epochs(root) == ["manager-1.json"]
