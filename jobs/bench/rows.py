"""How what was done in several ways is told: ours beside the best of the others, and the limit."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from jobs.bench.timing import Timing, interleaved

OURS = "ray_ckpt"
LIMIT = "a socket to nobody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One way to send or fetch one thing."""

    what: str
    way: str
    min_s: float
    median_s: float
    max_s: float
    cpu_s: float
    """The median, of the client alone."""
    mb_per_s: float
    ratio: float
    """Of the best peer's median to this one's: above 1 is faster than all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(Timing):
    """One way to do a thing that this machine limits."""

    times_limit: float | None
    """Of the limit's median: 1 is as fast as the machine; None where no limit was measured."""
    ratio: float
    """Of the other's median to this one's: above 1 is faster than it."""


def compared(timings: Sequence[Timing], *, limit: str, peer: str) -> list[Compared]:
    """The same times, each with its distance to these two; the peer, by its name, is among them."""
    medians = {timing.what: timing.median_s for timing in timings}
    return [
        Compared(
            **asdict(timing),
            times_limit=timing.median_s / medians[limit] if limit in medians else None,
            ratio=medians[peer] / timing.median_s,
        )
        for timing in timings
    ]


def rows_of(
    what: str,
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    size_bytes: int,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> list[Sent]:
    """One row for each way; `prepare` is called before each time, and is not counted."""
    timings = interleaved(ways, repeats, prepare=prepare)
    peers = [t.median_s for t in timings if t.what not in (LIMIT, OURS)]
    best_s = min(peers, default=statistics.median(t.median_s for t in timings))
    return [_row(what, timing, size_bytes, best_s) for timing in timings]


def _row(what: str, timing: Timing, size_bytes: int, best_s: float) -> Sent:
    return Sent(
        what=what,
        way=timing.what,
        min_s=timing.min_s,
        median_s=timing.median_s,
        max_s=timing.max_s,
        cpu_s=timing.cpu_s,
        mb_per_s=size_bytes / 1e6 / timing.median_s,
        ratio=best_s / timing.median_s,
    )
