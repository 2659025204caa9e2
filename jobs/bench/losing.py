"""What a save costs training: the same steps with a save in the middle of them, and without.

A save that runs beside training takes cores, memory and locks from it, as training does from the
save: what counts is how much later the steps are done, and how soon the step is safe, not how soon
the call has returned.
"""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from jobs.bench.at import At
from jobs.bench.ranks import DEVICE, on_ranks
from jobs.bench.rows import OURS
from jobs.bench.timing import Timing, interleaved, stopwatch
from jobs.bench.trained import Trained

ALONE = "training alone"
_TRAINS_S_PER_GB = 4.0
"""Of the state, in each measurement. A save that takes longer loses more than is shown."""
_STEPS_AT_LEAST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Losing(Timing):
    """Some seconds of training, with one save or without."""

    durable_s: float
    """The median until the step is safe, beside training; 0 where nothing is saved."""
    loses_s: float
    """The median less the one without a save."""


def measure_losses(at: At, *, size_mb: int, repeats: int) -> list[Losing]:
    """Rank 0's times; the state has about `size_mb` megabytes on all ranks together."""
    return on_ranks(partial(_losses, size_mb, repeats, at.root), below=at.folder, device=DEVICE)


def _losses(size_mb: int, repeats: int, root: str, _: Path) -> list[Losing]:
    with (
        Trained(size_mb, f"{root}/thread", mode="async") as trained,
        Trained(size_mb, f"{root}/process", mode="process") as other,
    ):
        num_steps = _steps_of(trained, _TRAINS_S_PER_GB * size_mb / 1000)
        begins: dict[str, tuple[Trained, Callable[[], Callable[[], object]]]] = {
            ALONE: (trained, lambda: _nothing),
            f"{OURS}, async": (trained, trained.begin_save),
            f"{OURS}, process": (other, other.begin_save),
            "dcp.async_save, thread": (trained, trained.begin_save_with_dcp),
            "dcp.async_save, process": (
                trained,
                partial(trained.begin_save_with_dcp, AsyncCheckpointerType.PROCESS),
            ),
        }
        durable_s: defaultdict[str, list[float]] = defaultdict(list)
        waiting: list[threading.Thread] = []

        def prepare() -> None:
            while waiting:
                waiting.pop().join()
            trained.clear()
            other.clear()

        def train(what: str, who: Trained, begin: Callable[[], Callable[[], object]]) -> None:
            began = time.perf_counter()
            wait = begin()

            def note() -> None:
                wait()
                durable_s[what].append(time.perf_counter() - began)

            waiting.append(threading.Thread(target=note))
            waiting[-1].start()
            for _ in range(num_steps):
                who.train()
            dist.barrier()

        ways = {what: partial(train, what, *way) for what, way in begins.items()}
        timings = interleaved(ways, repeats, prepare=prepare)
        prepare()
    medians = {what: statistics.median(each[-repeats:]) for what, each in durable_s.items()}
    alone_s = next(timing.median_s for timing in timings if timing.what == ALONE)
    return [
        Losing(
            **asdict(timing),
            durable_s=0.0 if timing.what == ALONE else medians[timing.what],
            loses_s=timing.median_s - alone_s,
        )
        for timing in timings
    ]


def _nothing() -> None:
    """Is to be waited for."""


def _steps_of(trained: Trained, trains_s: float) -> int:
    """How many steps take about so long."""
    trained.train()
    taken = stopwatch()
    trained.train()
    told = [max(_STEPS_AT_LEAST, round(trains_s / taken().wall_s))]
    dist.broadcast_object_list(told, src=0)
    return told[0]
