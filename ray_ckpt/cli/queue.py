"""Verbs about what is still to be done: drain."""

import sys
from typing import Any

import click

from ray_ckpt.cli.output import emit, json_option, open_root, root_argument
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import Observation


@click.command()
@root_argument
@click.option("--timeout", "timeout_s", type=float, help="Give up after so many seconds.")
@json_option
def drain(root: str, timeout_s: float | None, as_json: bool) -> None:
    """Finish everything that ROOT's policy and requests ask for, then return.

    Waits for the root's manager where one is alive, else does the work in this process. Interrupt
    it whenever you like: what is left stays asked for. Exit 1 if something has failed for good.
    """
    from ray_ckpt.cluster.drain import drain as work_off
    from ray_ckpt.cluster.executors import Threads

    catalog = open_root(root)
    observed = work_off(
        catalog, Threads(), timeout_s=timeout_s, told=lambda text: click.echo(text, err=True)
    )
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
    }


def _print(document: dict[str, Any], uri: str) -> None:
    for dead in document["dead"]:
        click.echo(f"{dead['title']} failed for good: {dead['error']}", err=True)
    click.echo(f"nothing is left to do: ray-ckpt ls {uri}")
