"""Verbs that change something: adopt, pin, unpin, purge, undo, save-now."""

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ray_ckpt.cli.output import emit, human_bytes, json_option, print_table, root_argument, say
from ray_ckpt.core.errors import ConfigError, ForeignFolderError, IntegrityError, UsageError
from ray_ckpt.core.pins import after, moment
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.records import user_name


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

    Example: ray-ckpt adopt /old/run --family llama --hf-assets ./Llama-3.1-8B
    """
    from ray_ckpt.tensors.adopt import adopt_step, foreign_steps

    catalog = open_root(root)
    assets = hf_assets_in(hf_assets)
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


def hf_assets_in(folder: Path | None) -> Mapping[str, bytes]:
    """JSON, text and tokenizer models of a Hugging Face folder; never its weights."""
    from ray_ckpt.tensors.run import HfAssets

    return {} if folder is None else HfAssets.of_folder("", folder).files


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
    """Keep a checkpoint from every purge, for ever or for a while.

    Example: ray-ckpt pin /runs/a 500 --reason "in the paper" --for 90d
    """
    if not reason.strip():
        raise ConfigError("the pin says no reason", "--reason", do="say why the step must stay")
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
    """Let policies purge a checkpoint again.

    Example: ray-ckpt unpin /runs/a 500
    """
    gone = open_root(root).unpin(step, name=name)
    text = (
        f"removed from step-{step}: {', '.join(gone)}" if gone else f"step-{step} has no such pin"
    )
    emit({"step": step, "removed": gone}, as_json=as_json, render=lambda: click.echo(text))


@click.command()
@root_argument
@click.option(
    "--keep-latest", type=click.IntRange(min=2),
    help="Keep the newest so many verified checkpoints.",
)  # fmt: skip
@click.option(
    "--keep-every", type=click.IntRange(min=1), help="Keep every step that is a multiple of this."
)
@click.option("--apply", is_flag=True, help="Do it. Without this nothing changes.")
@json_option
def purge(
    root: str, keep_latest: int | None, keep_every: int | None, apply: bool, as_json: bool
) -> None:
    """Show which checkpoints would go and why; with --apply move them to the trash.

    Without options the run's own policy decides. The newest two verified checkpoints, pinned ones
    and ones with unfinished exports or copies always stay.

    Example: ray-ckpt purge /runs/a --keep-latest 3 --keep-every 1000 --apply
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
    """Bring a purged checkpoint back from the trash.

    Example: ray-ckpt undo /runs/a 500
    """
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
    """Ask the trainer that writes to ROOT to save at its next step.

    Example: ray-ckpt save-now /runs/a
    """
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


def _user() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", user_name())
