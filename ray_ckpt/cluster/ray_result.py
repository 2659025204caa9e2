"""Tasks that Ray may repeat when a node is lost: of what they return or raise."""

from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ckpt.core.errors import RayCkptError, TransientError

T = TypeVar("T")


def result_of(task: "ray.ObjectRef[T]") -> T:
    """What the task returns; waits for it.

    Raises:
        RayCkptError: what the task raised.
        TransientError: its node was lost, several times.
    """
    try:
        return ray.get(task)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RayCkptError) else error) from None
    except RayError as error:
        raise TransientError(f"a task or its node died: {error}", do="run it again") from error
