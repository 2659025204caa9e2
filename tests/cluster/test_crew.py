"""One export is made by several nodes at once, and whatever becomes of helpers, it is the same."""

import logging
import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util.state import list_tasks
from ray.util.state.common import TaskState

from ray_ckpt.cluster import crew
from ray_ckpt.cluster.nodes import IO_RESOURCE
from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.exporting import begin_export
from tests.cluster.nodes import Nodes, nodes_of
from tests.roots import make_root
from tests.waiting import wait_for

HF = ExportSpec(name="hf", max_shard_bytes=8_000)

pytestmark = [pytest.mark.ray]


class Slow(Progress):
    """So is whoever tells it what is done, and others come to have a part."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self._pause_s = pause_s
        self.done_bytes = 0

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        time.sleep(self._pause_s)


@pytest.fixture
def nodes(ray_cluster: str) -> Iterator[Nodes]:
    yield from nodes_of(ray_cluster)


@pytest.fixture
def step_root(root: str) -> str:
    make_root(root, (10,))
    return root


def _export(root: str, title: str, progress: Progress | None = None) -> Manifest:
    catalog = open_catalog(root)
    return export_step(
        catalog,
        catalog.manifest(10),
        HF,
        progress=progress or Progress(),
        crew=crew.together(title),
    )


def _helpers(title: str, state: str) -> list[TaskState]:
    found = list_tasks(filters=[("state", "=", state)], limit=1000, raise_on_missing_output=False)
    return [task for task in found if str(task.name).startswith(title)]


def _expect_as_if_alone(root: str, made: Manifest) -> None:
    catalog = open_catalog(root)
    assert catalog.export("hf", 10).manifest == made
    assert list(catalog.store.list_objects(names.PARTS)) == []
    alone = ExportSpec(name="alone", max_shard_bytes=HF.max_shard_bytes)
    expected = export_step(catalog, catalog.manifest(10), alone)
    weights = {e for e in expected.files if e.path.endswith(".safetensors")}
    assert len(weights) > 4
    assert weights <= set(made.files)


@pytest.mark.slow
def test_free_slots_of_other_nodes_have_a_part_in_it(step_root: str, nodes: Nodes) -> None:
    other = nodes.add(num_slots=2)
    progress = Slow(0.5)
    made = _export(step_root, "export step-10 shared", progress)
    export = begin_export(open_catalog(step_root), open_catalog(step_root).manifest(10), HF)
    count = len(export.plan.shards)
    helpers = wait_for(lambda: _helpers("export step-10 shared", "FINISHED"))
    assert {helper.name.rpartition(" ")[2] for helper in helpers} <= {
        f"{number + 1}/{count}" for number in range(count)
    }
    assert other.find_id() in {helper.node_id for helper in helpers}
    assert progress.done_bytes >= export.plan.total_bytes
    _expect_as_if_alone(step_root, made)


def test_without_a_free_slot_nobody_is_waited_for(step_root: str, ray_cluster: str) -> None:
    others = ray.util.placement_group([{IO_RESOURCE: 1.0}] * 2)
    try:
        assert others.wait(30)
        assert wait_for(lambda: not ray.available_resources().get(IO_RESOURCE))
        made = _export(step_root, "export step-10 without", Slow(0.1))
    finally:
        ray.util.remove_placement_group(others)
    _expect_as_if_alone(step_root, made)
    assert not _helpers("export step-10 without", "FINISHED")


class Killing(Slow):
    """Kills the first helper that it sees at work, by a signal."""

    def __init__(self, title: str, number: signal.Signals) -> None:
        super().__init__(0.5)
        self._title = title
        self._number = number
        self.hit: int | None = None

    def advance(self, num_bytes: int) -> None:
        super().advance(num_bytes)
        running = [] if self.hit else _helpers(self._title, "RUNNING")
        pids = [task.worker_pid for task in running if task.worker_pid]
        if pids:
            self.hit = pids[0]
            os.kill(self.hit, self._number)


def _slow_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper takes its time; tasks get the functions of this process by value."""

    def make_slowly(order: crew.ShardOrder) -> None:
        time.sleep(4)
        crew._make(order)

    monkeypatch.setattr(crew, "make_shard", make_slowly)


def test_what_a_killed_helper_had_is_made_by_another(
    step_root: str,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _slow_helpers(monkeypatch)
    killing = Killing("export step-10 killed", signal.SIGKILL)
    with caplog.at_level(logging.WARNING, "ray_ckpt"):
        made = _export(step_root, "export step-10 killed", killing)
    assert killing.hit is not None
    assert "lost the helper that made model-" in caplog.text
    _expect_as_if_alone(step_root, made)


def test_what_a_helper_does_not_come_to_the_end_of_is_made_here(
    step_root: str, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_helpers(monkeypatch)
    monkeypatch.setattr(crew, "_PATIENCE_S", 6.0)
    stopping = Killing("export step-10 stopped", signal.SIGSTOP)
    try:
        made = _export(step_root, "export step-10 stopped", stopping)
        _expect_as_if_alone(step_root, made)
    finally:
        assert stopping.hit is not None
        os.kill(stopping.hit, signal.SIGKILL)


def test_what_a_helper_finds_is_told_and_nothing_is_there(
    step_root: str, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(order: crew.ShardOrder) -> None:
        raise IntegrityError("a byte is another one", order.file)

    monkeypatch.setattr(crew, "make_shard", fail)
    catalog = open_catalog(step_root)
    with pytest.raises(IntegrityError, match="a byte is another one"):
        _export(step_root, "export step-10 damaged", Slow(0.5))
    assert catalog.observe().exports == ()
    assert list(catalog.store.list_objects(names.PARTS)) == []
