"""Where the manager of a root is found, and the one place where it becomes an actor.

One detached actor a root, named after it, in the namespace `ray_ckpt`. It outlives the job that
started it, and Ray restarts it when it dies. It is started from a job of its own where a dashboard
answers: Ray shows an actor's tasks under the job that created it, and marks them failed when that
job ends.
"""

import logging
import shlex
import sys
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from ray_ckpt.cluster.manager import Manager
from ray_ckpt.cluster.submit import JobFacts, submit_job
from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.names import manager_name, run_name
from ray_ckpt.storage.backends import open_catalog

log = logging.getLogger("ray_ckpt")
NAMESPACE = "ray_ckpt"
_START_TIMEOUT_S = 60.0


def find_manager(root: str) -> Any | None:
    """Handle of the root's manager on the connected cluster, or None."""
    try:
        return ray.get_actor(manager_name(open_catalog(root).uri), namespace=NAMESPACE)
    except ValueError:
        return None


def manager_status(root: str) -> dict[str, Any]:
    """The manager's own words; nothing while there is none, or while it restarts."""
    manager = find_manager(root)
    if manager is None:
        return {}
    try:
        return ray.get(manager.status.remote(), timeout=10)
    except RayError:
        return {}


def start_manager(root: str, *, interval_s: float = 2.0) -> Any:
    """Handle of the root's manager, started from this process if there is none."""
    uri = open_catalog(root).uri
    options = ray.remote(Manager).options(
        name=manager_name(uri),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=3,
        num_cpus=0,
        # the dashboard's task table is for actions, not for every report and every look
        enable_task_events=False,
    )
    return options.remote(uri, interval_s)


def start_manager_job(root: str) -> Any:
    """Handle of the root's manager, started from a Ray job of its own if there is none.

    Without a dashboard there are no jobs: then it is started from this process.

    Raises:
        TransientError: the job ran and no manager came up.
    """
    found = find_manager(root)
    if found is not None:
        return found
    uri = open_catalog(root).uri
    try:
        # must be the connected cluster: "auto" may find another one on this machine
        client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        job = submit_job(
            client,
            shlex.join([sys.executable, "-m", "ray_ckpt.cluster.connect", uri]),
            about=JobFacts(name=f"manager of {run_name(uri)}", root=uri),
            runtime_env=_runtime_env(),
        )
    except (ConnectionError, RuntimeError) as error:
        log.info("no dashboard to submit a job to, starting the manager from here: %s", error)
        return start_manager(uri)
    return _wait_for_manager(uri, client, job)


def _wait_for_manager(uri: str, client: JobSubmissionClient, job: str) -> Any:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        found = find_manager(uri)
        if found is not None:
            return found
        time.sleep(0.2)
    raise TransientError(
        f"no manager within {_START_TIMEOUT_S:.0f} s; its job is {client.get_job_status(job)}",
        uri,
        "no checkpoint depends on the manager; saving and loading go on without it",
        f"ray job logs {job}",
    )


def _runtime_env() -> dict[str, Any]:
    """What this job was submitted with, so that the manager sees the same code."""
    inherited = dict(ray.get_runtime_context().runtime_env)
    kept = ("working_dir", "py_modules", "pip", "uv", "conda", "env_vars")
    return {key: value for key, value in inherited.items() if key in kept}


def main() -> None:
    """What the manager's own job runs: `python -m ray_ckpt.cluster.connect ROOT`."""
    ray.init(address="auto", namespace=NAMESPACE)
    handle = start_manager(sys.argv[1])
    ray.get(handle.status.remote())


if __name__ == "__main__":
    main()
