"""A cluster's jobs, as somebody sees them who is not on the cluster: reached, followed, ended.

Knows Ray's Jobs API and what its errors mean. Knows no job of ours.
"""

import asyncio
import time
from collections.abc import Callable

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_ckpt.core.errors import AuthorizationError, TransientError

_LOOK_AGAIN_S = 1.0
_PATIENCE_S = 60.0
_FAILED = 1


def reach_jobs(address: str | None) -> JobSubmissionClient:
    """The Jobs API at `address`; None is where Ray's own commands look: RAY_ADDRESS, this machine.

    Raises:
        TransientError: nobody answers there.
        AuthorizationError: the cluster wants another token, or one at all.
    """
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise AuthorizationError(
            f"the cluster does not know this user: {str(error).splitlines()[0]}",
            address or "",
            "nothing was submitted",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...    (on the head: ray get-auth-token)",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TransientError(
            f"no Ray dashboard answers: {str(error).splitlines()[0]}",
            address or "RAY_ADDRESS, or a Ray of this machine",
            "nothing was submitted",
            "give --address http://HEAD:8265; is it up? ray status",
        ) from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """The job's exit code once it has ended; `write` gets its log as it grows.

    What its process ended with; 1 where it was stopped or never began.

    Raises:
        TransientError: the cluster does not answer for a minute; the job may go on all the same.
    """
    written, lost_at = 0, None
    while True:
        try:
            written = asyncio.run(_tail(client, job, written, write))
            info = client.get_job_info(job)
            lost_at = None
        except (ConnectionError, RuntimeError, OSError, ClientError) as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE_S:
                raise _lost(client, job, error) from error
            time.sleep(_LOOK_AGAIN_S)
            continue
        if info.status is JobStatus.SUCCEEDED:
            return 0
        if info.status.is_terminal():
            return info.driver_exit_code or _FAILED
        time.sleep(_LOOK_AGAIN_S)


async def _tail(
    client: JobSubmissionClient, job: str, written: int, write: Callable[[str], None]
) -> int:
    """How much of the log is written; a log that is followed anew begins at its first line."""
    seen = 0
    async for chunk in client.tail_job_logs(job):
        seen += len(chunk)
        if seen > written:
            write(chunk[len(chunk) - (seen - written) :])
            written = seen
    return written


def _lost(client: JobSubmissionClient, job: str, error: Exception) -> TransientError:
    return TransientError(
        f"the cluster does not answer any more: {error}",
        client.get_address(),
        f"{job} may go on all the same; every committed step is safe",
        f"ray job status {job}",
    )
