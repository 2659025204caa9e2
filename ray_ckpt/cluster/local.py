"""A Ray on this machine alone, and jobs submitted to it as to any other."""

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.job_config import JobConfig
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ckpt.cluster.nodes import IO_RESOURCE
from ray_ckpt.cluster.submit import JobFacts, submit_job
from ray_ckpt.core.errors import RayCkptError

_LOG_LINES = 25
_POLL_S = 0.3
_RAY_FOLDER = "RAY_TMPDIR"


class LocalJobs:
    """Submits `python -m ...` as Ray jobs and tells how they ended."""

    def __init__(
        self, dashboard: str, environment: Mapping[str, str], on_poll: Callable[[], None]
    ) -> None:
        self.dashboard = dashboard
        # `python` in a job is the one that runs here
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment = {**environment, "PATH": path}
        self._on_poll = on_poll
        self._client = JobSubmissionClient(dashboard)

    def submit(self, command: str, *, name: str) -> str:
        """Id of the job that runs `python -m command`; `name` is what the dashboard calls it."""
        return submit_job(
            self._client,
            f"python -m {command}",
            about=JobFacts(name=name),
            runtime_env={"env_vars": self._environment},
        )

    def is_over(self, job: str) -> bool:
        """Whether the job has ended, well or not."""
        return self._client.get_job_status(job).is_terminal()

    def output(self, job: str) -> str:
        """What the job printed.

        Raises:
            RayCkptError: it failed; the message holds what Ray says and the end of its log.
        """
        text = self._client.get_job_logs(job).strip()
        info = self._client.get_job_info(job)
        if info.status is not JobStatus.SUCCEEDED:
            tail = "\n".join(text.splitlines()[-_LOG_LINES:])
            raise RayCkptError(
                f"the job {job} failed: {info.message}\nthe end of its log:\n{tail}",
                safe="every committed step is safe",
            )
        return text

    def pause(self) -> None:
        """Time enough has passed for another look."""
        self._on_poll()
        time.sleep(_POLL_S)

    def wait(self, job: str) -> str:
        """What the job printed, once it is over."""
        while not self.is_over(job):
            self.pause()
        return self.output(job)


@contextlib.contextmanager
def embedded_ray(
    name: str, environment: Mapping[str, str], *, on_poll: Callable[[], None]
) -> Generator[LocalJobs]:
    """A Ray with a dashboard on 127.0.0.1, gone afterwards; `name` is what it calls this process.

    `on_poll` is called whenever a job is waited for; what it raises ends the waiting.

    Every port is a free one, so that it runs beside any other Ray of this machine: `ray.init` alone
    would give the agent that takes jobs a fixed port. Workers hold a CPU each and I/O tasks none,
    so four CPUs are claimed even on a smaller machine: two workers train while the rest goes on.
    """
    # no token file may be left behind that changes how another cluster of this user is reached
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with _folder_of_its_own(), _cluster() as cluster:
        context = ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            job_config=JobConfig(metadata={"job_name": name}),
        )
        yield LocalJobs(f"http://{context.dashboard_url}", environment, on_poll)


@contextlib.contextmanager
def _cluster() -> Generator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": max(4, os.cpu_count() or 1),
            "resources": {IO_RESOURCE: 2},
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": _free_port(),
            "dashboard_agent_listen_port": 0,
        },
    )
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def _folder_of_its_own() -> Generator[None]:
    """Ray's files of this cluster lie apart from those of any other Ray.

    One of them names the newest cluster there: it is where Ray runs a job, to whichever cluster it
    was submitted, and where a `ray.init` of this user goes.
    """
    before = os.environ.get(_RAY_FOLDER)
    os.environ[_RAY_FOLDER] = tempfile.mkdtemp(prefix="ray-")
    try:
        yield
    finally:
        os.environ.pop(_RAY_FOLDER)
        if before is not None:
            os.environ[_RAY_FOLDER] = before


def _free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
