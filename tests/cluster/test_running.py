"""Attempts that hang, die or wait: noticed, stopped, tried again, and fenced when they wake up."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import ray

from ray_ckpt.cluster import in_flight, priority
from ray_ckpt.cluster.executors import Executor, RayTasks
from ray_ckpt.cluster.nodes import IO_RESOURCE, kill_if_same
from ray_ckpt.core.admission import NODE
from ray_ckpt.core.errors import LeaseHeldError
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.names import reader_key
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.beats import all_beats, process_born
from tests.cluster.cranks import Crank, HangingPlace, OnlyOn, Unreachable
from tests.cluster.nodes import Nodes, nodes_of
from tests.roots import TINY, make_root
from tests.waiting import PATIENCE_S, wait_for

Cranks = Callable[[str, Executor], Crank]
HF = ExportPolicy(name="hf", every_steps=10)


def copying(*places: str, limits: Limits) -> LifecyclePolicy:
    publish = tuple(PublishPolicy(export="hf", to=place) for place in places)
    return LifecyclePolicy(export=(HF,), publish=publish, limits=limits)


@pytest.fixture
def crank() -> Iterator[Cranks]:
    made: list[Crank] = []

    def make(root: str, executor: Executor) -> Crank:
        made.append(Crank(root, executor))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def nodes(ray_cluster: str) -> Iterator[Nodes]:
    yield from nodes_of(ray_cluster)


@pytest.mark.slow
def test_a_purge_that_was_given_up_moves_nothing_when_it_wakes_up(root: str, crank: Cranks) -> None:
    """Scenario 33: a zombie goes on after it was given up, in the same epoch."""
    limits = Limits(hung_after_s=3.0)
    make_root(root, (10, 20, 30), LifecyclePolicy(keep=KeepConfig(latest=2), limits=limits))
    executor = Unreachable()
    manager = crank(root, executor)
    silent = b'{"owner": "load", "token": "0", "host": "elsewhere", "pid": 1, "beat": 0}'
    manager.catalog.store.write(reader_key(10, "0"), silent)  # whoever purges watches it a while
    zombie = manager.beat_of(ActionKind.PURGE)
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        (record,) = manager.until_all(ActionKind.PURGE, ActionState.RETRY_WAIT)
        assert "nothing was heard of it for" in (record.error or "")
        assert f"process {zombie.pid} on {zombie.host}" in (record.error or "")
        manager.catalog.store.delete([reader_key(10, "0")])
        (record,) = manager.until_all(ActionKind.PURGE, ActionState.SUCCEEDED)
        assert record.attempts == 2
        manager.catalog.restore(10)
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    error = executor.futures["purge step-10"].exception(timeout=PATIENCE_S)
    assert isinstance(error, LeaseHeldError)
    assert "attempt 1 of purge step-10 was given up: the record says pending" in error.what
    assert manager.catalog.is_in_place(10)


@pytest.mark.ray
def test_a_worker_that_is_stopped_is_killed_and_its_action_done_by_another(
    root: str, tmp_path: Path, ray_cluster: str, crank: Cranks
) -> None:
    """A hung task: SIGSTOP is the worst of them, since no signal but SIGKILL reaches it."""
    place = HangingPlace(tmp_path / "copies", steps=(10,))
    make_root(root, (10,), copying(place.uri, limits=Limits(hung_after_s=3.0)))
    manager = crank(root, RayTasks())
    beat = manager.beat_of(ActionKind.PUBLISH)
    threads = [int(path.name) for path in Path(f"/proc/{beat.pid}/task").iterdir()]
    assert priority.NICENESS in {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
    assert os.getpriority(os.PRIO_PROCESS, beat.pid) < priority.NICENESS, "Ray's own thread"
    os.kill(beat.pid, signal.SIGSTOP)
    place.answers()
    (record,) = manager.until_all(ActionKind.PUBLISH, ActionState.SUCCEEDED)
    assert record.attempts == 2
    assert open_catalog(place.uri).export("hf", 10).step == 10
    assert wait_for(lambda: process_born(beat.pid) != beat.process_born)
    assert wait_for(lambda: ray.available_resources().get(IO_RESOURCE) == 2.0)
    assert all_beats(manager.catalog.store) == {}


@pytest.mark.ray
def test_an_attempt_that_comes_no_further_is_stopped_although_it_beats(
    root: str, tmp_path: Path, ray_cluster: str, crank: Cranks
) -> None:
    place = HangingPlace(tmp_path / "copies", steps=(10,))
    make_root(root, (10,), copying(place.uri, limits=Limits()))
    manager = crank(root, RayTasks())
    manager.beat_of(ActionKind.PUBLISH)
    impatient = Limits(hung_after_s=20.0, stalled_after_s=2.0)
    manager.catalog.records.begin_run("run", copying(place.uri, limits=impatient))
    (record,) = manager.until_all(ActionKind.PUBLISH, ActionState.RETRY_WAIT)
    assert "it came no further for" in (record.error or "")
    assert "begins" in (record.error or "")
    place.answers()
    (record,) = manager.until_all(ActionKind.PUBLISH, ActionState.SUCCEEDED)
    assert record.attempts == 2


@pytest.mark.ray
def test_a_destination_that_hangs_holds_up_no_other(
    root: str, tmp_path: Path, ray_cluster: str, crank: Cranks
) -> None:
    dead = HangingPlace(tmp_path / "dead", steps=(10, 20, 30))
    good = str(tmp_path / "good")
    make_root(root, (10, 20, 30), copying(dead.uri, good, limits=Limits()))
    manager = crank(root, RayTasks())
    last = manager.until(lambda _: len(open_catalog(good).observe().exports) == 3)
    (stuck,) = (f for f in last.running if f.action.destination == dead.uri)
    why = {action.title: last.waits[action.key] for action in last.waiting}
    reason = f"1 action runs at {dead.uri} already, limits.per_destination"
    others = {f"publish step-{step} hf to {dead.uri}" for step in (10, 20, 30)}
    assert why == dict.fromkeys(others - {stuck.action.title}, reason)


@pytest.mark.ray
def test_a_task_that_waits_for_a_slot_is_told_of_and_not_given_up(
    root: str, ray_cluster: str, crank: Cranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "WAITS_AFTER_S", 0.5)
    make_root(root, (10,), LifecyclePolicy(limits=Limits(hung_after_s=1.0)))
    slots = [{IO_RESOURCE: 1.0}] * 2
    others = ray.util.placement_group(slots)
    try:
        assert others.wait(30)
        manager = crank(root, RayTasks())
        seen = manager.until(lambda done: done.problems)
        assert seen.problems == ("verify step-10 waits for a slot of ckpt_io: 0 of 2 free",)
    finally:
        ray.util.remove_placement_group(others)
    (record,) = manager.until_all(ActionKind.VERIFY, ActionState.SUCCEEDED)
    assert record.attempts == 1


@pytest.mark.ray
@pytest.mark.slow
def test_an_export_on_a_gpu_waits_for_a_node_that_has_one(
    root: str, nodes: Nodes, crank: Cranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "WAITS_AFTER_S", 0.5)
    on_gpu = replace(HF, device="cuda")
    make_root(root, (10,), LifecyclePolicy(export=(on_gpu,)))
    manager = crank(root, RayTasks())
    seen = manager.until(lambda done: done.problems)
    assert seen.problems == ("export step-10 hf waits for a GPU: 0 of 0 free",)
    nodes.add(num_gpus=1, num_slots=1)
    # the node's GPU is a number that Ray was told: torch sees none there, and says so
    (record,) = manager.until_all(ActionKind.EXPORT, ActionState.DEAD)
    assert "hf is to be made on a GPU, and torch sees none" in (record.error or "")
    assert record.attempts == 1


@pytest.mark.ray
def test_a_worker_that_is_killed_is_told_of_with_its_last_words_and_tried_again(
    root: str, tmp_path: Path, ray_cluster: str, crank: Cranks
) -> None:
    """Scenario 31, by the kernel: it kills without a word; the last beat says how large it was."""
    place = HangingPlace(tmp_path / "copies", steps=(10,))
    make_root(root, (10,), copying(place.uri, limits=Limits()))
    manager = crank(root, RayTasks())
    beat = manager.beat_of(ActionKind.PUBLISH)
    os.kill(beat.pid, signal.SIGKILL)
    (record,) = manager.until_all(ActionKind.PUBLISH, ActionState.RETRY_WAIT)
    assert "the task's worker or node died" in (record.error or "")
    assert f"last heard of: process {beat.pid}" in (record.error or "")
    assert "peak memory 0." in (record.error or "")
    place.answers()
    (record,) = manager.until_all(ActionKind.PUBLISH, ActionState.SUCCEEDED)
    assert record.attempts == 2
    assert all_beats(manager.catalog.store) == {}


@pytest.mark.slow
@pytest.mark.ray
def test_an_export_whose_node_dies_is_made_once_on_another(
    root: str, nodes: Nodes, crank: Cranks
) -> None:
    """Scenario 32: the node goes while an export runs there."""
    large = replace(TINY, dim=1024, ffn_dim=2816, num_layers=6)  # its export is seen at work
    make_root(root, (10,), LifecyclePolicy(export=(HF,)), sizes=large)
    both = [nodes.add(num_slots=1), nodes.add(num_slots=1)]
    manager = crank(root, OnlyOn(*(node.find_id() for node in both)))
    home = manager.beat_of(ActionKind.EXPORT).node
    next(node for node in both if node.find_id() == home).kill()
    # Ray takes some time to miss a node that told nobody that it goes, and may send it there again
    (record,) = manager.until_all(ActionKind.EXPORT, ActionState.SUCCEEDED)
    assert record.attempts >= 2
    assert record.result[NODE] not in (home, None)
    assert [e.step for e in manager.catalog.observe().exports] == [10]
    for remains in manager.catalog.commit.remains():
        manager.catalog.commit.give_up(remains)
    assert manager.catalog.store.list_folders(".ray_ckpt/staging") == []


@pytest.mark.ray
@pytest.mark.slow
def test_actions_run_beside_a_trainer_that_holds_every_cpu_and_gpu_close_to_the_bytes(
    root: str, tmp_path: Path, nodes: Nodes, crank: Cranks
) -> None:
    """The resource recipe of the README: slots of `ckpt_io` beside the trainers' CPUs and GPUs."""
    one_at_a_time = Limits(total=1)  # whatever the one before has touched is free
    make_root(root, (10, 20), copying(str(tmp_path / "copies"), limits=one_at_a_time))
    both = [nodes.add(num_gpus=1, num_slots=8), nodes.add(num_gpus=1, num_slots=8)]
    trainer = {"CPU": 1.0, "GPU": 1.0}
    head = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    everything = [trainer, trainer, {"CPU": head}]
    group = ray.util.placement_group(everything)
    assert group.wait(60)
    executor = OnlyOn(*(node.find_id() for node in both))
    try:
        manager = crank(root, executor)
        manager.until(lambda _: len(manager.records(ActionKind.PUBLISH)) == 2)
        manager.until_all(ActionKind.PUBLISH, ActionState.SUCCEEDED)
    finally:
        ray.util.remove_placement_group(group)
    ran = {
        (r.action.step, r.action.kind): r.result[NODE]
        for r in manager.catalog.records.actions().values()
    }
    assert set(ran.values()) <= {node.find_id() for node in both}
    for step in (10, 20):
        for before, after in pairwise((ActionKind.VERIFY, ActionKind.EXPORT, ActionKind.PUBLISH)):
            assert executor.asked[step, after] == ran[step, before]


def test_a_process_is_only_killed_if_it_is_the_one_that_was_heard() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not kill_if_same(process.pid, "1")
    assert not kill_if_same(process.pid, "")
    assert process.poll() is None
    assert kill_if_same(process.pid, process_born(process.pid) or "")
    assert process.wait() == -signal.SIGKILL
    assert process.stdin is not None
    process.stdin.close()


HUNGRY = """
import resource, sys, threading
import torch
threading.stack_size(1 << 18)  # stacks count as well
from ray_ckpt.cluster.drain import work
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.observation import Request
from ray_ckpt.storage.backends import open_catalog
import ray_ckpt.tensors.export

catalog = open_catalog(sys.argv[1])

def has_ended(kind):
    states = {r.action.kind: r.state for r in catalog.records.actions().values()}
    return states.get(kind) in ("retry_wait", "succeeded")

def work_until_end_of(kind):
    work(Reconciler(catalog, Threads(), owner="hungry"), until=lambda _: has_ended(kind))

work_until_end_of(ActionKind.VERIFY)
catalog.records.add_request(Request(step=10, export=ExportSpec(name="hf")))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
work_until_end_of(ActionKind.EXPORT)
"""


def test_an_export_that_gets_no_more_memory_says_how_much_it_had(root: str) -> None:
    """Scenario 31, by a real limit on the address space of the process."""
    make_root(root, (10,), sizes=replace(TINY, dim=1024, ffn_dim=2048))
    command = [sys.executable, "-c", HUNGRY, root, "6_000_000"]  # less than the blocks of a file
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    (record,) = [
        r
        for r in open_catalog(root).records.actions().values()
        if r.action.kind is ActionKind.EXPORT
    ]
    assert record.error_kind == "OutOfMemoryError", record
    assert re.search(r"gave no more memory, after \d\.\d\d GB", record.error or "")


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_without_memory_has_one_more_try_and_then_the_action_waits(
    root: str, nodes: Nodes, crank: Cranks
) -> None:
    """Scenario 31, by Ray's memory monitor, which kills every task of this node."""
    make_root(root, (10,))
    full = nodes.add(
        num_slots=1, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100"
    )
    manager = crank(root, OnlyOn(full.find_id()))
    (record,) = manager.until_all(ActionKind.VERIFY, ActionState.BLOCKED)
    assert record.failures == {"resource": 2}
    assert "the task was killed: its node ran out of memory" in (record.error or "")
