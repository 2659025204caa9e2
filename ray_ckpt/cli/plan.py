"""What the manager would do now, and why: `ray-ckpt plan ROOT`. Changes nothing."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ray_ckpt.cli.output import emit, how_far, json_option, print_table, root_argument
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.admission import Occupant, admit
from ray_ckpt.core.breaker import resting
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import policy_of_toml
from ray_ckpt.core.reconcile import Plan
from ray_ckpt.core.reconcile import plan as plan_round
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.disk.config_file import config_text

_GONE = frozenset({CheckpointState.TRASHED, CheckpointState.PURGED})


@click.command()
@root_argument
@click.option(
    "--policy", "policy_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan by this TOML instead of the run's policy: its [lifecycle] section, or all of it.",
)  # fmt: skip
@json_option
def plan(root: str, policy_file: Path | None, as_json: bool) -> None:
    """Show what the manager would do now, in order, what waits for what, and why.

    Exit 1 if an action of a step that is here is dead, or something cannot be as it was wished.

    Example: ray-ckpt plan /runs/a --policy train.toml
    """
    catalog = open_root(root)
    observed = catalog.observe()
    if policy_file is not None:
        policy = policy_of_toml(config_text(policy_file), where=str(policy_file))
        observed = replace(observed, policy=policy)
    planned = plan_round(observed, now=time.time())
    planned = _with_limits(planned, observed, now=time.time())
    planned = _with_progress(planned, how_far(catalog, observed))
    dead = _dead(observed, planned)
    document = _document(planned, dead, policy="run" if policy_file is None else str(policy_file))
    emit(document, as_json=as_json, render=lambda: _print(planned, dead))
    if dead or planned.problems:
        raise click.exceptions.Exit(1)


def _with_limits(planned: Plan, observed: Observation, *, now: float) -> Plan:
    """What could start but finds no room says which limit keeps it waiting."""
    running = [
        Occupant(action=record.action)
        for record in observed.records.values()
        if record.state is ActionState.RUNNING
    ]
    limits = observed.policy.limits
    rests = resting(observed.records.values(), now=now)
    waits = admit(planned.actions, running, limits=limits, resting=rests, nodes=None).waits
    told = (replace(p, not_now=p.not_now or waits.get(p.action.key)) for p in planned.planned)
    return replace(planned, planned=tuple(told))


def _with_progress(planned: Plan, running: Mapping[str, str]) -> Plan:
    told = (
        replace(p, not_now=f"{p.not_now}, {running[p.action.key]}")
        if p.action.key in running
        else p
        for p in planned.planned
    )
    return replace(planned, planned=tuple(told))


def _dead(observed: Observation, planned: Plan) -> list[ActionRecord]:
    """Records of what ended DEAD and still matters: it is wanted, or its step is here."""
    wanted = {p.action.key for p in planned.planned}
    here = {view.step for view in observed.checkpoints if view.state not in _GONE}
    return [
        record
        for record in observed.records.values()
        if record.state is ActionState.DEAD
        and (record.action.key in wanted or record.action.step in here)
    ]


def _document(planned: Plan, dead: list[ActionRecord], *, policy: str) -> dict[str, Any]:
    return {
        "policy": policy,
        "actions": [
            {
                "action": p.action.title,
                "kind": str(p.action.kind),
                "step": p.action.step,
                "key": p.action.key,
                "reason": p.reason,
                "not_now": p.not_now,
            }
            for p in planned.planned
        ],
        "verdicts": [
            {"step": v.step, "keep": v.keep, "reasons": list(v.reasons) or [v.why_not]}
            for v in planned.verdicts
        ],
        "dead": [{"action": r.action.title, "error": r.error} for r in dead],
        "problems": list(planned.problems),
    }


def _print(planned: Plan, dead: list[ActionRecord]) -> None:
    rows = [(p.action.title, p.not_now or "now", p.reason) for p in planned.planned]
    print_table(("action", "when", "why"), rows)
    if not rows:
        click.echo("nothing is left to do")
    verdicts = [
        (f"step-{v.step}", "keep" if v.keep else "purge", "; ".join(v.reasons) or v.why_not)
        for v in planned.verdicts
    ]
    print_table(("step", "verdict", "why"), verdicts)
    for record in dead:
        click.echo(f"dead: {record.action.title}: {record.error}")
    for problem in planned.problems:
        click.echo(f"problem: {problem}")
