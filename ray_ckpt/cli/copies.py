"""The verb that looks at copies again: records say that they were made, not what became of them."""

from typing import Any

import click

from ray_ckpt.cli.output import (
    emit,
    json_option,
    print_table,
    refuse_unknown,
    root_argument,
    say,
)
from ray_ckpt.core import copies as recorded
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_states import CopyState
from ray_ckpt.core.errors import StorageError
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.copies.copy_look import Made, look_at_copy


@click.command()
@root_argument
@click.option("--step", type=int, help="Only copies of this checkpoint; without it all.")
@json_option
def copies(root: str, step: int | None, as_json: bool) -> None:
    """Look at every copy again, where it lies: each byte, or what the Hub's tag leads to.

    Exit 1 if one is stale, gone, or cannot be looked at. Nothing is changed.

    Example: ray-ckpt copies s3://bucket/run --step 500
    """
    catalog = open_root(root)
    refuse_unknown(catalog, step)
    found = sorted(recorded.copies(catalog.observe()), key=lambda record: record.action.step)
    rows = [_row(catalog.uri, record) for record in found if step in (None, record.action.step)]
    columns = ("what", "state", "why", "do")
    emit(
        rows,
        as_json=as_json,
        render=lambda: print_table(columns, [[row[c] or "-" for c in columns] for row in rows]),
    )
    if not rows:
        say("no copy was made")
    if any(row["state"] != CopyState.PRESENT for row in rows):
        raise click.exceptions.Exit(1)


def _row(root: str, record: ActionRecord) -> dict[str, Any]:
    action = record.action
    row: dict[str, Any] = {"what": action.title, "step": action.step, "at": action.destination}
    try:
        made = Made(content_id=str(record.result.get("content_id")))
        look = look_at_copy(action, made, verify="digests")
    except StorageError as error:
        return {**row, "state": "unknown", "why": error.what, "do": error.do}
    return {**row, "state": str(look.state), "why": look.why, "do": _cure(root, record, look.state)}


def _cure(root: str, record: ActionRecord, state: CopyState) -> str:
    """What makes a copy anew; what somebody has altered is theirs to remove."""
    action = record.action
    what = f"--name {action.export.name}" if action.export else "--checkpoint"
    again = f"ray-ckpt publish {root} --step {action.step} {what} --to {action.destination}"
    if state is CopyState.PRESENT:
        return ""
    return again if state is CopyState.GONE else f"look at it and remove it there; then {again}"
