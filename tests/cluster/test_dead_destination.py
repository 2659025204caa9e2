"""A place for copies that is down during a whole training run: training does not hear of it."""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ckpt.cluster.connect import find_manager, manager_status
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.storage.backends import open_catalog
from tests.processes import run_python
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]
STEPS = 6
CONFIG = """
num_workers = 1
batch_size = 4
[model]
dim = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_dim = 64
max_seq_len = 64
[data]
max_bytes = 100000
seq_len = 32
[save]
every_steps = 2
[[lifecycle.export]]
name = "hf"
every_steps = 2
"""
Train = Callable[..., list[tuple[int, float]]]


@pytest.fixture
def dead(s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """The server that `s3_root` lies on, as long as it answers 500 to everything."""
    with S3Proxy(s3_server) as proxy:
        proxy.fail(match="", status=500, code="InternalError")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.url)
        yield proxy


@pytest.fixture
def train(tmp_path: Path, ray_cluster: str, dead: S3Proxy) -> Iterator[Train]:
    """Runs the training job to its end, well; returns its losses, step by step."""
    roots: list[str] = []
    client = JobSubmissionClient(ray_cluster)
    (tmp_path / "train.toml").write_text(CONFIG)

    def run(root: str, *more: str) -> list[tuple[int, float]]:
        roots.append(root)
        words = [f"root={root}", f"steps={STEPS}", *more]
        command = [sys.executable, "-m", "jobs.train", "--config", str(tmp_path / "train.toml")]
        environment = {**dead.endpoint.environment(), "AWS_MAX_ATTEMPTS": "1"}
        job = client.submit_job(
            entrypoint=shlex.join([*command, *words]), runtime_env={"env_vars": environment}
        )
        wait_for(lambda: client.get_job_status(job).is_terminal())
        assert client.get_job_status(job) is JobStatus.SUCCEEDED, client.get_job_logs(job)
        return wait_for(lambda: _losses(root))

    yield run
    for root in roots:
        manager = find_manager(root)
        if manager is not None:
            ray.kill(manager)


def _losses(root: str) -> list[tuple[int, float]] | None:
    """Once all of them are there: workers do not wait for who listens."""
    losses = manager_status(root).get("losses", [])
    return losses if len(losses) == STEPS else None


def copies(root: str, state: ActionState) -> dict[str, ActionRecord]:
    """By place, of the newest step."""
    return {
        str(record.action.destination): record
        for record in open_catalog(root).records.actions().values()
        if record.action.kind is ActionKind.PUBLISH
        if record.state is state and record.action.step == STEPS
    }


def test_training_is_the_same_bit_for_bit_and_the_copies_are_made_once_the_place_is_back(
    tmp_path: Path, s3_root: str, dead: S3Proxy, train: Train
) -> None:
    """Scenario 41: required copies wait as patiently as others."""
    places = {f"{s3_root}/required": "true", f"{s3_root}/other": "false"}
    publish = ", ".join(
        f'{{export = "hf", to = "{place}", required = {required}, when_behind = "newest"}}'
        for place, required in places.items()
    )
    root = str(tmp_path / "run")
    losses = train(root, f"lifecycle.publish=[{publish}]")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))

    failing = wait_for(
        lambda: f if (f := copies(root, ActionState.RETRY_WAIT)).keys() == places.keys() else None
    )
    for place, record in failing.items():
        assert record.error_class is ErrorClass.TRANSIENT
        assert "InternalError" in (record.error or "")
        assert f"where: {place}" in (record.error or "")
        assert "run the same command again" in (record.error or "")
    assert dead.requests

    dead.recover()
    said: list[str] = []

    def all_are_told_of() -> bool:
        """Who tries at this very moment does not wait, and is told of if that fails as well."""
        said.append(run_python("-m", "ray_ckpt", "retry", root, environment={}).stdout)
        told = {p for p in places if f"retry: publish step-{STEPS} hf to {p}\n" in "".join(said)}
        return told | copies(root, ActionState.SUCCEEDED).keys() == places.keys()

    wait_for(all_are_told_of)
    wait_for(lambda: copies(root, ActionState.SUCCEEDED).keys() == places.keys())
    for place in places:
        exported = open_catalog(root).export("hf", STEPS).manifest
        assert open_catalog(place).export("hf", STEPS).manifest == exported

    assert train(str(tmp_path / "alone")) == losses
