"""Pictures of a report, as SVG that stands in the page: what happened when, and values by step."""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

from ray_ckpt.cli.markup import Markup, join, tag
from ray_ckpt.core.report import Lane, Mark, Series

_Scale: TypeAlias = Callable[[float], float]
"""Where on the picture a value lies."""
_WIDTH, _LEFT, _LANE = 1040, 84, 34
_CHART_WIDTH, _CHART_HEIGHT = 500, 190
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 56, 16, 14, 28
_TICKS_S = (
    *(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200),
    *(86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000),
)
_MAX_DOTS = 80
_SHORTEST = 5.0
"""What would be narrower is a dot."""


def timeline(marks: Sequence[Mark]) -> Markup:
    """A lane a kind, time from left to right in UTC; what took long is a bar."""
    begin, end = min(m.begin for m in marks), max(m.end for m in marks)
    pad = max((end - begin) * 0.02, 0.5)
    begin, end = begin - pad, end + pad
    height = _LANE * len(Lane)

    def x(at: float) -> float:
        return _LEFT + (at - begin) / (end - begin) * (_WIDTH - _LEFT - 8)

    faults = [mark for mark in marks if mark.lane is Lane.FAULT]
    return tag(
        "svg",
        *(_lane(index, lane) for index, lane in enumerate(Lane)),
        *_time_axis(begin, end, x, height),
        *(_line(x(m.begin), 0, x(m.begin), height, "faultline") for m in faults),
        *(_mark(mark, x) for mark in marks),
        viewBox=f"0 0 {_WIDTH} {height + 44}",
        role="img",
        aria_label="what happened when",
    )


def _lane(index: int, lane: Lane) -> Markup:
    middle = (index + 0.5) * _LANE
    return join(
        _line(_LEFT, middle, _WIDTH, middle, "lane"),
        _text(_LEFT - 14, middle + 4, str(lane), "end"),
    )


def _mark(mark: Mark, x: _Scale) -> Markup:
    middle = (list(Lane).index(mark.lane) + 0.5) * _LANE
    left, right = x(mark.begin), x(mark.end)
    title = tag("title", f"{_clock(mark.end)}  {mark.title}")
    kind = f"mark {mark.lane}"
    if mark.lane is Lane.FAULT:
        points = f"{left:.1f},{middle - 6:.1f} {left + 6:.1f},{middle:.1f} "
        points += f"{left:.1f},{middle + 6:.1f} {left - 6:.1f},{middle:.1f}"
        return tag("polygon", title, points=points, class_=kind)
    if right - left < _SHORTEST:
        return tag("circle", title, cx=right, cy=middle, r=4.0, class_=kind)
    box = {"x": left, "y": middle - 6, "width": right - left, "height": 12.0, "rx": 3.0}
    return tag("rect", title, class_=kind, **box)


def _time_axis(begin: float, end: float, x: _Scale, height: float) -> list[Markup]:
    step = next((s for s in _TICKS_S if (end - begin) / s <= 8), _TICKS_S[-1])
    ticks = range(math.ceil(begin / step), math.floor(end / step) + 1)
    found: list[Markup] = []
    day = ""
    for at in (number * step for number in ticks):
        moment = datetime.fromtimestamp(at, UTC)
        clock = f"{moment:%H:%M:%S}" if step < 60 else f"{moment:%H:%M}"
        today = f"{moment:%d %b %Y}"
        found.append(_line(x(at), 0, x(at), height, "grid"))
        found.append(_text(x(at), height + 18, clock if step < 86400 else today, "middle"))
        if step < 86400 and today != day:
            found.append(_text(x(at), height + 34, today, "middle"))
        day = today
    return found


def lines(series: Series, *, unit: str = "") -> Markup:
    """Finite values by step, one line a name; there is at least one value."""
    points = [point for line in series.values() for point in line]
    low_x, high_x = min(step for step, _ in points), max(step for step, _ in points)
    low_x, high_x = (low_x, high_x) if low_x < high_x else (low_x - 1, high_x + 1)
    ticks = _ticks([value for _, value in points])
    width = _CHART_WIDTH - _MARGIN_LEFT - _MARGIN_RIGHT
    height = _CHART_HEIGHT - _MARGIN_TOP - _MARGIN_BOTTOM

    def x(step: float) -> float:
        return _MARGIN_LEFT + (step - low_x) / (high_x - low_x) * width

    def y(value: float) -> float:
        return _MARGIN_TOP + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * height

    right = _CHART_WIDTH - _MARGIN_RIGHT
    grid = [
        join(
            _line(_MARGIN_LEFT, y(tick), right, y(tick), "grid"),
            _text(_MARGIN_LEFT - 8, y(tick) + 4, f"{tick:.4g}{unit}", "end"),
        )
        for tick in ticks
    ]
    steps = sorted({step for step, _ in points})
    shown = [steps[0]] if len(steps) == 1 else [steps[0], steps[-1]]
    below = [_text(x(s), _CHART_HEIGHT - 8, f"step {s}", _anchor(s, shown)) for s in shown]
    return tag(
        "svg",
        *grid,
        *below,
        *(_curve(name, n, line, x, y) for n, (name, line) in enumerate(series.items())),
        viewBox=f"0 0 {_CHART_WIDTH} {_CHART_HEIGHT}",
        role="img",
        aria_label=", ".join(series),
    )


def _curve(
    name: str, number: int, line: Sequence[tuple[int, float]], x: _Scale, y: _Scale
) -> Markup:
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
    told = [
        tag("circle", tag("title", f"{name}, step {s}: {v:.6g}"), cx=x(s), cy=y(v), r=2.6)
        for s, v in line
    ]
    curve = tag("polyline", points=path)
    return tag("g", curve, *(told if len(told) <= _MAX_DOTS else ()), class_=f"curve c{number}")


def _anchor(step: int, shown: Sequence[int]) -> str:
    if len(shown) == 1:
        return "middle"
    return "start" if step == shown[0] else "end"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Around all of them, and never empty; from 0 on where that is not far."""
    low, high = min(values), max(values)
    if 0 < low < high / 2 or low == high > 0:
        low = 0.0
    return (low, high) if low < high else (low - 1, high + 1)


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers around all of the values."""
    low, high = _span(values)
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((s * power for s in (1, 2, 2.5, 5) if s * power >= rough), 10 * power)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"


def _line(left: float, top: float, right: float, bottom: float, kind: str) -> Markup:
    return tag("line", x1=left, y1=top, x2=right, y2=bottom, class_=kind)


def _text(left: float, top: float, text: str, anchor: str) -> Markup:
    return tag("text", text, x=left, y=top, text_anchor=anchor)
