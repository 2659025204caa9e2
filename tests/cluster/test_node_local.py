"""Real raylets with disks of their own: what is brought from which, and what a lost one takes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_ckpt.cluster.executors import RayTasks
from ray_ckpt.core.lifecycle import ActionKind, CheckpointState
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from tests.cluster.nodes import Nodes, nodes_of
from tests.staged import HERE, rounds, stage
from tests.tensors.plain import loaded
from tests.waiting import wait_for


@pytest.fixture
def nodes(ray_cluster: str) -> Iterator[Nodes]:
    yield from nodes_of(ray_cluster)


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


def where_it_ran(catalog: Catalog, kind: ActionKind) -> dict[str | None, str]:
    """By the node that an action was for, the one that it ran on."""
    records = [r for r in catalog.records.actions().values() if r.action.kind is kind]
    return {r.action.node.id: r.result["node"] for r in records if r.action.node is not None}


@pytest.mark.ray
@pytest.mark.slow
def test_tasks_run_on_the_very_nodes_that_hold_the_files(
    root: str, tmp_path: Path, nodes: Nodes, manage: Callable[[str], Any]
) -> None:
    ids = tuple(str(node.find_id()) for node in (nodes.add(), nodes.add()))
    stage(root, tmp_path / "disks", 5, ids=ids)
    manage(root)
    catalog = open_catalog(root)
    wait_for(lambda: catalog.observe().drafts == ())
    wait_for(lambda: states(catalog) == {5: CheckpointState.VERIFIED})
    for kind in (ActionKind.GATHER, ActionKind.FREE):
        assert where_it_ran(catalog, kind) == {node: node for node in ids}
    assert loaded(root) == (5, {5.0})
    assert [path for path in (tmp_path / "disks").rglob("*") if path.is_file()] == []


@pytest.mark.ray
def test_a_node_that_dies_before_it_was_drained_takes_only_what_was_never_committed(
    root: str, tmp_path: Path, nodes: Nodes
) -> None:
    """Scenario 11: a node with saves on its own disk is lost."""
    first, second = nodes.add(), nodes.add()
    ids = str(first.find_id()), str(second.find_id())
    catalog = open_catalog(root)
    stage(root, tmp_path / "disks", 4, ids=ids)
    rounds(catalog, RayTasks(), count=6)
    stage(root, tmp_path / "disks", 5, ids=ids)
    second.kill()
    shutil.rmtree(tmp_path / "disks/1")
    wait_for(lambda: second.find_id() is None)
    rounds(catalog, RayTasks(), count=5)
    assert states(catalog) == {4: CheckpointState.VERIFIED, 5: CheckpointState.ABANDONED}
    lost = next(view for view in catalog.observe().checkpoints if view.step == 5)
    assert f"node lost: {HERE} (node {ids[1][:8]}) held 1 files of step-5" in (lost.problem or "")
    assert [path for path in (tmp_path / "disks").rglob("*") if path.is_file()] == []
    assert loaded(root) == (4, {4.0})


@pytest.mark.ray
def test_a_host_that_is_not_of_the_cluster_has_two_minutes_to_come_back(
    root: str, tmp_path: Path, ray_cluster: str
) -> None:
    assert ray.is_initialized()
    stage(root, tmp_path / "disks", 5, hosts=("host-a", "host-b"))
    catalog = open_catalog(root)
    rounds(catalog, RayTasks(), count=2)
    assert states(catalog) == {5: CheckpointState.SAVING}
    rounds(catalog, RayTasks(), count=5)
    assert states(catalog) == {5: CheckpointState.ABANDONED}
    problem = catalog.observe().checkpoints[0].problem or ""
    assert "node lost: host-a (node id-0)" in problem
    assert "is not there" in problem
