"""The processes that train together, as far as saving and loading need them to agree."""

import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError

T = TypeVar("T")
_ANSWER_S = 5.0
"""How long a store that is likely to have hung may take to tell who is missing."""


def expect_one_process() -> None:
    """Torch's warning that one process saves or loads alone is not shown: it was asked for."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def causes(error: CheckpointException) -> dict[int, BaseException]:
    """What each rank that failed in a collective DCP call really raised."""
    return {rank: cause for rank, (cause, _) in error.failures.items()}


def ours(raised: Mapping[int, BaseException]) -> RayCkptError | None:
    """The first of our own errors among the ranks': it says more than torch's wrapping."""
    return next((cause for cause in raised.values() if isinstance(cause, RayCkptError)), None)


def sentence(raised: Mapping[int, BaseException]) -> str:
    """Which rank failed, and with what."""
    return ", ".join(f"rank {rank}: {cause!r}" for rank, cause in raised.items())


def raise_first(errors: list[Exception]) -> None:
    """Raises what went wrong here first, put off until the other ranks needed this one no more."""
    if errors:
        raise errors[0]


class Phase(IntEnum):
    """How far one rank has come in one save."""

    BEGUN = 0
    STAGED = 1
    PLANNED = 2
    WRITTEN = 3


_WHAT_NEXT = {
    Phase.BEGUN: "staging",
    Phase.STAGED: "planning",
    Phase.PLANNED: "writing",
    Phase.WRITTEN: "the commit",
}


class Ranks:
    """A gloo group of its own, so that a save in a thread never meets training's collectives."""

    def __init__(self, *, timeout_s: float | None = None) -> None:
        """Collective. Without `timeout_s` the ranks are as patient with each other as gloo is."""
        self.group: dist.ProcessGroup | None = None
        self.rank = 0
        self.size = 1
        self._timeout_s = timeout_s
        if dist.is_available() and dist.is_initialized():
            self.group = _new_group(timeout_s)
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()
        else:
            expect_one_process()

    def note(self, save: str, phase: Phase) -> None:
        """Left where the other ranks can find it should this one hang or die."""
        if self.group is not None:
            _notes().set(f"{save}/{self.rank}", str(int(phase)))

    def who_is_missing(self, save: str) -> str:
        """A sentence about the ranks that others wait for, and what they have not finished."""
        if self.group is None:
            return "no other rank takes part"
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(self._who_is_missing(save)))
        asking.daemon = True  # it hangs for as long as the process that holds the store does
        asking.start()
        asking.join(_ANSWER_S)
        unknown = "the process that holds the rendezvous store, mostly rank 0, does not answer"
        return said[0] if said else unknown

    def _who_is_missing(self, save: str) -> str:
        try:
            phases = {rank: _phase(save, rank) for rank in range(self.size)}
        except Exception as error:  # noqa: BLE001  the store died with the process that holds it
            return f"the rank that holds the rendezvous store is gone ({error})"
        furthest = max(phases.values())
        behind = {rank: phase for rank, phase in phases.items() if phase < furthest}
        if not behind:
            who = "another rank" if self.is_coordinator else "rank 0"
            return f"{who} did not answer, or had given up waiting, during {_WHAT_NEXT[furthest]}"
        return ", ".join(
            f"rank {rank} did not finish {_WHAT_NEXT[phase]}" for rank, phase in behind.items()
        )

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

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returned here; if it raised anywhere, that on every rank."""
        results: list[T] = []
        self.each(lambda: results.append(function()))
        return results[0]

    def each(self, function: Callable[[], T]) -> list[T]:
        """What it returned on every rank, in order of rank, on every rank; or what it raised."""
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = function()
        except Exception as raised:  # noqa: BLE001  every rank must hear of it, then it is raised
            outcome[1] = raised
        outcomes = self.gather(outcome)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank; the same answer on all."""
        return any(self.gather(value))

    def renew(self) -> None:
        """The ranks can talk again: one timeout breaks a gloo group for good. Collective."""
        self.close()
        if dist.is_available() and dist.is_initialized():
            self.group = _new_group(self._timeout_s)

    def close(self) -> None:
        """The group is gone; collective."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None


def _new_group(timeout_s: float | None) -> dist.ProcessGroup:
    # must not be made with a short timeout: a rank that is late would end the training of all
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
    if timeout_s is not None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return group


def _notes() -> dist.Store:
    # torch gives its rendezvous store to nobody by a public name
    return dist.PrefixStore("ray_ckpt", dist.distributed_c10d._get_default_store())


def _phase(save: str, rank: int) -> Phase:
    """The last phase the rank noted; a rank that noted none has only begun."""
    notes, key = _notes(), f"{save}/{rank}"
    return Phase(int(notes.get(key))) if notes.check([key]) else Phase.BEGUN
