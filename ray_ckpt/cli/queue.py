"""Verbs about what is still to be done: drain, retry, cancel."""

import sys
import time
from typing import Any, Literal

import click

from ray_ckpt.cli.output import Number, emit, json_option, refuse_unknown, root_argument, say
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.gathering import hosts_needed
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState
from ray_ckpt.core.observation import Command, Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import MANAGER, holder_of
from ray_ckpt.storage.records import who_asks


@click.command()
@root_argument
@click.option("--timeout", "timeout_s", type=Number(min=0), help="Give up after so many seconds.")
@json_option
def drain(root: str, timeout_s: float | None, as_json: bool) -> None:
    """Finish everything that ROOT's policy and requests ask for, then return.

    Waits for the root's manager where one is alive, else does the work in this process. Interrupt
    it whenever you like: what is left stays asked for. Exit 1 if something has failed for good.

    Example: ray-ckpt drain /runs/a --timeout 600
    """
    from ray_ckpt.cluster.drain import drain as work_off
    from ray_ckpt.cluster.executors import Threads

    catalog = open_root(root)
    observed = work_off(catalog, Threads(), timeout_s=timeout_s, told=say)
    document = _document(observed)
    emit(document, as_json=as_json, render=lambda: _print(document, catalog.uri))
    sys.exit(1 if document["dead"] else 0)


def _document(observed: Observation) -> dict[str, Any]:
    records = sorted(observed.records.values(), key=lambda record: record.changed_at)
    return {
        "succeeded": [r.action.title for r in records if r.state is ActionState.SUCCEEDED],
        "dead": [
            {"title": record.action.title, "error": record.error}
            for record in records
            if record.state is ActionState.DEAD
        ],
        "elsewhere": {str(step): hosts for step, hosts in hosts_needed(observed).items()},
    }


def _print(document: dict[str, Any], uri: str) -> None:
    for dead in document["dead"]:
        click.echo(f"{dead['title']} failed for good: {dead['error']}", err=True)
    for step, hosts in document["elsewhere"].items():
        where = ", ".join(hosts)
        click.echo(f"step-{step} is on {where}: type this there too: ray-ckpt drain {uri}")
    here = " here" if document["elsewhere"] else ""
    click.echo(f"nothing is left to do{here}: ray-ckpt ls {uri}")


_KIND = click.option(
    "--kind",
    type=click.Choice([str(kind) for kind in ActionKind]),
    help="Only actions of one kind.",
)
_OF_STEP = click.option("--step", type=int, help="Only actions about this checkpoint.")


@click.command()
@root_argument
@_OF_STEP
@_KIND
@json_option
def retry(root: str, step: int | None, kind: str | None, as_json: bool) -> None:
    """Give actions that failed, were cancelled or wait for another try a fresh start, now.

    Example: ray-ckpt retry /runs/a --kind export
    """
    catalog = open_root(root)
    refuse_unknown(catalog, step)
    waiting = (ActionState.RETRY_WAIT, ActionState.BLOCKED)
    records = catalog.records.actions().values()
    chosen = [
        record.action
        for record in records
        if record.state in (*GIVEN_UP, *waiting) and _is_meant(record.action, step, kind)
    ]
    _command(catalog, "retry", chosen, as_json=as_json)


@click.command()
@root_argument
@_OF_STEP
@_KIND
@json_option
def cancel(root: str, step: int | None, kind: str | None, as_json: bool) -> None:
    """Give up actions that have not ended; one that runs is stopped. `retry` brings them back.

    A checkpoint whose required copy was cancelled stays: purge never takes it.

    Example: ray-ckpt cancel /runs/a --step 500 --kind publish
    """
    if step is None and kind is None:
        raise UsageError("cancel what?", "", "nothing was cancelled", "give --step, --kind or both")
    catalog = open_root(root)
    refuse_unknown(catalog, step)
    now = time.time()
    observed = catalog.observe().at(now)
    open_records = [
        record.action
        for record in observed.records.values()
        if record.state is not ActionState.SUCCEEDED and record.state not in GIVEN_UP
    ]
    known = {a.key: a for a in (*plan(observed, now=now).actions, *open_records)}
    chosen = [action for action in known.values() if _is_meant(action, step, kind)]
    _command(catalog, "cancel", chosen, as_json=as_json)


def _is_meant(action: Action, step: int | None, kind: str | None) -> bool:
    return step in (None, action.step) and kind in (None, str(action.kind))


def _command(
    catalog: Catalog, verb: Literal["retry", "cancel"], actions: list[Action], *, as_json: bool
) -> None:
    """Written down for whoever manages the root, now or next."""
    for action in actions:
        catalog.records.add_command(Command(verb=verb, action=action, by=who_asks()))
    manager = holder_of(catalog.store, MANAGER)
    document = {
        "verb": verb,
        "actions": [action.title for action in actions],
        "manager": manager.host if manager else None,
    }

    def render() -> None:
        for action in actions:
            click.echo(f"{verb}: {action.title}")
        if not actions:
            click.echo(f"nothing to {verb}: ray-ckpt ls {catalog.uri}")
        elif manager is None:
            click.echo(f"no manager is alive to do it; do it here: ray-ckpt drain {catalog.uri}")

    emit(document, as_json=as_json, render=render)
