"""Hosts die, also the head with the whole cluster: whoever manages the root next goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage import lease
from ray_ckpt.storage.backends import open_catalog
from tests.cluster.hosts import Hosts, Process, hosts
from tests.roots import make_root
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.ray
STEPS = 10, 20, 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """A head and a node; the tests of this module kill them and start others."""
    with hosts({}, num_nodes=1) as cluster:
        yield cluster


@pytest.fixture
def copies(root: str, tmp_path: Path) -> str:
    """Where every export of the root is copied to; the root has three steps."""
    to = str(tmp_path / "copies")
    policy = LifecyclePolicy(
        export=(ExportPolicy(name="hf", every_steps=10),),
        publish=(PublishPolicy(export="hf", to=to),),
    )
    make_root(root, STEPS, policy)
    return to


def records(root: str, kind: ActionKind) -> dict[int, ActionRecord]:
    found = open_catalog(root).records.actions().values()
    return {record.action.step: record for record in found if record.action.kind is kind}


def wait_until_all_is_done(root: str, copies: str) -> None:
    """Every step is verified, exported and copied, once."""

    def are_copied() -> bool:
        made = records(root, ActionKind.PUBLISH)
        return {s for s, r in made.items() if r.state is ActionState.SUCCEEDED} == set(STEPS)

    wait_for(are_copied)
    observed = open_catalog(root).observe()
    assert {v.step: v.state for v in observed.checkpoints} == dict.fromkeys(
        STEPS, CheckpointState.VERIFIED
    )
    made = {e.step: e.manifest for e in observed.exports}
    copied = {e.step: e.manifest for e in open_catalog(copies).observe().exports}
    assert made == copied
    assert set(made) == set(STEPS)


def an_export(cluster: Hosts) -> Process | None:
    """The worker that makes one at this moment."""
    found = cluster.processes("export ")
    return found[0] if found else None


def manager_of(root: str) -> Process:
    """Whoever holds the root's lease now; managers of other roots run beside it."""
    holder = lease.holder_of(open_catalog(root).store, lease.MANAGER)
    assert holder is not None
    return Process(pid=holder.pid, title="ray::Manager")


@pytest.mark.slow
def test_a_new_cluster_goes_on_where_the_lost_one_stopped(
    root: str, copies: str, cluster: Hosts
) -> None:
    """Scenario 27: the head is lost, with every node, in the middle of an export."""
    cluster.start_manager(root)
    wait_for(lambda: an_export(cluster))
    cluster.kill_all()
    begun = records(root, ActionKind.EXPORT)
    assert ActionState.RUNNING in {record.state for record in begun.values()}
    cluster.start(num_nodes=1)
    cluster.start_manager(root)
    wait_until_all_is_done(root, copies)
    assert max(r.attempts for r in records(root, ActionKind.EXPORT).values()) == 2


def test_the_manager_moves_to_another_node_when_its_own_is_lost(
    root: str, copies: str, cluster: Hosts
) -> None:
    """Scenario 26: its memory is gone, and the tasks that it owned with it."""
    spare = cluster.add_node()
    cluster.start_manager(root)
    wait_for(lambda: an_export(cluster))
    manager = manager_of(root)
    home = [node for node in cluster.nodes if manager.pid in {p.pid for p in node.processes()}]
    if home:
        cluster.kill_node(home[0])
    else:  # it is on the head, which everything else needs
        manager.send(signal.SIGKILL)
    wait_until_all_is_done(root, copies)
    assert manager_of(root).pid != manager.pid
    if spare in cluster.nodes:
        cluster.kill_node(spare)


@pytest.mark.slow
def test_a_manager_that_stands_still_is_replaced_and_then_stands_by(
    root: str, copies: str, cluster: Hosts
) -> None:
    """Scenario 28: two managers, the first one paused for longer than its lease outlives it."""
    cluster.start_manager(root)
    wait_for(lambda: records(root, ActionKind.VERIFY))
    first = manager_of(root)
    first.send(signal.SIGSTOP)
    store = open_catalog(root).store
    try:
        paused = lease.holder_of(store, lease.MANAGER)
        assert paused is not None
        environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "ray_ckpt", "drain", root, "--timeout", "100"]
        second = subprocess.Popen(command, env=environment)
        wait_for(lambda: (h := lease.holder_of(store, lease.MANAGER)) and h.token != paused.token)
    finally:
        first.send(signal.SIGCONT)
    assert second.wait(timeout=PATIENCE_S) == 0
    wait_until_all_is_done(root, copies)
    succeeded = [r for kind in ActionKind for r in records(root, kind).values()]
    assert {record.state for record in succeeded} == {ActionState.SUCCEEDED}
