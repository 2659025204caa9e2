"""Verbs that make a Hugging Face folder of a checkpoint, or bring it elsewhere: export, publish."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from ray_ckpt.cli.output import (
    Number,
    emit,
    human_bytes,
    json_option,
    print_table,
    root_argument,
    say,
    step_option,
)
from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.config import MAX_SHARD_BYTES, Device, Dtype, ExportFormat
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import refuse_hub

EXPORT_NAMES: dict[Dtype, str] = {"bfloat16": "hf-bf16", "float16": "hf-fp16", "float32": "hf-fp32"}
"""How exports are called by their type."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Size(click.ParamType):
    """A number of bytes, as people write it: 5GB, 500MB, 4.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9.]+) *([kmg]i?|)b?", value.strip().lower())
        try:
            size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
        except ValueError:
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size; write 5GB, 500MB or 4GiB", param, ctx)
        return size


_create_option = click.option(
    "--create", is_flag=True, help="Make the Hub's repository first, a private one, if need be."
)


@click.command()
@root_argument
@step_option
@click.option(
    "--name", help="Folder under exports/; by default form and dtype: hf-bf16, peft-hf-bf16."
)
@click.option(
    "--dtype", type=click.Choice(list(EXPORT_NAMES)), default="bfloat16", show_default=True,
    help="What floating-point tensors are cast to.",
)  # fmt: skip
@click.option(
    "--as", "forms", multiple=True, metavar="CONVERTER=FLAVOR",
    help="In which form a converter is exported, as in lora=peft. Repeatable.",
)  # fmt: skip
@click.option(
    "--max-shard-size", "max_shard_bytes", type=Size(), default=MAX_SHARD_BYTES,
    metavar="SIZE", help="Of each file of weights: 5GB (the default), 500MB, 4GiB.",
)  # fmt: skip
@click.option(
    "--format", "file_format", type=click.Choice(["safetensors", "torch"]), default="safetensors",
    help="Of the weights: safetensors files (the default), or one file for torch.load.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu",
    help="Where merges are computed; cpu is the default.",
)  # fmt: skip
@click.option(
    "--logits-within", type=Number(min=0), metavar="DIFFERENCE",
    help="Compare the logits of the run's prompt with the recorded ones, as in 0.02.",
)  # fmt: skip
@click.option(
    "--license", metavar="NAME",
    help="For the model card, as in apache-2.0; else the base model's, if it is known.",
)  # fmt: skip
@click.option("--allow-non-finite", is_flag=True, help="Also with NaN or Inf in the weights.")
@click.option("--allow-zeros", is_flag=True, help="Also with a matrix that is nothing but zeros.")
@click.option("--to", "destination", help="Also publish it there: /path, s3://..., hf://org/repo.")
@_create_option
@click.option("--plan", "plan_only", is_flag=True, help="Show what would be made; write nothing.")
@json_option
def export(
    root: str,
    step: int,
    name: str | None,
    dtype: Dtype,
    forms: tuple[str, ...],
    max_shard_bytes: int,
    file_format: ExportFormat,
    device: Device,
    logits_within: float | None,
    license: str | None,
    allow_non_finite: bool,
    allow_zeros: bool,
    destination: str | None,
    create: bool,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Make a Hugging Face folder of one checkpoint: ROOT/exports/NAME/step-N.

    The checkpoint is verified first; a damaged one is set aside in quarantine and not exported. A
    run that is killed goes on from the files that it had finished.

    Example: ray-ckpt export /runs/a --step 500 --dtype bfloat16 --to s3://models/a
    """
    catalog = open_root(root)
    flavors = flavors_of(forms)
    spec = ExportSpec(
        name=name or "-".join((*flavors.values(), EXPORT_NAMES[dtype])),
        dtype=dtype,
        flavors=flavors,
        format=file_format,
        max_shard_bytes=max_shard_bytes,
        device=device,
        logits_within=logits_within,
        license=license,
        allow_non_finite=allow_non_finite,
        allow_zeros=allow_zeros,
    )
    if not names.is_word(spec.name):
        raise ConfigError(f"{spec.name!r} cannot be a folder name", "--name")
    if plan_only:
        _show_plan(catalog, step, spec, as_json=as_json)
        return
    view = catalog.checkpoint(step)
    if create:
        _create(destination)
    if destination is None:
        record = perform(catalog, export_action(view, spec))
    else:  # asked for at once: some destinations take files while others are made
        record = perform(catalog, publish_action(view, spec, destination))
    folder = f"{catalog.uri}/{names.export_dir(spec.name, step)}"
    document: dict[str, Any] = {"step": step, "name": spec.name, "dtype": dtype, "path": folder}
    if destination is not None:
        document["published"] = {"destination": destination, **record.result}

    def render() -> None:
        click.echo(folder)
        if "published" in document:
            click.echo(document["published"]["location"])

    emit(document, as_json=as_json, render=render)


def _show_plan(catalog: Catalog, step: int, spec: ExportSpec, *, as_json: bool) -> None:
    """Every file, and in JSON every tensor with the bytes that it is made of; reads no tensor."""
    from ray_ckpt.tensors.export_plan import plan_export
    from ray_ckpt.tensors.plan_document import plan_document
    from ray_ckpt.tensors.reader import step_reader

    manifest = catalog.manifest(step)
    plan = plan_export(catalog, manifest, spec)
    document = plan_document(plan, step, step_reader(catalog, manifest).index)

    def render() -> None:
        rows = [
            (
                file["file"],
                "1 tensor" if len(file["tensors"]) == 1 else f"{len(file['tensors'])} tensors",
                human_bytes(file["bytes"]),
                f"from {human_bytes(file['reads_bytes'])}",
                _what_is_done(file["tensors"]),
            )
            for file in document["files"]
        ]
        print_table(("file", "holds", "size", "read", "how"), rows)
        click.echo(
            f"{human_bytes(document['bytes'])} in all, to exports/{spec.name}/step-{step}; "
            f"takes {human_bytes(document['memory_bytes'])} of memory"
        )

    emit(document, as_json=as_json, render=render)


def _what_is_done(tensors: Sequence[dict[str, Any]]) -> str:
    """Each kind of work with the number of tensors: the most frequent first."""
    kinds = Counter(", ".join(tensor["how"]) for tensor in tensors)
    return "; ".join(f"{count} {kind}" for kind, count in kinds.most_common())


@click.command()
@root_argument
@step_option
@click.option("--name", help="Which export.")
@click.option("--checkpoint", is_flag=True, help="Not an export: the checkpoint itself.")
@click.option("--to", "destination", required=True, help="/path, s3://bucket/prefix, hf://org/repo")
@click.option(
    "--read-back", "verify", flag_value="digests", default="sizes",
    help="Read every file back from there, and compare, before the copy is visible.",
)  # fmt: skip
@_create_option
@json_option
def publish(
    root: str,
    step: int,
    name: str | None,
    checkpoint: bool,
    destination: str,
    verify: Proof,
    create: bool,
    as_json: bool,
) -> None:
    """Copy one export, or a checkpoint, to another place: all of it or none of it, and only once.

    A copied checkpoint is DEST/step-N: a run can load it from there, ray-ckpt fetch brings it back.

    Example: ray-ckpt publish /runs/a --step 500 --name hf-bf16 --to hf://org/model
    """
    catalog = open_root(root)
    if checkpoint is (name is not None):
        raise ConfigError(
            "say what is to be copied, and one thing only",
            "--name",
            do="write --name NAME for an export, or --checkpoint for the checkpoint itself",
        )
    spec = None if name is None else _spec_of(catalog, name, step)
    if spec is None:
        refuse_hub(destination)
    action = publish_action(catalog.checkpoint(step), spec, destination)
    if create:
        _create(destination)
    record = perform(catalog, action, verify)
    document = {"step": step, "name": name, "destination": destination, **record.result}
    emit(document, as_json=as_json, render=lambda: click.echo(record.result["location"]))


def _spec_of(catalog: Catalog, name: str, step: int) -> ExportSpec:
    return ExportSpec.of_recipe(catalog.export(name, step).manifest.lineage.recipe)


def _create(destination: str | None) -> None:
    from ray_ckpt.storage.hub.repository import create_on_hub

    if destination is None:
        raise ConfigError("--create says nothing without --to", "--create", do="add --to hf://...")
    create_on_hub(destination)


def perform(catalog: Catalog, action: Action, verify: Proof = "sizes") -> ActionRecord:
    """On the cluster that RAY_ADDRESS names, else in this process."""
    from ray_ckpt.cluster.perform import perform_here, perform_on_cluster

    address = os.environ.get("RAY_ADDRESS")
    if address:
        return perform_on_cluster(catalog.uri, action, address=address, verify=verify, told=say)
    return perform_here(catalog, action, verify=verify, told=say)


def flavors_of(forms: Sequence[str]) -> dict[str, str]:
    """Converter to flavor, from `CONVERTER=FLAVOR` words."""
    pairs = [form.partition("=") for form in forms]
    wrong = [form for form, (name, _, flavor) in zip(forms, pairs, strict=True) if not flavor]
    twice = {name for name, _, _ in pairs if [pair[0] for pair in pairs].count(name) > 1}
    if wrong or twice:
        raise ConfigError(
            f"expected one CONVERTER=FLAVOR a converter, got {' '.join(forms)}",
            "--as",
            do="write --as lora=peft",
        )
    return {name: flavor for name, _, flavor in pairs}
