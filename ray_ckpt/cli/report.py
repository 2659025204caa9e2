"""`ray-ckpt report`: the story of a run as one HTML file."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ray_ckpt.cli.output import emit, human_bytes, json_option, root_argument
from ray_ckpt.cli.report_page import page
from ray_ckpt.core import names
from ray_ckpt.core.events import Event
from ray_ckpt.core.report import make_report
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.disk.posix import translated
from ray_ckpt.storage.history import EventReader
from ray_ckpt.storage.secrets import without_secrets


@click.command()
@root_argument
@click.option(
    "-o", "output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Where to; by default <run>.html in this folder. What is there is replaced.",
)  # fmt: skip
@json_option
def report(root: str, output: Path | None, as_json: bool) -> None:
    """Write one HTML file about ROOT that opens anywhere, without a network.

    It shows what happened when and by whom, every checkpoint, metrics and times by step, rates, and
    every failure with its message and the next command.

    Example: ray-ckpt report s3://bucket/run -o run.html
    """
    catalog = open_root(root)
    observed = catalog.observe()
    events = [_seen(event) for event in EventReader(catalog.store).read()]
    made = make_report(catalog.uri, observed, events, now=time.time())
    path = output or Path(f"{names.run_name(catalog.uri)}.html")
    text = page(made, observed).encode()
    with translated(path):
        path.write_bytes(text)
    document: dict[str, Any] = {
        "path": str(path),
        "bytes": len(text),
        "checkpoints": len(made.views),
        "events": len(made.events),
        "faults": len(made.faults),
        "open": len(made.open),
    }
    said = f"{path}: {len(made.views)} checkpoints, {len(made.events)} events, "
    said += f"{len(made.faults)} faults; {human_bytes(len(text))}"
    emit(document, as_json=as_json, render=lambda: click.echo(said))


def _seen(event: Event) -> Event:
    """As anybody may read it; records are written so."""
    return replace(event, text=without_secrets(event.text))
