"""Verbs that change something: adopt, export, publish, pin, unpin, purge, undo, save-now."""

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ray_ckpt.cli.output import (
    emit,
    human_bytes,
    json_option,
    open_root,
    print_table,
    root_argument,
    say,
    step_option,
)
from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord, ExportSpec
from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import ConfigError, ForeignFolderError, IntegrityError, UsageError
from ray_ckpt.core.pins import after, moment
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.records import user_name

_NAMES: dict[Dtype, str] = {"bfloat16": "hf-bf16", "float16": "hf-fp16", "float32": "hf-fp32"}


@click.command()
@root_argument
@click.option("--step", type=int, help="Only this folder; without it every foreign one.")
@click.option("--family", help="The model's family, for exports: torchtitan_llama3, qwen3, ...")
@click.option(
    "--hf-assets", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with config.json and the tokenizer, copied beside each step for exports.",
)  # fmt: skip
@json_option
def adopt(
    root: str, step: int | None, family: str | None, hf_assets: Path | None, as_json: bool
) -> None:
    """Take over step folders that TorchTitan, Ray Train or plain DCP wrote.

    Each is checked and gets a manifest; one that cannot be taken over is named and left alone.
    Nothing in it is executed or changed.
    """
    from ray_ckpt.tensors.adopt import adopt_step, foreign_steps

    catalog = open_root(root)
    assets = _assets(hf_assets)
    document: list[dict[str, Any]] = []
    for number in foreign_steps(catalog) if step is None else [step]:
        try:
            m = adopt_step(catalog, number, family=family, assets=assets)
            document.append({"step": m.step, "bytes": m.total_bytes, "files": len(m.files)})
        except (ForeignFolderError, IntegrityError) as error:
            if step is not None:
                raise
            document.append({"step": number, "refused": error.what})
    emit(document, as_json=as_json, render=lambda: _print_adopted(document))
    if any("refused" in row for row in document):
        sys.exit(1)


def _print_adopted(document: list[dict[str, Any]]) -> None:
    for row in document:
        if "refused" in row:
            click.echo(f"step-{row['step']} stays foreign: {row['refused']}")
        else:
            size = human_bytes(row["bytes"])
            click.echo(f"step-{row['step']} is committed now: {row['files']} files, {size}")
    if not document:
        click.echo("no foreign step folder is here")


def _assets(folder: Path | None) -> dict[str, bytes]:
    """JSON, text and tokenizer models of a Hugging Face folder; never its weights."""
    if folder is None:
        return {}
    suffixes = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in suffixes and not path.name.endswith(".index.json")
    }


@click.command()
@root_argument
@step_option
@click.option(
    "--name", help="Folder under exports/; by default form and dtype: hf-bf16, peft-hf-bf16."
)
@click.option(
    "--dtype", type=click.Choice(list(_NAMES)), default="bfloat16", show_default=True,
    help="What floating-point tensors are cast to.",
)  # fmt: skip
@click.option(
    "--as", "forms", multiple=True, metavar="CONVERTER=FLAVOR",
    help="In which form a converter is exported, as in lora=peft. Repeatable.",
)  # fmt: skip
@click.option("--allow-non-finite", is_flag=True, help="Also with NaN or Inf in the weights.")
@click.option("--to", "destination", help="Also publish it there: /path, s3://..., hf://org/repo.")
@json_option
def export(
    root: str,
    step: int,
    name: str | None,
    dtype: Dtype,
    forms: tuple[str, ...],
    allow_non_finite: bool,
    destination: str | None,
    as_json: bool,
) -> None:
    """Make a Hugging Face folder of one checkpoint: ROOT/exports/NAME/step-N.

    The checkpoint is verified first; a damaged one is set aside in quarantine and not exported.
    """
    catalog = open_root(root)
    flavors = _flavors(forms)
    spec = ExportSpec(
        name=name or "-".join((*flavors.values(), _NAMES[dtype])),
        dtype=dtype,
        flavors=flavors,
        allow_non_finite=allow_non_finite,
    )
    if not names.is_word(spec.name):
        raise ConfigError(f"{spec.name!r} cannot be a folder name", "--name")
    view = catalog.checkpoint(step)
    action = export_action(view, spec)
    _perform(catalog, action)
    folder = f"{catalog.uri}/{names.export_dir(spec.name, step)}"
    document: dict[str, Any] = {"step": step, "name": spec.name, "dtype": dtype, "path": folder}
    if destination is not None:
        record = _perform(catalog, publish_action(view, spec, destination))
        document["published"] = {"destination": destination, **record.result}

    def render() -> None:
        click.echo(folder)
        if "published" in document:
            click.echo(document["published"]["location"])

    emit(document, as_json=as_json, render=render)


@click.command()
@root_argument
@step_option
@click.option("--name", required=True, help="Which export.")
@click.option("--to", "destination", required=True, help="/path, s3://bucket/prefix, hf://org/repo")
@json_option
def publish(root: str, step: int, name: str, destination: str, as_json: bool) -> None:
    """Copy one export to another place: all of it or none of it, and only once."""
    catalog = open_root(root)
    found = catalog.export(name, step)
    view = catalog.checkpoint(step)
    spec = ExportSpec.of_recipe(found.manifest.lineage.recipe)
    action = publish_action(view, spec, destination)
    record = _perform(catalog, action)
    document = {"step": step, "name": name, "destination": destination, **record.result}
    emit(document, as_json=as_json, render=lambda: click.echo(record.result["location"]))


@click.command()
@root_argument
@click.argument("step", type=int)
@click.option("--reason", required=True, help="Why it must stay, for whoever wonders later.")
@click.option("--name", help="Who or what pins; by default your user name.")
@click.option("--for", "duration", help="How long it holds: 30m, 12h, 7d, 2w.")
@click.option("--until", help="When it ends: a day or an ISO 8601 time, UTC.")
@json_option
def pin(
    root: str,
    step: int,
    reason: str,
    name: str | None,
    duration: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Keep a checkpoint from every purge, for ever or for a while."""
    end = _end(duration, until)
    made = open_root(root).pin(step, name=name or _user(), reason=reason, until=end)
    document = {"step": step, "name": made.name, "reason": made.reason, "until": made.until}
    emit(
        document,
        as_json=as_json,
        render=lambda: click.echo(f"step-{step} is pinned by {made.title}: {reason}"),
    )


def _end(duration: str | None, until: str | None) -> str | None:
    """When a pin ends that a person sets now."""
    if duration is not None and until is not None:
        raise ConfigError("a pin ends once", "--for, --until", do="give one of the two")
    if duration is not None:
        return after(duration, time.time())
    return moment(until, time.time()) if until is not None else None


@click.command()
@root_argument
@click.argument("step", type=int)
@click.option("--name", help="Only this pin; without it all of them.")
@json_option
def unpin(root: str, step: int, name: str | None, as_json: bool) -> None:
    """Let policies purge a checkpoint again."""
    gone = open_root(root).unpin(step, name=name)
    text = (
        f"removed from step-{step}: {', '.join(gone)}" if gone else f"step-{step} has no such pin"
    )
    emit({"step": step, "removed": gone}, as_json=as_json, render=lambda: click.echo(text))


@click.command()
@root_argument
@click.option("--keep-latest", type=int, help="Keep the newest so many verified checkpoints.")
@click.option("--keep-every", type=int, help="Keep every step that is a multiple of this.")
@click.option("--apply", is_flag=True, help="Do it. Without this nothing changes.")
@json_option
def purge(
    root: str, keep_latest: int | None, keep_every: int | None, apply: bool, as_json: bool
) -> None:
    """Show which checkpoints would go and why; with --apply move them to the trash.

    Without options the run's own policy decides. The newest two verified checkpoints, pinned ones
    and ones with unfinished exports or copies always stay.
    """
    from ray_ckpt.cluster.purge import apply_purge, plan_purge

    catalog = open_root(root)
    given = keep_latest is not None or keep_every is not None
    keep = KeepConfig(latest=keep_latest, every_steps=keep_every) if given else None
    planned = apply_purge(catalog, keep, told=say) if apply else plan_purge(catalog, keep)

    def render() -> None:
        rows = [
            (str(v.step), "keep" if v.keep else "purge", "; ".join(v.reasons) or v.why_not)
            for v in planned.verdicts
        ]
        print_table(("step", "verdict", "reason"), rows)
        click.echo(planned.summary(applied=apply, root=catalog.uri))

    emit(planned.to_document(applied=apply), as_json=as_json, render=render)


@click.command()
@root_argument
@click.argument("step", type=int)
@json_option
def undo(root: str, step: int, as_json: bool) -> None:
    """Bring a purged checkpoint back from the trash."""
    catalog = open_root(root)
    catalog.restore(step)
    emit(
        {"step": step, "restored": True},
        as_json=as_json,
        render=lambda: click.echo(f"step-{step} is back; pin it, or a policy may purge it again"),
    )


@click.command()
@root_argument
@json_option
def save_now(root: str, as_json: bool) -> None:
    """Ask the trainer that writes to ROOT to save at its next step."""
    catalog = open_root(root)
    trainer = holder_of(catalog.store, TRAINER)
    if trainer is None:
        raise UsageError(
            "no trainer writes here now: nobody holds the lease",
            catalog.uri,
            "nothing was asked for; every committed step is as it was",
            f"ray-ckpt ls {catalog.uri}    (shows what was saved)",
        )
    catalog.records.ask_to_save()
    document = {"asked": True, "host": trainer.host, "pid": trainer.pid}
    text = (
        f"asked: process {trainer.pid} on {trainer.host} looks every few seconds and saves at its "
        f"next step, unless its SaveConfig.listen is off; then see: ray-ckpt ls {catalog.uri}"
    )
    emit(document, as_json=as_json, render=lambda: click.echo(text))


def _perform(catalog: Catalog, action: Action) -> ActionRecord:
    """On the cluster that RAY_ADDRESS names, else in this process."""
    from ray_ckpt.cluster.perform import perform_here, perform_on_cluster

    address = os.environ.get("RAY_ADDRESS")
    if address:
        return perform_on_cluster(catalog.uri, action, address=address, told=say)
    return perform_here(catalog, action, told=say)


def _flavors(forms: Sequence[str]) -> dict[str, str]:
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


def _user() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", user_name())
