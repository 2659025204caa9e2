"""Submitting a Ray job under a name that the dashboard shows."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobSubmissionClient

from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.names import run_name
from ray_ckpt.storage.secrets import without_secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the page of a job says of it, under *User-provided metadata*."""

    name: str
    root: str | None = None
    """Where the run keeps its checkpoints."""
    newest: str | None = None
    """Its newest checkpoint when the job was submitted: Ray changes none of this later."""

    def metadata(self) -> dict[str, str]:
        """As Ray wants it; without what may be secret."""
        told = {"job_name": self.name}
        if self.root is not None:
            told |= {"run": run_name(self.root), "root": without_secrets(self.root)}
        if self.newest is not None:
            told["newest"] = self.newest
        return told


_PATIENCE_S = 60.0
_NOT_YET = "No available agent"


def submit_job(
    client: JobSubmissionClient, entrypoint: str, *, about: JobFacts, runtime_env: Mapping[str, Any]
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
                metadata=about.metadata(),
            )
        except RuntimeError as error:
            if _NOT_YET not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TransientError(
                    f"the cluster takes no job: {error}", client.get_address(), do="ray status"
                ) from error
        time.sleep(0.5)
