"""Times several ways to do something, interleaved, so that a busy machine is unfair to none."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall and CPU seconds of one thing that was done several times."""

    what: str
    min_s: float
    median_s: float
    max_s: float
    cpu_s: float
    """The median, of this process and all its threads."""


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Each way once, then all once more, `repeats` times; a first round is not counted.

    `prepare` is called before each, and is not counted either.
    """
    wall_s: dict[str, list[float]] = {what: [] for what in ways}
    cpu_s: dict[str, list[float]] = {what: [] for what in ways}
    for number in range(repeats + 1):
        for what, act in ways.items():
            prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            act()
            if number > 0:
                wall_s[what].append(time.perf_counter() - wall)
                cpu_s[what].append(time.process_time() - cpu)
    return [
        Timing(
            what=what,
            min_s=min(wall_s[what]),
            median_s=statistics.median(wall_s[what]),
            max_s=max(wall_s[what]),
            cpu_s=statistics.median(cpu_s[what]),
        )
        for what in ways
    ]
