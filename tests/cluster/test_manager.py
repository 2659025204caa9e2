import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_ckpt.cluster.connect import find_manager, manager_status
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Request
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from tests.roots import flip_byte, make_root
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.ray
EXPORT = ExportPolicy(name="hf-bf16", last_step=True)


def states(root: str) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in open_catalog(root).observe().checkpoints}


def records(root: str, kind: ActionKind) -> list[ActionRecord]:
    found = open_catalog(root).records.actions().values()
    return [record for record in found if record.action.kind is kind]


def ended(root: str, kind: ActionKind, state: ActionState) -> list[ActionRecord]:
    return [record for record in records(root, kind) if record.state is state]


def test_the_manager_verifies_exports_publishes_and_purges_by_policy(
    root: str, tmp_path: Path, manage: Callable[[str], Any]
) -> None:
    """Scenario 5: nobody has told the manager of these commits; it finds them, and works once."""
    copies = str(tmp_path / "copies")
    make_root(
        root,
        (10, 20, 30, 40),
        LifecyclePolicy(
            export=(EXPORT,),
            publish=(PublishPolicy(export="hf-bf16", to=copies),),
            keep=KeepConfig(latest=2, every_steps=20),
        ),
    )
    manage(root)
    wait_for(lambda: ended(root, ActionKind.PUBLISH, ActionState.SUCCEEDED))
    wait_for(lambda: ended(root, ActionKind.PURGE, ActionState.SUCCEEDED))
    expected = {
        10: CheckpointState.TRASHED,
        20: CheckpointState.VERIFIED,
        30: CheckpointState.VERIFIED,
        40: CheckpointState.VERIFIED,
    }
    wait_for(lambda: states(root) == expected)
    made = {(e.name, e.step) for e in open_catalog(root).observe().exports}
    copied = {(e.name, e.step): e.manifest for e in open_catalog(copies).observe().exports}
    assert made == set(copied) == {("hf-bf16", 40)}
    assert open_catalog(root).export("hf-bf16", 40).manifest == copied[("hf-bf16", 40)]


def test_a_killed_manager_starts_anew_and_finishes_what_was_asked_for(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(
        root, (10, 20, 30), LifecyclePolicy(export=(ExportPolicy(name="hf", every_steps=10),))
    )
    manage(root)
    wait_for(lambda: ended(root, ActionKind.VERIFY, ActionState.SUCCEEDED))
    pid = manager_pid(root)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(ended(root, ActionKind.EXPORT, ActionState.SUCCEEDED)) == 3)
    assert manager_pid(root) != pid
    assert {e.step for e in open_catalog(root).observe().exports} == {10, 20, 30}
    assert all(state is CheckpointState.VERIFIED for state in states(root).values())


def test_a_record_left_running_by_a_dead_manager_runs_again(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    from ray_ckpt.core.wanted import verify_action

    orphan = ActionRecord(action=verify_action(catalog.checkpoint(10))).started(0.0)
    catalog.records.write_action(orphan)
    manage(root)
    done = wait_for(lambda: len(ended(root, ActionKind.VERIFY, ActionState.SUCCEEDED)) == 2)
    assert done
    assert catalog.records.action(orphan.action).attempts == 2


def test_the_manager_outlives_the_driver_that_started_it(root: str, ray_cluster: str) -> None:
    """Scenario 29: the job ends while work waits."""
    make_root(root, (10, 20))
    code = (
        "import ray, sys; from ray_ckpt.cluster.connect import start_manager;"
        f"ray.init(address={ray_cluster!r}); handle = start_manager({root!r}, interval_s=0.2);"
        "ray.get(handle.status.remote())"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=PATIENCE_S
    )
    open_catalog(root).records.add_request(Request(step=10, export=export_spec("hf-late")))
    wait_for(lambda: ended(root, ActionKind.EXPORT, ActionState.SUCCEEDED))
    assert open_catalog(root).export("hf-late", 10).step == 10
    ray.kill(find_manager(root))


def test_a_damaged_step_is_quarantined_and_never_exported(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20), LifecyclePolicy(export=(EXPORT,)))
    flip_byte(Path(root) / "step-20" / "__0_0.distcp")
    manage(root)
    dead = wait_for(lambda: ended(root, ActionKind.VERIFY, ActionState.DEAD))[0]
    assert dead.error_kind == "IntegrityError"
    assert "__0_0.distcp" in (dead.error or "")
    assert states(root)[20] is CheckpointState.QUARANTINED
    wait_for(lambda: states(root)[10] is CheckpointState.VERIFIED)
    assert not records(root, ActionKind.EXPORT)


def test_a_destination_that_refuses_is_a_dead_record_and_holds_the_step(
    root: str, tmp_path: Path, manage: Callable[[str], Any]
) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    make_root(
        root,
        (10, 20, 30, 40),
        LifecyclePolicy(
            export=(ExportPolicy(name="hf", every_steps=10),),
            publish=(PublishPolicy(export="hf", to=str(tmp_path / "a-file" / "below")),),
            keep=KeepConfig(latest=2),
        ),
    )
    manage(root)
    wait_for(lambda: len(ended(root, ActionKind.PUBLISH, ActionState.DEAD)) == 4)
    status = wait_for(lambda: s if (s := manager_status(root)).get("is_idle") else None)
    assert len(status["dead"]) == 4
    assert set(states(root).values()) == {CheckpointState.VERIFIED}  # nothing was purged


def test_tasks_run_although_a_trainer_holds_every_cpu(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(30)
    try:
        manage(root)
        wait_for(lambda: set(states(root).values()) == {CheckpointState.VERIFIED})
    finally:
        ray.util.remove_placement_group(group)


def test_the_status_is_plain_values_and_the_actor_is_named_after_the_run(
    root: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    manager = manage(root)
    manager.report.remote({"step": 20, "loss": 0.5})
    status = wait_for(lambda: s if (s := manager_status(root)).get("is_idle") else None)
    assert json.loads(json.dumps(status))["progress"] == {"step": 20, "loss": 0.5}
    assert status["checkpoints"] == {"10": "verified", "20": "verified"}


def manager_pid(root: str) -> int:
    from ray.util.state import list_actors

    from ray_ckpt.core.names import manager_name

    name = manager_name(open_catalog(root).uri)
    alive = wait_for(
        lambda: [
            a for a in list_actors(filters=[("name", "=", name)], detail=True) if a.state == "ALIVE"
        ]
    )
    return int(alive[0].pid)


def export_spec(name: str) -> Any:
    from ray_ckpt.core.actions import ExportSpec

    return ExportSpec(name=name)
