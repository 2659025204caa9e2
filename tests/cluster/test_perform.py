from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.cluster.perform import perform_here, perform_on_cluster, verify_here
from ray_ckpt.core.errors import IntegrityError, ObjectExistsError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.backends import open_catalog
from tests.roots import flip_byte, make_root, snapshot

HF = ExportSpec(name="hf-bf16")


def test_an_action_in_this_process_leaves_the_same_record_as_the_manager(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    action = export_action(catalog.checkpoint(20), HF)
    record = perform_here(catalog, action)
    assert catalog.records.action(action) == record
    assert record.state is ActionState.SUCCEEDED
    assert record.result["bytes"] == catalog.export("hf-bf16", 20).manifest.total_bytes


def test_a_failed_action_raises_and_is_recorded(root: str, tmp_path: Path) -> None:
    make_root(root, (10, 20))
    (tmp_path / "a-file").write_text("")
    catalog = open_catalog(root)
    view = catalog.checkpoint(20)
    perform_here(catalog, export_action(view, HF))
    action = publish_action(view, HF, str(tmp_path / "a-file" / "below"))
    with pytest.raises(UsageError, match="Not a directory"):
        perform_here(catalog, action)
    record = catalog.records.action(action)
    assert record.state is ActionState.DEAD
    assert "safe:" in (record.error or "")


def test_verifying_here_records_it_and_never_moves_a_damaged_step(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    verify_here(catalog, catalog.checkpoint(10))
    assert catalog.checkpoint(10).state is CheckpointState.VERIFIED
    flip_byte(Path(root) / "step-20" / "__0_0.distcp")
    before = snapshot(root)
    with pytest.raises(IntegrityError, match="step-20 is corrupt"):
        verify_here(catalog, catalog.checkpoint(20))
    assert snapshot(root) == before


@pytest.mark.ray
def test_a_cluster_does_what_is_asked_for_and_asking_twice_is_doing_once(
    root: str, tmp_path: Path, ray_cluster: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    manage(root)
    catalog = open_catalog(root)
    view = catalog.checkpoint(10)
    told: list[str] = []
    action = publish_action(view, HF, str(tmp_path / "copies"))
    first = perform_on_cluster(root, action, address=ray_cluster, told=told.append)
    again = perform_on_cluster(root, action, address=ray_cluster)
    assert first.result["bytes"] > 0
    assert again.result["bytes"] == 0
    assert any("publish step-10" in sentence for sentence in told)
    assert open_catalog(str(tmp_path / "copies")).export("hf-bf16", 10).step == 10


@pytest.mark.ray
def test_a_cluster_makes_an_export_again_that_somebody_removed(
    root: str, ray_cluster: str, manage: Callable[[str], Any]
) -> None:
    import shutil

    make_root(root, (10, 20))
    manage(root)
    action = export_action(open_catalog(root).checkpoint(10), HF)
    perform_on_cluster(root, action, address=ray_cluster)
    shutil.rmtree(Path(root) / "exports")
    perform_on_cluster(root, action, address=ray_cluster)
    assert open_catalog(root).export("hf-bf16", 10).step == 10


@pytest.mark.ray
def test_an_error_on_the_cluster_comes_back_as_itself(
    root: str, ray_cluster: str, manage: Callable[[str], Any]
) -> None:
    make_root(root, (10, 20))
    manage(root)
    view = open_catalog(root).checkpoint(10)
    perform_on_cluster(root, export_action(view, HF), address=ray_cluster)
    clash = export_action(view, ExportSpec(name="hf-bf16", dtype="float32"))
    with pytest.raises(ObjectExistsError, match="choose another --name"):
        perform_on_cluster(root, clash, address=ray_cluster)


@pytest.mark.slow
@pytest.mark.ray
def test_the_jobs_do_the_same_from_a_job_of_their_own(
    root: str, tmp_path: Path, ray_cluster: str
) -> None:
    import sys

    from ray.job_submission import JobStatus, JobSubmissionClient

    from tests.waiting import wait_for

    make_root(root, (10, 20, 30, 40))
    client = JobSubmissionClient(ray_cluster)
    commands = {
        "export": f"root={root} step=10 name=hf to={tmp_path}/first",
        "publish": f"root={root} step=10 name=hf to={tmp_path}/second",
        "purge": f"root={root} keep.latest=2 keep.every_steps=10 apply=false",
        "export ": f"root={root} name=of-the-newest",
    }
    outputs: dict[str, str] = {}
    for verb, arguments in commands.items():
        job = client.submit_job(entrypoint=f"{sys.executable} -m jobs.{verb} {arguments}")
        wait_for(lambda job=job: client.get_job_status(job).is_terminal())
        outputs[verb] = client.get_job_logs(job)
        assert client.get_job_status(job) is JobStatus.SUCCEEDED, outputs[verb]
    assert f"{root}/exports/hf/step-10" in outputs["export"]
    assert open_catalog(f"{tmp_path}/first").export("hf", 10).step == 10
    assert open_catalog(f"{tmp_path}/second").export("hf", 10).step == 10
    assert "keep  step-10: every 10 steps" in outputs["purge"]
    assert f"{root}/exports/of-the-newest/step-40" in outputs["export "]
    names = {info.metadata["job_name"] for info in client.list_jobs() if info.metadata}
    assert any(name.startswith("manager of run-") for name in names)
