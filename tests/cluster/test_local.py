"""A Ray of this machine's own leaves every other Ray of it alone."""

import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S, wait_for

_ANOTHER = """
import ray
from ray_ckpt.cluster.local import embedded_ray
with embedded_ray("another", {}, on_poll=lambda: None):
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""
_SAY_WHERE = f"{sys.executable} -c \"import os; print(os.environ['RAY_ADDRESS'])\""


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_where_it_was_submitted_also_beside_a_newer_ray(ray_cluster: str) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(ray_cluster)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _ANOTHER], stdin=pipe, stdout=pipe) as another:
        assert another.stdout is not None
        address = another.stdout.readline().decode().strip()
        assert address not in ("", ray_cluster)
        job = client.submit_job(entrypoint=_SAY_WHERE)
        wait_for(lambda: client.get_job_status(job).is_terminal())
        another.communicate(b"\n", timeout=PATIENCE_S)
    assert client.get_job_logs(job).splitlines()[-1] == ray_cluster
