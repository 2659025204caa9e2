"""Whether saves and loads are still as far ahead of DCP's own as they were: ratios, never times.

The fastest of several turns is compared with the other's fastest, on a small state and with a
generous margin: a busy machine must not fail it, a save that does its work twice must.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.bench.at import At
from jobs.bench.rows import OURS, Compared
from jobs.bench.save import measure_async_saves, measure_loads, measure_saves

Measure = Callable[..., Sequence[Compared]]
LEAST: dict[Measure, dict[str, tuple[str, float]]] = {
    measure_saves: {OURS: ("dcp.save", 0.5)},
    measure_async_saves: {
        f"{OURS}: stands still": ("dcp.async_save: stands still", 0.7),
        f"{OURS}: until durable": ("dcp.async_save: until durable", 0.5),
    },
    measure_loads: {
        f"{OURS}: warm": ("dcp.load: warm", 0.5),
        f"{OURS}: cold": ("dcp.load: cold", 0.5),
    },
}
"""For each of our rows the other's, and how many times faster than it ours must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One thing that must not become slow."""

    what: str
    other: str
    min_s: float
    other_min_s: float
    ratio: float
    """Of the other's fastest to ours."""
    least: float
    """What it must be."""


def check(at: At, *, size_mb: int, repeats: int) -> list[Checked]:
    """One row for each; see `too_slow`."""
    return [
        row
        for measure, expected in LEAST.items()
        for row in _checked(measure(at, size_mb=size_mb, repeats=repeats), expected)
    ]


def too_slow(rows: Sequence[Checked]) -> list[str]:
    """A sentence about each row that is not as fast as it must be."""
    return [
        f"{row.what}: {row.ratio:.2f} times as fast as {row.other}, at least {row.least} expected"
        for row in rows
        if row.ratio < row.least
    ]


def _checked(rows: Sequence[Compared], expected: dict[str, tuple[str, float]]) -> list[Checked]:
    fastest = {row.what: row.min_s for row in rows}
    return [
        Checked(
            what=own,
            other=other,
            min_s=fastest[own],
            other_min_s=fastest[other],
            ratio=fastest[other] / fastest[own],
            least=least,
        )
        for own, (other, least) in expected.items()
    ]
