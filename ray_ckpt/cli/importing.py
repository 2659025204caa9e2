"""`ray-ckpt import`: a Hugging Face folder becomes step 0 of a root."""

from typing import Any

import click

from ray_ckpt.cli.output import complete_folder, emit, human_bytes, json_option, root_argument
from ray_ckpt.core import names
from ray_ckpt.storage.backends import open_catalog


@click.command("import")
@click.argument("folder", shell_complete=complete_folder)
@root_argument
@click.option("--family", help="Its names: llama, qwen3, ...; by default what config.json says.")
@json_option
def import_(folder: str, root: str, family: str | None, as_json: bool) -> None:
    """Make a checkpoint of a Hugging Face FOLDER: step 0 of ROOT, under native names.

    Runs of any size start from it: FromWeights(path="ROOT/step-0"). No model is built, and none is
    held in memory. FOLDER is a path, s3://bucket/prefix or hf://org/repo[@revision], as
    save_pretrained wrote it.

    Example: ray-ckpt import /models/Llama-3.1-8B /runs/base
    """
    from ray_ckpt.tensors.importing import import_folder

    catalog = open_catalog(root)
    made = import_folder(catalog, folder, family=family)
    path = f"{catalog.uri}/{names.step_dir(made.step)}"
    family = made.model.family if made.model else None
    document: dict[str, Any] = {
        "path": path,
        "family": family,
        "bytes": made.total_bytes,
        "tensors": len(made.tensors),
    }
    size = human_bytes(made.total_bytes)
    text = f"{path}: {len(made.tensors)} tensors of a {family} model, {size}"
    emit(document, as_json=as_json, render=lambda: click.echo(text))
