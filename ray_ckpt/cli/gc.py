"""What nobody needs any more: shown, and removed where that is asked for."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import click

from ray_ckpt.cli.output import emit, human_bytes, json_option, print_table, root_argument
from ray_ckpt.core.errors import LeaseHeldError
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.garbage import Garbage, find_garbage, remove_garbage
from ray_ckpt.storage.lease import MANAGER, Lease


@click.command()
@root_argument
@click.option("--apply", is_flag=True, help="Remove it. Without this nothing changes.")
@json_option
def gc(root: str, apply: bool, as_json: bool) -> None:
    """Show what nobody needs any more, where, and why; with --apply remove it.

    That is what dead attempts left (staging, unfinished uploads, heartbeats, scratch folders of
    this host), trash whose grace time is over, and records of checkpoints that are nowhere. A
    manager does it by itself every few minutes. Exit 1 if something could not be removed.

    Example: ray-ckpt gc /runs/a --apply
    """
    catalog = open_root(root)
    manager: str | None = None
    failed: Sequence[tuple[Garbage, str]] = []
    try:
        found, failed = _remove(catalog) if apply else (_find(catalog), [])
    except LeaseHeldError as error:
        found, manager = _find(catalog), error.what
    is_applied = apply and manager is None
    document: dict[str, Any] = {
        "applied": is_applied,
        "manager": manager,
        "garbage": [_row(garbage, dict(failed).get(garbage)) for garbage in found],
    }
    emit(document, as_json=as_json, render=lambda: _print(document, catalog.uri))
    if failed:
        raise click.exceptions.Exit(1)


def _find(catalog: Catalog) -> list[Garbage]:
    return find_garbage(catalog, catalog.observe(), now=time.time())


def _remove(catalog: Catalog) -> tuple[list[Garbage], list[tuple[Garbage, str]]]:
    """What was there once nobody else could change it, and what of it could not be removed."""
    lease = Lease(catalog.store, MANAGER, owner=uuid.uuid4().hex)
    lease.acquire()
    try:
        found = _find(catalog)
        return found, remove_garbage(found, guard=lease.check)
    finally:
        lease.release()


def _row(garbage: Garbage, error: str | None) -> dict[str, Any]:
    return {
        "what": garbage.what,
        "where": garbage.where,
        "bytes": garbage.size_bytes,
        "why": garbage.why,
        "error": error,
    }


def _print(document: dict[str, Any], uri: str) -> None:
    rows = [
        (row["what"], row["where"], human_bytes(row["bytes"]), row["why"])
        for row in document["garbage"]
    ]
    print_table(("what", "where", "size", "why"), rows)
    for row in document["garbage"]:
        if row["error"]:
            click.echo(f"{row['where']} could not be removed: {row['error']}", err=True)
    size = human_bytes(sum(row["bytes"] for row in document["garbage"] if not row["error"]))
    if not rows:
        click.echo("nothing is here that nobody needs")
    elif document["applied"]:
        click.echo(f"{size} were removed")
    elif document["manager"]:
        click.echo(f"nothing was removed: {document['manager']}, and does it by itself")
    else:
        click.echo(f"{size} could go; nothing was changed. Do it: ray-ckpt gc {uri} --apply")
