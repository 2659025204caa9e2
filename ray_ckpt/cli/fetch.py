"""`ray-ckpt fetch`: a checkpoint or an export from anywhere becomes a local folder."""

from pathlib import Path

import click

from ray_ckpt.cli.output import complete_folder, emit, human_bytes, json_option
from ray_ckpt.storage.copies.fetch import fetch as fetch_folder


@click.command()
@click.argument("source", shell_complete=complete_folder)
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def fetch(source: str, folder: Path, as_json: bool) -> None:
    """Bring a step or an export from SOURCE to FOLDER, which must not be there: all or nothing.

    SOURCE is hf://org/repo[@revision], s3://bucket/run/exports/hf/step-5, or a path. Every file is
    proven. A run that is killed goes on from the files that have arrived.

    Example: ray-ckpt fetch hf://org/model@step-500 /models/mine
    """
    fetch_folder(source, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size_bytes = sum(path.stat().st_size for path in files)
    document = {"path": str(folder), "files": len(files), "bytes": size_bytes}
    text = f"{folder}: {len(files)} files, {human_bytes(size_bytes)}"
    emit(document, as_json=as_json, render=lambda: click.echo(text))
