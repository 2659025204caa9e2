"""Rounds under a lease: who acts, who stands by, and what a paused manager may still do."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.connect import manager_status
from ray_ckpt.cluster.drain import drain, work
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.perform import perform_here
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import LeaseHeldError, TransientError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Request
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.wanted import export_action, purge_action, verify_action
from ray_ckpt.storage import lease
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.store import LocalStore
from tests.roots import make_root
from tests.servers.lesser_s3 import Lack, LesserS3
from tests.servers.seaweed import S3Endpoint
from tests.waiting import wait_for

KEEP_TWO = LifecyclePolicy(keep=KeepConfig(latest=2))


def reconciler(catalog: Catalog, owner: str) -> Reconciler:
    return Reconciler(catalog, Threads(), owner=owner)


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


def ended(catalog: Catalog, kind: ActionKind) -> dict[int, ActionState]:
    records = catalog.records.actions().values()
    return {r.action.step: r.state for r in records if r.action.kind is kind}


def test_of_two_managers_one_acts_and_the_other_stands_by(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    first, second = reconciler(catalog, "a"), reconciler(catalog, "b")
    first.round(time.time())
    seen = second.round(time.time())
    assert "another manager writes to this root" in (seen.standing_by or "")
    assert seen.running == ()
    first.close()
    assert second.round(time.time()).standing_by is None
    second.close()


@pytest.mark.s3
def test_a_manager_says_what_its_store_lacks_and_does_its_work(
    s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LesserS3(s3_server) as lesser:
        lesser.lacks.add(Lack.CREATES)
        monkeypatch.setenv("AWS_ENDPOINT_URL", lesser.endpoint.url)
        make_root(s3_root, (10,))
        catalog = open_catalog(s3_root)
        verified = {10: CheckpointState.VERIFIED}
        done = work(reconciler(catalog, "a"), until=lambda _: states(catalog) == verified)
        assert "If-None-Match is ignored" in done.problems[0]


def test_a_manager_that_is_started_again_takes_its_own_lease_over_at_once(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    dead = reconciler(catalog, "a")
    dead.round(time.time())
    again = reconciler(catalog, "a")
    assert again.round(time.time()).standing_by is None
    assert dead.round(time.time()).standing_by is not None
    again.close()
    dead.close()
    assert lease.holder_of(catalog.store, lease.MANAGER) is None


LOOP = """
import sys, time
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.perform import perform_here
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.storage.backends import open_catalog

manager = Reconciler(open_catalog(sys.argv[1]), Threads(), owner="paused")
while True:
    print(manager.round(time.time()).standing_by, flush=True)
    time.sleep(0.1)
"""


@pytest.fixture
def paused(root: str) -> Iterator["subprocess.Popen[str]"]:
    """A manager in a process of its own that has acted and was stopped then."""
    make_root(root, (10, 20, 30, 40))
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, root], stdout=subprocess.PIPE, text=True
    )
    catalog = open_catalog(root)
    wait_for(lambda: set(states(catalog).values()) == {CheckpointState.VERIFIED})
    process.send_signal(signal.SIGSTOP)
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def test_a_manager_that_was_paused_changes_nothing_once_another_has_taken_over(
    root: str, paused: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 28: split brain, one of the two paused and resumed."""
    monkeypatch.setattr(lease, "PATIENCE_S", 3.0)
    catalog = open_catalog(root)
    second = reconciler(catalog, "second")
    assert second.round(time.time()).standing_by is None
    assert paused.stdout is not None
    paused.send_signal(signal.SIGCONT)
    said = wait_for(lambda: line if (line := paused.stdout.readline()) != "None\n" else None)
    assert "another manager writes to this root" in said
    catalog.records.begin_run("run", KEEP_TWO)
    wait_for(
        lambda: second.round(time.time()) and ended(catalog, ActionKind.PURGE).keys() == {10, 20}
    )
    wait_for(lambda: not second.round(time.time()).running)
    assert {r.attempts for r in catalog.records.actions().values()} == {1}, "nothing was done twice"
    second.close()


def test_a_task_that_was_planned_by_an_earlier_manager_moves_no_checkpoint(root: str) -> None:
    """Scenario 33: a zombie goes on after its lease was lost."""
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    first = reconciler(catalog, "a")
    first.round(time.time())
    first.close()
    second = reconciler(catalog, "b")
    second.round(time.time())
    action = purge_action(catalog.checkpoint(10), grace_s=0.0)
    with pytest.raises(LeaseHeldError, match="epoch 2 has taken over from our epoch 1"):
        run_action(root, Attempt(action=action, number=1, started_at=1.0, epoch=1, beat_s=1.0))
    assert 10 in states(catalog)
    assert states(catalog)[10] is not CheckpointState.TRASHED
    second.close()


def test_a_purge_whose_manager_died_before_it_said_so_is_known_to_be_done(root: str) -> None:
    make_root(root, (10, 20, 30), KEEP_TWO)
    catalog = open_catalog(root)
    purge = ActionRecord(action=purge_action(catalog.checkpoint(10), grace_s=3600.0))
    catalog.records.write_action(purge.started(time.time()))
    catalog.trash(10)
    drain(catalog, Threads())
    assert catalog.records.action(purge.action).state is ActionState.SUCCEEDED
    assert states(catalog)[10] is CheckpointState.TRASHED


def test_what_waits_for_a_step_that_somebody_removed_is_cancelled(root: str) -> None:
    """Scenario 54: a person removes a step folder."""
    import shutil

    make_root(root, (10, 20))
    catalog = open_catalog(root)
    verify = ActionRecord(action=verify_action(catalog.checkpoint(10))).started(time.time())
    catalog.records.write_action(verify.failed(TransientError("later"), time.time()))
    shutil.rmtree(Path(root) / "step-10")
    drain(catalog, Threads())
    assert catalog.records.action(verify.action).state is ActionState.CANCELLED
    assert states(catalog) == {20: CheckpointState.VERIFIED}


def test_a_drained_root_has_all_that_its_policy_and_its_people_ask_for(
    root: str, tmp_path: Path
) -> None:
    copies = str(tmp_path / "copies")
    make_root(
        root,
        (10, 20, 30, 40),
        LifecyclePolicy(
            export=(ExportPolicy(name="hf"),),
            publish=(PublishPolicy(export="hf", to=copies),),
            keep=KeepConfig(latest=2),
        ),
    )
    catalog = open_catalog(root)
    catalog.records.add_request(Request(step=30, export=ExportSpec(name="asked")))
    told: list[str] = []
    observed = drain(catalog, Threads(), told=told.append)
    assert observed.requests == ()
    assert states(catalog) == {
        10: CheckpointState.TRASHED,
        20: CheckpointState.TRASHED,
        30: CheckpointState.VERIFIED,
        40: CheckpointState.VERIFIED,
    }
    assert {(e.name, e.step) for e in observed.exports} == {("hf", 40), ("asked", 30)}
    assert open_catalog(copies).export("hf", 40).step == 40
    assert "running: verify step-10" in " ".join(told)


@pytest.mark.parametrize("moment", ["before it begins", "after its first file"])
def test_an_export_that_somebody_removes_while_it_is_copied_is_made_and_copied_again(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Scenario 54, of an export: found by the chaos test."""
    copies = str(tmp_path / "copies")
    policy = LifecyclePolicy(
        export=(ExportPolicy(name="hf", every_steps=10),),
        publish=(PublishPolicy(export="hf", to=copies),),
    )
    make_root(root, (10,), policy)
    removed: list[str] = []

    def removing(method: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not removed and when(*args):
                removed.append(moment)
                shutil.rmtree(f"{root}/exports")
            return method(self, *args, **kwargs)

        return call

    if moment == "before it begins":
        begins = removing(Threads.start, lambda _, attempt, __: "publish" in attempt.title)
        monkeypatch.setattr(Threads, "start", begins)
    else:
        sends = removing(LocalStore.read, lambda key: key.endswith(".safetensors"))
        monkeypatch.setattr(LocalStore, "read", sends)
    catalog = open_catalog(root)
    drain(catalog, Threads())
    assert removed == [moment]
    assert ended(catalog, ActionKind.PUBLISH) == {10: ActionState.SUCCEEDED}
    assert ended(catalog, ActionKind.EXPORT) == {10: ActionState.SUCCEEDED}
    export = catalog.export("hf", 10)
    assert open_catalog(copies).export("hf", 10).manifest == export.manifest


def test_when_time_is_over_the_rest_is_told_and_stays_asked_for(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    first = reconciler(catalog, "somebody else")
    first.round(time.time())
    catalog.records.add_request(Request(step=20, export=ExportSpec(name="hf")))
    with pytest.raises(TransientError, match="actions are left after 1 s") as raised:
        drain(catalog, Threads(), timeout_s=1.0)
    assert "ray-ckpt drain" in raised.value.do
    first.close()
    assert drain(catalog, Threads()).requests == ()
    assert catalog.export("hf", 20).step == 20


def test_a_drained_root_is_free_for_the_next_manager(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    drain(catalog, Threads())
    assert lease.holder_of(catalog.store, lease.MANAGER) is None
    epochs = sorted(path.name for path in (Path(root) / ".ray_ckpt/lease").glob("manager-*"))
    assert epochs == ["manager-1.json"]


@pytest.mark.ray
def test_a_second_manager_on_the_cluster_stands_by_for_one_in_another_process(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    first = reconciler(catalog, "another cluster")
    first.round(time.time())
    manage(root)
    problems = wait_for(lambda: manager_status(root).get("problems"))
    assert "standing by: another manager writes to this root" in problems[0]
    first.close()
    wait_for(lambda: set(states(catalog).values()) == {CheckpointState.VERIFIED})


@pytest.mark.ray
def test_what_is_asked_for_without_the_cluster_at_hand_is_done_by_its_manager(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    manage(root)
    wait_for(lambda: set(states(catalog).values()) == {CheckpointState.VERIFIED})
    told: list[str] = []
    action = export_action(catalog.checkpoint(10), ExportSpec(name="hf"))
    perform_here(catalog, action, told=told.append)
    assert catalog.export("hf", 10).step == 10
    assert "waiting: another manager writes to this root" in told[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_finishes_a_queue_and_says_what_has_failed_for_good(
    root: str, tmp_path: Path, ray_cluster: str
) -> None:
    """Scenario 27: a new cluster, the same root, and the queue goes on."""
    (tmp_path / "a-file").write_text("not a folder")
    make_root(
        root,
        (10, 20),
        LifecyclePolicy(
            export=(ExportPolicy(name="hf"),),
            publish=(PublishPolicy(export="hf", to=str(tmp_path / "a-file/below")),),
        ),
    )
    client = JobSubmissionClient(ray_cluster)
    job = client.submit_job(entrypoint=f"{sys.executable} -m jobs.reconcile root={root}")
    wait_for(lambda: client.get_job_status(job).is_terminal())
    said = client.get_job_logs(job)
    assert client.get_job_status(job) is JobStatus.FAILED, said
    assert "publish step-20 hf" in said
    assert "failed for good" in said
    assert open_catalog(root).export("hf", 20).step == 20
