"""What Ray Train itself has kept of a run becomes checkpoints with a life, by jobs of a cluster."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.storage.backends import open_catalog
from tests.roots import flip_byte, snapshot
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Train reads deprecated settings of Ray Data in the process that calls fit
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = (20, 40)


def train_as_others_do(_: dict[str, Any]) -> None:
    import ray.train
    import torch
    import torch.distributed.checkpoint as dcp

    for step in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            dcp.save({"weight": torch.full((64, 64), float(step))}, checkpoint_id=folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"loss": 1.0 / step, "step": step}, checkpoint=checkpoint)


def run_job(address: str, entrypoint: str) -> tuple[JobStatus, str]:
    client = JobSubmissionClient(address)
    job = client.submit_job(entrypoint=f"{sys.executable} -m {entrypoint}")
    wait_for(lambda: client.get_job_status(job).is_terminal())
    return client.get_job_status(job), client.get_job_logs(job)


def test_a_run_of_ray_train_is_adopted_and_verified_by_jobs(
    tmp_path: Path, ray_cluster: str
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_as_others_do,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.1}),
        run_config=RunConfig(name="old", storage_path=str(tmp_path)),
    ).fit()
    root = str(tmp_path / "old")
    before = snapshot(root)
    status, said = run_job(ray_cluster, f"jobs.backfill root={root} folders='checkpoint_*'")
    assert status is JobStatus.SUCCEEDED, said
    assert "step-20: adopted, verified" in said
    assert "step-40: adopted, verified" in said
    assert {name: data for name, data in snapshot(root).items() if name in before} == before
    states = {view.step: view.state for view in open_catalog(root).observe().checkpoints}
    assert states == dict.fromkeys(STEPS, CheckpointState.VERIFIED)

    status, said = run_job(ray_cluster, f"jobs.verify root={root}")
    assert status is JobStatus.SUCCEEDED, said
    assert "verified step-20" in said
    flip_byte(Path(root, "step-40", "__0_0.distcp"))
    status, said = run_job(ray_cluster, f"jobs.verify root={root}")
    assert status is JobStatus.FAILED, said
    assert "corrupt step-40" in said
    assert "1 damaged; nothing was changed" in said
    assert open_catalog(root).is_in_place(40)
