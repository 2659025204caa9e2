"""The Ray cluster that this process works on: reached, or said why not.

Knows what Ray raises where no cluster answers. Starts none.
"""

import logging
import os
import socket
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.core.errors import RayCkptError, TransientError, UsageError

_SAFE = "nothing was begun; every committed step is as it was"
_START = "ray start --head    (starts one here), or export RAY_ADDRESS=HEAD:6379"
_PATIENCE_S = 10.0


def connect(address: str) -> None:
    """From now on Ray works on the cluster there; no other one if it does on one already.

    What Ray and the tasks there say is not shown: for who waits for an answer.

    Raises:
        TransientError: no cluster answers.
        UsageError: it is the address of a dashboard.
    """
    _reach(address, log_to_driver=False, logging_level=logging.ERROR)


def connect_aloud(address: str) -> None:
    """The same, and what Ray and its workers say is in the log of this process: for a job."""
    _reach(address)


def _reach(address: str, **options: Any) -> None:
    if ray.is_initialized():
        return
    named = address if address != "auto" else os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(named)
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise _unreachable(named, error) from error


def _knock(named: str) -> None:
    """Nothing where somebody listens: Ray itself asks a dead address for two minutes."""
    host, _, port = named.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S):
            pass


def _unreachable(named: str, error: Exception) -> RayCkptError:
    if named.startswith(("http://", "https://")):
        return UsageError(
            "RAY_ADDRESS names a dashboard, which takes jobs alone",
            named,
            _SAFE,
            "ray-ckpt submit FILE --job NAME, or export RAY_ADDRESS=HEAD:6379",
        )
    is_up = f"is it up? ray status --address {named}; or " if named else ""
    return TransientError(
        f"no Ray cluster answers: {str(error).partition('. ')[0]}",
        named or "this machine; RAY_ADDRESS is not set",
        _SAFE,
        is_up + _START,
    )
