"""`ray-ckpt purge-hub`: old copies go from the Hub, only because a person asks for it."""

import time
import uuid
from typing import Any

import click

from ray_ckpt.cli.output import emit, human_bytes, json_option, print_table, root_argument
from ray_ckpt.core import copies as recorded
from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.copy_states import COPIED_AT
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.hub_purge import HubPurge, HubWish, Objects
from ray_ckpt.core.observation import Observation
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.hub.client import parse_hub
from ray_ckpt.storage.hub.purge import plan_purge_on_hub, purge_on_hub
from ray_ckpt.storage.lease import MANAGER, Lease

_SQUASH = (
    "--squash rewrites history for everybody: {what} keep their files and lose all commits before; "
    "whoever named one of those by its hash finds it no more, clones must be made anew, and nobody "
    "can undo it"
)


@click.command()
@root_argument
@click.argument("destination")
@click.option(
    "--keep-latest", type=click.IntRange(min=1),
    help="Keep the newest so many copies; the newest stays.",
)  # fmt: skip
@click.option(
    "--keep-every", type=click.IntRange(min=1),
    help="Keep every copy whose step is a multiple of this.",
)  # fmt: skip
@click.option("--squash", is_flag=True, help="Also rewrite history, without which little is freed.")
@click.option("--apply", is_flag=True, help="Do it. Without this nothing changes.")
@json_option
def purge_hub(
    root: str,
    destination: str,
    keep_latest: int | None,
    keep_every: int | None,
    squash: bool,
    apply: bool,
    as_json: bool,
) -> None:
    """Show which of ROOT's copies would go from hf://org/repo, and why; with --apply remove them.

    Pinned steps, the newest copy, what a branch or another name leads to, and tags that are not of
    this run always stay. Content goes for good once nothing names it: a branch names all that is in
    its history, so that most stays there until --squash takes the history away.

    Example: ray-ckpt purge-hub /runs/a hf://org/model --keep-latest 3 --squash
    """
    if not names.is_repository(destination):
        raise ConfigError(f"{destination} is not on the Hub", "DESTINATION", do="write hf://...")
    if keep_latest is None and keep_every is None:
        raise ConfigError("nothing says what is to stay", "--keep-latest", do="add --keep-latest 3")
    catalog = open_root(root)
    keep = KeepCopies(latest=keep_latest, every_steps=keep_every)
    if apply:
        planned, freed = _apply(catalog, destination, keep, squash)
    else:
        wish = _wish(catalog.observe(), destination, keep, squash=squash)
        planned = plan_purge_on_hub(destination, wish)
        freed = planned.freed
    document = _document(planned, freed, applied=apply)
    emit(document, as_json=as_json, render=lambda: _print(document))


def _wish(observed: Observation, destination: str, keep: KeepCopies, *, squash: bool) -> HubWish:
    repository, branch = parse_hub(destination)
    held = {
        view.step: f"pinned: {', '.join(pin.title for pin in view.pins)}"
        for view in observed.at(time.time()).checkpoints
        if view.pins
    }
    asked = (request for request in observed.requests if request.destination is not None)
    held |= {r.step: "a copy is asked for" for r in asked if _is_at(r.destination, repository)}
    there = (p for p in observed.policy.publish if p.repository == f"hf://{repository}")
    return HubWish(
        run_id=observed.run_id,
        branch=branch,
        policies=keep.policies(),
        held=held,
        pointers=frozenset(policy.promote for policy in there if policy.promote is not None),
        squash=squash,
    )


def _is_at(destination: str | None, repository: str) -> bool:
    return destination is not None and destination.partition("@")[0] == f"hf://{repository}"


def _apply(
    catalog: Catalog, destination: str, keep: KeepCopies, squash: bool
) -> tuple[HubPurge, Objects]:
    """As the root's manager, so that nothing is published meanwhile."""
    lease = Lease(catalog.store, MANAGER, owner=uuid.uuid4().hex)
    lease.acquire()
    try:
        observed = catalog.observe()
        wish = _wish(observed, destination, keep, squash=squash)
        done = purge_on_hub(catalog.store, destination, wish, guard=lease.check)
        _record(catalog, observed, destination, done[0])
    finally:
        lease.release()
    return done


def _record(catalog: Catalog, observed: Observation, destination: str, done: HubPurge) -> None:
    """Copies that went are not looked for again, nor made again by a policy."""
    repository, _ = parse_hub(destination)
    gone = {verdict.step for verdict in done.verdicts if not verdict.keep}
    now = time.time()
    for made in recorded.copies(observed):
        if made.action.step in gone and _is_at(made.action.destination, repository):
            retire = ActionRecord(action=recorded.retire_action(made.action)).started(now)
            result = {COPIED_AT: made.changed_at, "place": made.action.destination}
            catalog.records.write_action(retire.succeeded(result, now))


def _document(planned: HubPurge, freed: Objects, *, applied: bool) -> dict[str, Any]:
    squashed = [f"branch {planned.wish.branch}"] if planned.squashed_branch else []
    return {
        "applied": applied,
        "copies": [
            {
                "step": verdict.step,
                "keep": verdict.keep,
                "files": planned.copy(verdict.step).num_files,
                "bytes": planned.copy(verdict.step).size_bytes,
                "reasons": list(verdict.reasons) or [verdict.why_not],
            }
            for verdict in planned.verdicts
        ],
        "squashed": [*squashed, *(f"tag {tag}" for tag in planned.squashed_tags)],
        "objects": len(freed),
        "bytes_freed": sum(freed.values()),
        "held": planned.holding(),
    }


def _print(document: dict[str, Any]) -> None:
    rows = [
        (
            f"step-{row['step']}",
            "keep" if row["keep"] else "purge",
            f"{row['files']} files",
            human_bytes(row["bytes"]),
            "; ".join(row["reasons"]),
        )
        for row in document["copies"]
    ]
    print_table(("copy", "verdict", "files", "size", "reason"), rows)
    for reference, num_bytes in document["held"].items():
        click.echo(f"{reference} keeps {human_bytes(num_bytes)} of what goes in its history")
    if document["squashed"]:
        click.echo(_SQUASH.format(what=", ".join(document["squashed"])))
    num_tags = sum(not row["keep"] for row in document["copies"])
    what = f"{num_tags} copies, {document['objects']} large files, "
    what += human_bytes(document["bytes_freed"])
    if document["applied"]:
        click.echo(f"{what} were removed")
    else:
        click.echo(f"{what} would go for good; nothing was changed. Do it: the same with --apply")
