"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from ray_ckpt.cli.charts import lines, timeline
from ray_ckpt.cli.markup import Markup, join, tag
from ray_ckpt.cli.output import human_bytes
from ray_ckpt.cli.report_style import STYLE
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copies import copies
from ray_ckpt.core.events import Event
from ray_ckpt.core.garbage import duration
from ray_ckpt.core.observation import READABLE, CheckpointView, Observation
from ray_ckpt.core.report import Open, Rate, Report
from ray_ckpt.core.resume import why_unusable
from ray_ckpt.core.version import __version__

_NOTHING_RUNS = "default-src 'none'; style-src 'unsafe-inline'"
"""Should anything ever get past the escaping, the browser runs and loads none of it."""


_UNITS = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1.0, " B"))
_NEED = "open problems"


def page(report: Report, observed: Observation) -> str:
    """The whole document."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_RUNS}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{report.run_id}: checkpoints"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "main",
            _header(report),
            _tiles(report, observed),
            _open(report.open),
            _section("What happened when", _timeline(report)),
            _charts(report),
            _section("Checkpoints", _checkpoints(report, observed)),
            _section("How fast", _rates(report.rates)),
            _section("What was done", _actions(report.records)),
            _section("What went wrong", _events(report.faults)),
            _section("By whom", _doers(report)),
            _section("Every event", _events(report.events)),
            tag("footer", f"ray_ckpt {__version__}; all times are UTC"),
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(report: Report) -> Markup:
    told = [event.at for event in report.events]
    period = f"{_moment(told[0])} to {_moment(told[-1])}" if told else "no event was told yet"
    made = f"{datetime.fromtimestamp(report.made_at, UTC):%Y-%m-%d %H:%M:%S}"
    return tag(
        "header",
        tag("h1", report.run_id),
        tag("p", tag("code", report.root)),
        tag("p", f"{period}. As it was at {made}.", class_="muted"),
    )


def _tiles(report: Report, observed: Observation) -> Markup:
    here = [view for view in report.views if view.state in READABLE]
    good = [view.step for view in here if why_unusable(view) is None]
    size = sum(view.manifest.total_bytes for view in here if view.manifest)
    blocked = sum(value for _, value in report.saves["training stood still"])
    number = len(report.open)
    tiles = [
        ("newest good step", str(max(good)) if good else "none"),
        ("checkpoints here", f"{len(here)}, {human_bytes(size)}"),
        ("exports here", str(len(observed.exports))),
        ("copies elsewhere", str(len(copies(observed)))),
        ("training stood still", f"{blocked:.1f} s" if blocked < 600 else duration(blocked)),
        (_NEED, str(number) if number else "nothing"),
    ]
    told = [
        tag("div", tag("b", value), tag("span", name), class_=_tile_class(name, number))
        for name, value in tiles
    ]
    return tag("div", *told, class_="tiles")


def _tile_class(name: str, number: int) -> str:
    return "tile bad" if name == _NEED and number else "tile"


def _open(found: Sequence[Open]) -> Markup | None:
    if not found:
        return None
    cards = [
        tag(
            "div",
            tag("h3", one.title, " ", _badge(one.state)),
            tag("pre", one.message),
            tag("p", "Next: ", tag("code", one.do)),
            class_="card",
        )
        for one in found
    ]
    return _section("What needs somebody", join(*cards))


def _timeline(report: Report) -> Markup | None:
    return tag("div", timeline(report.marks), class_="scroll") if report.marks else None


def _charts(report: Report) -> Markup | None:
    charts = [
        _chart(name, lines({name: points})) for name, points in report.metrics.items() if points
    ]
    saves = {name: points for name, points in report.saves.items() if points}
    if saves:
        legend = [tag("span", name, class_=f"key c{n}") for n, name in enumerate(saves)]
        charts.append(_chart(join("seconds a save took ", *legend), lines(saves, unit=" s")))
    charts.extend(_size_chart(report.views))
    return _section("By step", tag("div", *charts, class_="charts")) if charts else None


def _size_chart(views: Sequence[CheckpointView]) -> Iterator[Markup]:
    """Nothing where all are of one size: the table says it."""
    sizes = {view.step: view.manifest.total_bytes for view in views if view.manifest}
    largest = max(sizes.values(), default=0)
    if largest > 1.01 * min(sizes.values(), default=0):
        scale, unit = next((s, unit) for s, unit in _UNITS if largest >= s)
        points = [(step, size / scale) for step, size in sorted(sizes.items())]
        yield _chart("size of a checkpoint", lines({"size": points}, unit=unit))


def _chart(title: str, chart: Markup) -> Markup:
    return tag("figure", tag("figcaption", title), chart)


def _checkpoints(report: Report, observed: Observation) -> Markup:
    columns = ("step", "state", "size", "committed", "metrics", "kept for", "exports", "copies", "")
    rows = [_checkpoint(view, observed, report) for view in reversed(report.views)]
    gone = ", ".join(map(str, report.gone))
    told = f"Of these steps nothing but events is left: {gone}" if gone else None
    return join(_table(columns, rows), tag("p", told, class_="muted note") if told else None)


def _checkpoint(
    view: CheckpointView, observed: Observation, report: Report
) -> Sequence[str | Markup]:
    manifest = view.manifest
    metrics = manifest.metrics.items() if manifest else ()
    exports = sorted(export.name for export in observed.exports if export.step == view.step)
    made = [record for record in copies(observed) if record.action.step == view.step]
    pins = [f"{pin.title}: {pin.reason}" for pin in view.pins if pin.holds(report.made_at)]
    return (
        str(view.step),
        _badge(str(view.state)),
        human_bytes(manifest.total_bytes) if manifest else "",
        _moment(manifest.created_at) if manifest else "",
        ", ".join(f"{name} {value:.5g}" for name, value in metrics),
        ", ".join(pins),
        ", ".join(exports),
        ", ".join(str(record.result.get("location", "")) for record in made),
        why_unusable(view) or "",
    )


def _rates(rates: Sequence[Rate]) -> Markup | None:
    rows = [
        (
            rate.what,
            str(rate.count),
            human_bytes(rate.total_bytes),
            f"{rate.median_s:.3g} s",
            f"{human_bytes(rate.bytes_per_s)}/s",
        )
        for rate in rates
    ]
    return _table(("what", "times", "bytes", "median", "rate"), rows) if rows else None


def _actions(records: Sequence[ActionRecord]) -> Markup | None:
    rows = [
        (
            _clock(record.changed_at),
            record.action.title,
            _badge(str(record.state)),
            str(record.attempts),
            f"{record.result['seconds']:.3g} s" if record.result.get("seconds") else "",
            record.asked_by or "",
            (record.error or "").partition("\n")[0],
        )
        for record in reversed(records)
    ]
    columns = ("last change", "what", "state", "attempts", "took", "asked by", "error")
    return _table(columns, rows) if rows else None


def _events(events: Sequence[Event]) -> Markup | None:
    columns = ("when", "who", "step", "what")
    rows = [
        (_moment(e.at), e.who, "" if e.step is None else str(e.step), e.text)
        for e in reversed(events)
    ]
    return _table(columns, rows) if rows else None


def _doers(report: Report) -> Markup | None:
    rows = [
        (who, ", ".join(f"{count} {what}" for what, count in done.items()))
        for who, done in report.doers.items()
    ]
    return _table(("who", "events that it told"), rows) if rows else None


_LONGEST = 15
"""Rows of a table that are seen from the beginning."""
_LONGEST_WORD = 32
"""Of a cell that is one line."""


def _section(title: str, inside: Markup | None) -> Markup | None:
    return None if inside is None else tag("section", tag("h2", title), inside)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """What no row fills is left out; what is long opens on demand."""
    used = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    head = tag("thead", tag("tr", *(tag("th", columns[n]) for n in used)))
    body = [tag("tr", *(_cell(row[n]) for n in used)) for row in rows]

    def part(shown: Sequence[Markup]) -> Markup:
        return tag("div", tag("table", head, tag("tbody", *shown)), class_="scroll")

    seen, rest = body[:_LONGEST], body[_LONGEST:]
    more = tag("details", tag("summary", f"{len(rest)} more"), part(rest)) if rest else None
    return join(part(seen), more)


def _cell(text: str) -> Markup:
    is_long = len(text) > _LONGEST_WORD and not isinstance(text, Markup)
    return tag("td", text, class_="long") if is_long else tag("td", text)


def _badge(state: str) -> Markup:
    return tag("span", state.replace("_", " "), class_=f"badge {state}")


def _moment(at: str) -> str:
    """A UTC time of an event or a manifest, to the second."""
    return at[:19].replace("T", " ")


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
