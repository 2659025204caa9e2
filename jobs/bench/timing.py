"""Does several things in turn, so that a busy machine is unfair to none, and times them."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

K = TypeVar("K")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall and CPU seconds of one thing that was done several times."""

    what: str
    min_s: float
    median_s: float
    max_s: float
    cpu_s: float
    """The median, of this process with all its threads, and of processes it has waited for."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one time."""

    wall_s: float
    cpu_s: float


def stopwatch() -> Callable[[], Taken]:
    """Whatever has been taken since now, each time it is asked."""
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    return lambda: Taken(time.perf_counter() - wall_s, _cpu_s() - cpu_s)


def in_turn(ways: Mapping[K, Callable[[], R]], repeats: int) -> dict[K, list[R]]:
    """What each way returned, `repeats` times: each once, then all once more.

    A first round is not counted.
    """
    returned: dict[K, list[R]] = {key: [] for key in ways}
    for number in range(repeats + 1):
        for key, act in ways.items():
            result = act()
            if number > 0:
                returned[key].append(result)
    return returned


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """The times of each way, in turn; `prepare` is called before each, and is not counted."""
    taken = in_turn({what: partial(_taken, act, prepare) for what, act in ways.items()}, repeats)
    return [timing_of(what, each) for what, each in taken.items()]


def timing_of(what: str, taken: Sequence[Taken]) -> Timing:
    """All times of one thing."""
    return Timing(
        what=what,
        min_s=min(one.wall_s for one in taken),
        median_s=statistics.median(one.wall_s for one in taken),
        max_s=max(one.wall_s for one in taken),
        cpu_s=statistics.median(one.cpu_s for one in taken),
    )


def _taken(act: Callable[[], object], prepare: Callable[[], object]) -> Taken:
    prepare()
    gc.collect()
    gc.freeze()  # nobody is to look through what the others have left
    taken = stopwatch()
    act()
    return taken()


def _cpu_s() -> float:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
