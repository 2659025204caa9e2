"""`ray-ckpt backfill`: a folder of old checkpoints gets all that new ones have."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_ckpt.cli.act import hf_assets_in
from ray_ckpt.cli.export import EXPORT_NAMES, Size, flavors_of, perform
from ray_ckpt.cli.output import emit, human_bytes, json_option, print_table, root_argument, say
from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_root

if TYPE_CHECKING:
    from ray_ckpt.cluster.backfill import Filled, Hands


@click.command()
@root_argument
@click.option(
    "--folders", metavar="PATTERN",
    help="Folders with other names that are steps too, as in 'checkpoint_*'; step-N leads to them.",
)  # fmt: skip
@click.option(
    "--again", is_flag=True,
    help="Also folders that were taken before and whose step was purged since.",
)  # fmt: skip
@click.option("--family", help="The model's family, for exports: torchtitan_llama3, qwen3, ...")
@click.option(
    "--hf-assets", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with config.json and the tokenizer, copied beside each adopted step.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(list(EXPORT_NAMES)), help="Also export every step, cast to this.",
)  # fmt: skip
@click.option("--name", help="Folder under exports/; by default form and dtype: hf-bf16.")
@click.option(
    "--as", "forms", multiple=True, metavar="CONVERTER=FLAVOR",
    help="In which form a converter is exported, as in lora=peft. Repeatable.",
)  # fmt: skip
@click.option(
    "--every", type=click.IntRange(min=1), default=1, help="Export multiples of it alone."
)
@click.option("--to", "destination", help="Also publish them: /path, s3://..., hf://org/repo.")
@click.option(
    "--rate", type=Size(), metavar="SIZE",
    help="Checkpoint bytes a second at most, on average: 200MB.",
)  # fmt: skip
@json_option
def backfill(
    root: str,
    folders: str | None,
    again: bool,
    family: str | None,
    hf_assets: Path | None,
    dtype: Dtype | None,
    name: str | None,
    forms: tuple[str, ...],
    every: int,
    destination: str | None,
    rate: int | None,
    as_json: bool,
) -> None:
    """Adopt, verify, export and publish every checkpoint that lies in ROOT, the oldest first.

    ROOT holds step-N folders of TorchTitan, Ray Train or plain DCP, or of ray_ckpt; with --folders
    also others, like checkpoint_000010, whose step is in the name or in Ray Train's own list. Type
    it again after a kill: what is done is not done again, and what was purged since stays purged.
    One that cannot be done is named, and the next one comes. Exit 1 if there was one.

    Example: ray-ckpt backfill /old/run --family qwen3 --hf-assets ./Qwen3-8B --dtype bfloat16
    """
    from ray_ckpt.cluster.backfill import Backfill, backfill
    from ray_ckpt.storage.foreign_folders import strange_folders

    if dtype is None and (destination or name or forms):
        raise ConfigError("no export is asked for", "--dtype", do="add --dtype bfloat16")
    flavors = flavors_of(forms)
    spec = None
    if dtype is not None:
        title = name or "-".join((*flavors.values(), EXPORT_NAMES[dtype]))
        spec = ExportSpec(name=title, dtype=dtype, flavors=flavors)
    catalog = open_root(root)
    asked = Backfill(
        folders=folders,
        again=again,
        family=family,
        assets=hf_assets_in(hf_assets),
        export=spec,
        destination=destination,
        every_steps=every,
        bytes_per_s=rate,
    )
    done = list(_told(backfill(catalog, asked, _hands())))
    strange = [n for n in strange_folders(catalog.store) if not fnmatchcase(n, folders or "")]
    document = {"steps": [_row(filled) for filled in done], "no_steps": strange}
    emit(document, as_json=as_json, render=lambda: _print(document))
    if strange or any(filled.error for filled in done):
        raise click.exceptions.Exit(1)


def _hands() -> "Hands":
    """The cluster that RAY_ADDRESS names, else this process."""
    from ray_ckpt.cluster.backfill import Hands, take_here, take_on_cluster
    from ray_ckpt.cluster.reach import connect

    address = os.environ.get("RAY_ADDRESS")
    if address:
        connect(address)
    return Hands(take=take_on_cluster if address else take_here, perform=perform)


def _told(steps: Iterator["Filled"]) -> Iterator["Filled"]:
    """The same, each told at once."""
    for filled in steps:
        say(str(filled))
        yield filled


def _row(filled: "Filled") -> dict[str, Any]:
    return {
        "step": filled.step,
        "bytes": filled.size_bytes,
        "did": list(filled.did),
        "error": str(filled.error) if filled.error else None,
        "left": filled.left,
    }


def _print(document: dict[str, Any]) -> None:
    rows = [
        (
            f"step-{row['step']}",
            human_bytes(row["bytes"]),
            ", ".join(row["did"]) or "-",
            (row["error"] or row["left"] or "-").partition("\n")[0],
        )
        for row in document["steps"]
    ]
    print_table(("step", "size", "done now", "not done"), rows)
    for name in document["no_steps"]:
        click.echo(f"{name} is left alone: its name is no step's; add --folders {name}", err=True)
