"""`ray-ckpt du`: who takes the room of a root, and what gives it back."""

import time
from collections.abc import Sequence
from typing import Any

import click

from ray_ckpt.cli.output import emit, human_bytes, json_option, print_table, root_argument
from ray_ckpt.core.garbage import duration
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.usage import Kind, Split
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.garbage import find_garbage
from ray_ckpt.storage.usage import Usage, measure

_PARTS = ("model", "optimizer", "rest")


@click.command()
@root_argument
@json_option
def du(root: str, as_json: bool) -> None:
    """Show who takes the room of ROOT, the largest first, and what would give it back.

    Checkpoints are told apart into model, optimizer and the rest. Copies elsewhere are listed as
    they were recorded, and not part of any sum. Nothing is changed.

    Example: ray-ckpt du s3://bucket/run
    """
    catalog = open_root(root)
    observed = catalog.observe().at(time.time())
    found = measure(catalog, observed)
    document = {
        "root": catalog.uri,
        "bytes": found.total_bytes,
        "free_bytes": found.free_bytes,
        "groups": _groups(found),
        "items": _items(found),
        "elsewhere": [
            {"what": copy.title, "where": copy.location, "bytes": copy.size_bytes}
            for copy in found.elsewhere
        ],
        "could_go": _could_go(catalog, observed, found),
    }
    emit(document, as_json=as_json, render=lambda: _print(document))


def _groups(found: Usage) -> list[dict[str, Any]]:
    """One row a kind, the largest first; checkpoints once more by what they hold."""
    kinds = {kind: found.of(kind) for kind in Kind}
    sizes = {kind: sum(use.size_bytes for use in uses) for kind, uses in kinds.items()}
    rows: list[dict[str, Any]] = []
    for kind in sorted(kinds, key=lambda kind: -sizes[kind]):
        if kinds[kind]:
            row = {"what": str(kind), "count": len(kinds[kind]), "bytes": sizes[kind]}
            parts = sum(found.splits.values(), Split()) if kind is Kind.CHECKPOINT else None
            rows.append(row if parts is None else {**row, **_parts(parts)})
    return rows


def _items(found: Usage) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for use in found.uses:
        owner = use.owner
        row = {
            "what": str(owner.kind),
            "name": owner.name,
            "step": owner.step,
            "bytes": use.size_bytes,
            "files": use.num_files,
        }
        parts = found.splits.get(owner.step or 0) if owner.kind is Kind.CHECKPOINT else None
        rows.append(row if parts is None else {**row, **_parts(parts)})
    return rows


def _parts(parts: Split) -> dict[str, int]:
    return {"model": parts.model, "optimizer": parts.optimizer, "rest": parts.rest}


def _could_go(catalog: Catalog, observed: Observation, found: Usage) -> list[dict[str, Any]]:
    """What gives room back, and the command that does it."""
    from ray_ckpt.cluster.purge import plan_purge

    garbage = find_garbage(catalog, observed, now=time.time())
    planned = plan_purge(catalog, None)
    grace = duration(observed.policy.keep.trash_grace_s)
    quarantined = found.of(Kind.QUARANTINE)
    rows = [
        {
            "what": "what nobody needs any more",
            "count": len(garbage),
            "bytes": sum(one.size_bytes for one in garbage),
            "do": f"ray-ckpt gc {catalog.uri} --apply",
        },
        {
            "what": f"checkpoints that the run's policy lets go; from the trash after {grace}",
            "count": len(planned.doomed),
            "bytes": sum(planned.sizes[step] for step in planned.doomed),
            "do": f"ray-ckpt purge {catalog.uri} --apply",
        },
        {
            "what": "damaged checkpoints, once somebody has looked at them",
            "count": len(quarantined),
            "bytes": sum(use.size_bytes for use in quarantined),
            "do": f"ray-ckpt ls {catalog.uri}, then remove the folders in .ray_ckpt/quarantine",
        },
    ]
    return [row for row in rows if row["count"]]


def _print(document: dict[str, Any]) -> None:
    total = document["bytes"]
    groups = [line for row in document["groups"] for line in _group(row, total)]
    print_table(("what", "count", "size", "share"), groups)
    click.echo()
    print_table(("what", "name", "size", *_PARTS), [_item(row) for row in document["items"]])
    if document["elsewhere"]:
        click.echo()
        print_table(
            ("copied elsewhere", "to", "size"),
            [(row["what"], row["where"], _size(row["bytes"])) for row in document["elsewhere"]],
        )
    click.echo()
    free = document["free_bytes"]
    left = "" if free is None else f", {human_bytes(free)} are free"
    click.echo(f"{human_bytes(total)} at {document['root']}{left}")
    for row in document["could_go"]:
        size = human_bytes(row["bytes"])
        click.echo(f"{size} could go: {row['what']} ({row['count']}). Do it: {row['do']}")


def _group(row: dict[str, Any], total: int) -> list[Sequence[str]]:
    parts = [(f"{row['what']}: {key}", row[key]) for key in _PARTS if key in row]
    rows = [(row["what"], str(row["count"]), row["bytes"]), *((what, "-", n) for what, n in parts)]
    return [(what, count, human_bytes(n), _share(n, total)) for what, count, n in rows]


def _share(size_bytes: int, total: int) -> str:
    return f"{100 * size_bytes / total:.0f} %" if total else "-"


def _item(row: dict[str, Any]) -> Sequence[str]:
    parts = [_size(row.get(key)) for key in _PARTS]
    return (row["what"], row["name"], human_bytes(row["bytes"]), *parts)


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else human_bytes(size_bytes)
