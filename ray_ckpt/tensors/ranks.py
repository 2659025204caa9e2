"""The processes that train together, as far as saving and loading need them to agree."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError

T = TypeVar("T")


def expect_one_process() -> None:
    """Torch's warning that one process saves or loads alone is not shown: it was asked for."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def causes(error: CheckpointException) -> dict[int, BaseException]:
    """What each rank that failed in a collective DCP call really raised."""
    return {rank: cause for rank, (cause, _) in error.failures.items()}


def ours(error: CheckpointException) -> RayCkptError | None:
    """The first of our own errors among the ranks': it says more than torch's wrapping."""
    return next((c for c in causes(error).values() if isinstance(c, RayCkptError)), None)


def sentence(error: CheckpointException) -> str:
    """Which rank failed, and with what."""
    return ", ".join(f"rank {rank}: {cause!r}" for rank, cause in causes(error).items())


class Ranks:
    """A gloo group of its own, so that a save in a thread never meets training's collectives."""

    def __init__(self, *, timeout_s: float) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank = 0
        self.size = 1
        if dist.is_available() and dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self.group = cast(dist.ProcessGroup, group)
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()
        else:
            expect_one_process()

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0, which alone speaks, commits and holds the lease."""
        return self.rank == 0

    def on_coordinator(self, function: Callable[[], T]) -> T:
        """What `function` returned on rank 0, on every rank; or what it raised there."""
        if self.group is None:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_coordinator:
            try:
                outcome[0] = function()
            except Exception as error:  # noqa: BLE001  every rank must hear of it, then it is raised
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def close(self) -> None:
        """The group is gone; collective."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None
