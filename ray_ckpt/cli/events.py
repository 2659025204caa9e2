"""`ray-ckpt events`: what happened to a run, and who did it."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict

import click

from ray_ckpt.cli.output import json_option, print_table, refuse_unknown, root_argument, say
from ray_ckpt.core.events import Event, utc
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.history import EventReader

FOLLOW_S = 2.0
_COLUMNS = ("at", "who", "what", "step", "text")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command()
@root_argument
@click.option("--step", type=int, help="Only what concerns this checkpoint.")
@click.option("--since", metavar="AGE", help="Only what is not older than this: 90s, 30m, 1h, 7d.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until interrupted.")
@json_option
def events(root: str, step: int | None, since: str | None, follow: bool, as_json: bool) -> None:
    """Tell what happened, oldest first; with --json one object a line.

    Example: ray-ckpt events /runs/a --since 1h --follow
    """
    oldest = "" if since is None else utc(max(0.0, time.time() - _age_s(since)))
    catalog = open_root(root)
    reader = EventReader(catalog.store, since=oldest)

    def show() -> bool:
        found = [event for event in reader.read() if step in (None, event.step)]
        if as_json or follow:
            _print_lines(found, as_json=as_json)
        elif found:
            print_table(_COLUMNS, [_row(event) for event in found])
        return bool(found)

    if not show():
        refuse_unknown(catalog, step)
        say("nothing was told here yet" if since is None else f"nothing was told within {since}")
    while follow:
        time.sleep(FOLLOW_S)
        show()


def _print_lines(found: Sequence[Event], *, as_json: bool) -> None:
    """What comes later cannot be aligned with what is printed already."""
    for event in found:
        click.echo(json.dumps(asdict(event)) if as_json else "\t".join(_row(event)))


def _row(event: Event) -> tuple[str, ...]:
    step = "-" if event.step is None else str(event.step)
    return (event.at, event.who, event.what, step, event.text)


def _age_s(text: str) -> float:
    """Seconds that `90s`, `30m`, `1h` or `7d` stand for."""
    match = re.fullmatch(r"([0-9]+)([smhd])", text)
    if match is None:
        raise click.BadParameter(
            f"{text!r} is no age: write 90s, 30m, 1h or 7d", param_hint="--since"
        )
    return float(match[1]) * _UNITS_S[match[2]]
