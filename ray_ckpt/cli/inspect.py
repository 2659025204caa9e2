"""Verbs that look and change nothing: ls, show, verify, resume-plan."""

import json
import os
import time
from dataclasses import asdict
from typing import Any

import click

from ray_ckpt.cli.output import (
    emit,
    how_far,
    human_bytes,
    json_option,
    lost_copies,
    print_steps,
    print_table,
    root_argument,
    say,
    step_rows,
)
from ray_ckpt.core import names
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.storage.backends import open_root

_LOOK = "what to type says ray-ckpt copies"


@click.command()
@root_argument
@json_option
def ls(root: str, as_json: bool) -> None:
    """List every checkpoint: its state, size, pins, exports and copies.

    Example: ray-ckpt ls s3://bucket/run
    """
    catalog = open_root(root)
    observed = catalog.observe()

    def render() -> None:
        print_steps(observed)
        for key, text in how_far(catalog, observed).items():
            click.echo(f"running: {observed.records[key].action.title}: {text}")
        steps = {view.step for view in observed.checkpoints}
        for export in observed.exports:
            if export.step not in steps:
                click.echo(
                    f"export {export.name} of step-{export.step} (its checkpoint is not here)"
                )

    emit(step_rows(observed), as_json=as_json, render=render)
    if not observed.checkpoints and not observed.exports:
        say(f"no checkpoint is in {catalog.uri} yet")


@click.command()
@root_argument
@click.argument("step", type=int)
@json_option
def show(root: str, step: int, as_json: bool) -> None:
    """Show one checkpoint: what it holds, where it comes from, what was done with it.

    Example: ray-ckpt show s3://bucket/run 500
    """
    catalog = open_root(root)
    view = catalog.checkpoint(step)
    manifest = catalog.manifest(step)
    records = catalog.records.actions()
    actions = [
        {"action": r.action.title, "state": str(r.state), "attempts": r.attempts, "error": r.error}
        for r in records.values()
        if r.action.step == step
    ]
    lost = lost_copies(records).get(step, [])
    document = {
        "step": step,
        "state": str(view.state),
        "pins": [asdict(pin) for pin in view.pins],
        "manifest": json.loads(manifest.to_json()),
        "actions": actions,
        "lost_copies": lost,
    }

    def render() -> None:
        facts = [
            ("state", str(view.state)),
            ("committed", manifest.created_at),
            ("run", manifest.lineage.run_id),
            ("resumed from", _or_dash(manifest.lineage.resumed_from)),
            ("started from", _started_from(manifest)),
            ("ranks", str(manifest.world_size)),
            ("size", human_bytes(manifest.total_bytes)),
            ("files", str(len(manifest.files))),
            ("tensors", str(len(manifest.tensors))),
            ("holds", manifest.holds),
            ("model", (manifest.model.family if manifest.model else None) or "-"),
            ("converters", _converters(manifest)),
            ("needs", ", ".join(f"{n.name} ({n.format})" for n in manifest.needs) or "-"),
            ("NaN or Inf in", ", ".join(manifest.non_finite) or "-"),
            ("metrics", ", ".join(f"{k} {v:.6g}" for k, v in manifest.metrics.items()) or "-"),
            *(("pin", _pin(pin)) for pin in view.pins),
            *((a["action"], f"{a['state']} after {a['attempts']} attempt(s)") for a in actions),
            *((c["location"], f"{c['state']}: {c['why']}; {_LOOK} {root}") for c in lost),
        ]
        print_table(("", f"step-{step}"), facts)

    emit(document, as_json=as_json, render=render)


@click.command()
@root_argument
@click.option("--step", type=int, help="Only this checkpoint; without it all, and every export.")
@json_option
def verify(root: str, step: int | None, as_json: bool) -> None:
    """Recompute every digest and compare it with the manifest. Exit 1 if anything differs.

    Example: ray-ckpt verify s3://bucket/run --step 500
    """
    from ray_ckpt.cluster.checking import check_here, check_on_cluster
    from ray_ckpt.cluster.reach import connect

    catalog, check = open_root(root), check_here
    if address := os.environ.get("RAY_ADDRESS"):
        connect(address)
        check = check_on_cluster
    findings: list[dict[str, Any]] = [
        {"what": c.what, "step": c.step, "result": c.result, "damage": list(c.damage)}
        for c in sorted(check(catalog, step), key=lambda c: (c.step, c.export or ""))
    ]

    def render() -> None:
        rows = [(f["what"], f["result"], "; ".join(f["damage"]) or "-") for f in findings]
        print_table(("what", "result", "damage"), rows)

    emit(findings, as_json=as_json, render=render)
    if any(finding["result"] == "corrupt" for finding in findings):
        newest = f"ray-ckpt resume-plan {catalog.uri}"
        click.echo(
            f"damage was found; nothing was changed. The newest good step: {newest}", err=True
        )
        raise click.exceptions.Exit(1)


@click.command(name="resume-plan")
@root_argument
@json_option
def resume_plan(root: str, as_json: bool) -> None:
    """Say which step a run resumes from, why, and why newer ones are passed over.

    Exit 1 if steps are here and none can be used: a run refuses to start from scratch there.

    Example: ray-ckpt resume-plan s3://bucket/run
    """
    observed = open_root(root).observe()
    chosen = plan_resume(observed.checkpoints, run_id=observed.run_id)
    document = {
        "step": chosen.step,
        "reason": chosen.reason,
        "refusal": chosen.refusal,
        "skipped": [{"step": step, "reason": reason} for step, reason in chosen.skipped],
    }

    def render() -> None:
        if chosen.refusal is not None:
            click.echo(f"refuse to start from scratch: {chosen.refusal}")
        else:
            click.echo(f"resume from {_step_or_start(chosen.step)}: {chosen.reason}")
        for step, reason in chosen.skipped:
            click.echo(f"passed over step-{step}: {reason}")

    emit(document, as_json=as_json, render=render)
    if chosen.refusal is not None:
        raise click.exceptions.Exit(1)


def _converters(manifest: Manifest) -> str:
    entries = manifest.model.converters if manifest.model else ()
    return ", ".join(entry.name for entry in entries) or "-"


def _pin(pin: Pin) -> str:
    expired = "" if pin.holds(time.time()) else " (expired: it holds nothing)"
    until = f", until {pin.until}{expired}" if pin.until is not None else ""
    return f"{pin.name}: {pin.reason}, since {pin.pinned_at}{until}"


def _started_from(manifest: Manifest) -> str:
    """Folders, each with the run that made it where that is known."""
    sources = manifest.lineage.started_from
    told = [f"{s.name} ({s.format}{f' of {s.run_id}' if s.run_id else ''})" for s in sources]
    return ", ".join(told) or "-"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _step_or_start(step: int | None) -> str:
    return "the start" if step is None else names.step_dir(step)
