"""Submitting a Ray job under a name that the dashboard shows."""

import time
from collections.abc import Mapping
from typing import Any

from ray.job_submission import JobSubmissionClient

from ray_ckpt.core.errors import TransientError

_PATIENCE_S = 60.0
_NOT_YET = "No available agent"


def submit_job(
    client: JobSubmissionClient, entrypoint: str, *, name: str, runtime_env: Mapping[str, Any]
) -> str:
    """Id of the job. A cluster that has just started takes jobs a moment later: it is asked again.

    Raises:
        TransientError: it still takes none after a minute.
        RuntimeError: from Ray, for any other refusal.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env=dict(runtime_env),
                metadata={"job_name": name},
            )
        except RuntimeError as error:
            if _NOT_YET not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TransientError(
                    f"the cluster takes no job: {error}", client.get_address(), do="ray status"
                ) from error
        time.sleep(0.5)
