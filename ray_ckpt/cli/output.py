"""How answers look: a table on a terminal, tab-separated lines in a pipe, JSON where asked for."""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copies import present_copies
from ray_ckpt.core.copy_states import losses
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.resume import why_unusable
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.beats import all_beats
from ray_ckpt.storage.catalog import Catalog


def complete_folder(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Lets the shell complete a path; what is no path it leaves alone."""
    del ctx, param
    return [CompletionItem(incomplete, type="dir")]


class Number(click.FloatRange):
    """A number that can be counted with: `nan` is below and above nothing, and passes any range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As it is."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


root_argument = click.argument("root", shell_complete=complete_folder)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
step_option = click.option("--step", type=int, required=True, help="Which checkpoint.")


def refuse_unknown(catalog: Catalog, step: int | None) -> None:
    """Nothing, if no step is named, or the root holds or remembers it.

    Raises:
        StepNotFoundError: most likely it is misspelt; names the steps that are there.
    """
    if step is None:
        return
    observed = catalog.observe()
    known = {view.step for view in observed.checkpoints}
    known |= {record.action.step for record in observed.records.values()}
    if step not in known:
        raise step_errors.not_readable(catalog.uri, step, observed)


def emit(document: Any, *, as_json: bool, render: Callable[[], None]) -> None:
    """`document` as one JSON text, or whatever `render` prints."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        render()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned under headings for a person; tab-separated without headings in a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def step_rows(observed: Observation) -> list[dict[str, Any]]:
    """What `ls` says of each step: the command line's contract."""
    lost = lost_copies(observed.records)
    return [
        {
            "step": view.step,
            "state": str(view.state),
            "bytes": view.manifest.total_bytes if view.manifest else None,
            "committed_at": view.manifest.created_at if view.manifest else None,
            "pins": [pin.title for pin in view.pins if pin.holds(time.time())],
            "exports": sorted(e.name for e in observed.exports if e.step == view.step),
            "copies": sorted(_copies(observed, view.step)),
            "lost_copies": lost.get(view.step, []),
            "note": why_unusable(view),
        }
        for view in observed.checkpoints
    ]


def print_steps(observed: Observation) -> None:
    """The table of `ls`."""
    columns = ("step", "state", "size", "committed", "pins", "exports", "copies", "note")
    rows = [
        (
            str(row["step"]),
            row["state"],
            "-" if row["bytes"] is None else human_bytes(row["bytes"]),
            row["committed_at"] or "-",
            ", ".join(row["pins"]) or "-",
            ", ".join(row["exports"]) or "-",
            ", ".join((*row["copies"], *map(_lost, row["lost_copies"]))) or "-",
            row["note"] or "-",
        )
        for row in step_rows(observed)
    ]
    print_table(columns, rows)


def how_far(catalog: Catalog, observed: Observation) -> dict[str, str]:
    """By action's key, what runs and how far it is: `reads step-30 63 %`; one look at its beats."""
    records = [r for r in observed.records.values() if r.state is ActionState.RUNNING]
    beats = all_beats(catalog.store) if records else {}
    found: dict[str, str] = {}
    for record in records:
        beat = beats.get((record.action.key, record.attempts))
        if beat is not None and beat.attempt_started_at == record.changed_at:
            share = "" if beat.percent is None else f" {beat.percent} %"
            found[record.action.key] = f"{beat.doing}{share}"
    return found


def say(text: str) -> None:
    """Told at once, beside what a verb is asked for."""
    click.echo(text, err=True)


def human_bytes(count: float) -> str:
    """A size in decimal units, as disks are sold: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def lost_copies(records: Mapping[str, ActionRecord]) -> dict[int, list[dict[str, str]]]:
    """By step, the copies that the manager has found to be gone, or others than they were."""
    found: dict[int, list[dict[str, str]]] = defaultdict(list)
    for key, loss in losses(records).items():
        location = str(records[key].result.get("location"))
        lost = {"location": location, "state": str(loss.state), "why": loss.why}
        found[records[key].action.step].append(lost)
    return found


def _lost(copy: dict[str, str]) -> str:
    return f"{copy['location']} ({copy['state']})"


def _copies(observed: Observation, step: int) -> set[str]:
    return {
        str(record.result["location"])
        for record in present_copies(observed)
        if record.action.step == step and "location" in record.result
    }
