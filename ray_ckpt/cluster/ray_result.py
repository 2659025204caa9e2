"""What a task of Ray returned or raised."""

from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ckpt.core.errors import TransientError

T = TypeVar("T")


def result_of(task: "ray.ObjectRef[T]") -> T:
    """What the task returns; waits for it.

    Raises:
        Exception: what the task raised.
        TransientError: its node was lost, several times.
    """
    try:
        return ray.get(task)
    except RayTaskError as error:
        raise raised_in(error) from None
    except RayError as error:
        raise TransientError(f"a task or its node died: {error}", do="run it again") from error


def raised_in(error: RayTaskError) -> Exception:
    """What the task itself raised, where Ray could bring it here."""
    return error.cause if isinstance(error.cause, Exception) else error
