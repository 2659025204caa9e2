"""`ray-ckpt watch ROOT`: what happens to a run, while it happens. Needs no cluster.

on a terminal    a picture that is drawn anew at every look
in a pipe        a line for each thing that changes
--json           one object a look
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ray_ckpt.cli.interrupt import kept_interrupt
from ray_ckpt.cli.output import Number, human_bytes, json_option, root_argument
from ray_ckpt.core.beats import Watch
from ray_ckpt.core.copies import copies
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.reconcile import plan, seconds_of
from ray_ckpt.core.watching import Going, Scene, document, news, scene
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.beats import all_beats
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import MANAGER, TRAINER, holder_of

_STEPS_SHOWN = 10
_WAITING_SHOWN = 5
_Attempt: TypeAlias = tuple[str, float]
"""An action's key, and when the attempt began: no other attempt's speed counts."""
_STYLES = {"saving": "yellow", "committed": "cyan", "verified": "green", "trashed": "dim"}


@click.command()
@root_argument
@click.option("--once", is_flag=True, help="One look, and the end.")
@click.option(
    "--every", "every_s", type=Number(min=0.1), default=2.0, show_default=True,
    metavar="SECONDS", help="Between two looks.",
)  # fmt: skip
@json_option
def watch(root: str, once: bool, every_s: float, as_json: bool) -> None:
    """Show what happens to a run's checkpoints while it happens, until Ctrl-C.

    Example: ray-ckpt watch s3://bucket/run
    """
    catalog = open_root(root)
    if once:
        _show_once(catalog, as_json=as_json)
        return
    with contextlib.suppress(KeyboardInterrupt), kept_interrupt() as check:
        if sys.stdout.isatty() and not as_json:
            _draw(catalog, every_s, check)
        else:
            _tell(catalog, every_s, check, as_json=as_json)


class Looker:
    """Looks at one root again and again; remembers what tells speeds."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._observer = catalog.observer()
        self._watches: dict[_Attempt, Watch] = {}

    def look(self) -> Scene:
        """What is there now; reads what has changed since the last look."""
        now = time.time()
        observed = self._observer.observe(now=now).at(now)
        self._listen(observed)
        store = self._catalog.store
        trainer, manager = holder_of(store, TRAINER), holder_of(store, MANAGER)
        return scene(
            observed,
            plan(observed, now=now),
            {key: watch for (key, _), watch in self._watches.items()},
            trainer=f"process {trainer.pid} on {trainer.host}" if trainer else None,
            manager=f"process {manager.pid} on {manager.host}" if manager else None,
        )

    def _listen(self, observed: Observation) -> None:
        running = [r for r in observed.records.values() if r.state is ActionState.RUNNING]
        beats = all_beats(self._catalog.store) if running else {}
        now, heard = time.monotonic(), dict[_Attempt, Watch]()
        for record in running:
            beat = beats.get((record.action.key, record.attempts))
            attempt = record.action.key, record.changed_at
            if beat is not None and beat.attempt_started_at == record.changed_at:
                heard[attempt] = self._watches.get(attempt, Watch(begun_at=now)).after(beat, now)
        self._watches = heard


def _show_once(catalog: Catalog, *, as_json: bool) -> None:
    seen = Looker(catalog).look()
    if as_json:
        click.echo(json.dumps(document(seen), indent=2))
    elif sys.stdout.isatty():
        Console(highlight=False).print(picture(seen, catalog.uri, now=time.time()))
    else:
        for line in news(None, seen):
            click.echo(line)


def _looks(
    catalog: Catalog, every_s: float, check: Callable[[], None]
) -> Iterator[Scene | StorageError]:
    """One after the other; a store that does not answer now may do so at the next look."""
    looker = Looker(catalog)
    while True:
        check()
        try:
            yield looker.look()
        except StorageError as error:
            yield error
        time.sleep(every_s)


def _tell(catalog: Catalog, every_s: float, check: Callable[[], None], *, as_json: bool) -> None:
    before: Scene | None = None
    trouble = ""
    for seen in _looks(catalog, every_s, check):
        if isinstance(seen, StorageError):
            if seen.what != trouble:
                click.echo(f"no look at {catalog.uri}: {seen.what}; the next one may do", err=True)
            trouble = seen.what
            continue
        trouble = ""
        for line in [json.dumps(document(seen))] if as_json else news(before, seen):
            click.echo(line)
        before = seen


def _draw(catalog: Catalog, every_s: float, check: Callable[[], None]) -> None:
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        last: Scene | None = None
        for seen in _looks(catalog, every_s, check):
            if isinstance(seen, Scene):
                last = seen
                live.update(picture(seen, catalog.uri, now=time.time()), refresh=True)
            else:
                trouble = Text(f"no look just now: {seen.what}", style="red")
                parts = [picture(last, catalog.uri, now=time.time())] if last else []
                live.update(Group(*parts, trouble), refresh=True)


# ---- the picture ----


def picture(seen: Scene, uri: str, *, now: float) -> Group:
    """One look, as wide as the terminal."""
    parts: list[Table | Text] = [_head(seen, uri, now), _steps(seen, now)]
    if seen.going:
        parts.append(_running(seen.going))
    parts.extend(_waiting(seen))
    parts.extend(Text(f"dead     {r.action.title}: {r.error}", style="red") for r in seen.dead)
    parts.extend(Text(f"problem  {problem}", style="yellow") for problem in seen.problems)
    return Group(*parts)


def _head(seen: Scene, uri: str, now: float) -> Text:
    trainer = seen.trainer or "nobody saves here now"
    manager = seen.manager or f"none is alive; ray-ckpt drain {uri} does its work"
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    return Text(f"{uri}  {clock}\ntrainer  {trainer}\nmanager  {manager}")


def _steps(seen: Scene, now: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "state", "size", "age", "exports", "copies"):
        table.add_column(column, overflow="fold")
    places: dict[int, set[str]] = {}
    for record in copies(seen.observed):
        places.setdefault(record.action.step, set()).add(str(record.action.destination))
    views = seen.observed.checkpoints
    if len(views) > _STEPS_SHOWN:
        table.add_row("...", f"{len(views) - _STEPS_SHOWN} older ones")
    for view in views[-_STEPS_SHOWN:]:
        exports = sorted(e.name for e in seen.observed.exports if e.step == view.step)
        table.add_row(
            str(view.step),
            Text(str(view.state), style=_STYLES.get(str(view.state), "red")),
            human_bytes(view.manifest.total_bytes) if view.manifest else "-",
            _age(view, now),
            ", ".join(exports) or "-",
            ", ".join(sorted(places.get(view.step, ()))) or "-",
        )
    return table


def _age(view: CheckpointView, now: float) -> str:
    at = seconds_of(view.manifest.created_at) if view.manifest else None
    return "-" if at is None else duration(max(0.0, now - at))


def _running(going: tuple[Going, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    for each in going:
        bar = ProgressBar(total=100, completed=each.percent, width=20) if each.percent else ""
        share = "" if each.percent is None else f"{each.percent} %"
        speed = f"{human_bytes(each.bytes_per_s)}/s" if each.bytes_per_s else ""
        left = f"{duration(each.eta_s)} left" if each.eta_s is not None else ""
        table.add_row("running", each.title, each.doing or "begins", bar, share, speed, left)
    return table


def _waiting(seen: Scene) -> Iterator[Text]:
    for title, why in seen.waiting[:_WAITING_SHOWN]:
        yield Text(f"waiting  {title}: {why or 'begins next'}", style="dim")
    if len(seen.waiting) > _WAITING_SHOWN:
        more = len(seen.waiting) - _WAITING_SHOWN
        yield Text(f"waiting  {more} more: ray-ckpt plan ROOT", style="dim")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.0 d`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"
