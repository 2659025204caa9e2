"""`ray-ckpt demo`: the whole life of a checkpoint, in front of you, in two minutes.

Starts a Ray of its own and submits the very jobs that anyone submits: train, then look at the
export. In the middle it kills a training worker. It drives nothing else: what happens after a save
is the manager's work, and this only watches.
"""

import contextlib
import json
import os
import shlex
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_ckpt.cli.interrupt import kept_interrupt
from ray_ckpt.cli.output import print_steps
from ray_ckpt.cli.progress import Screen
from ray_ckpt.core.errors import IntegrityError, RayCkptError, UsageError
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.names import run_name
from ray_ckpt.core.observation import Observation
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog

if TYPE_CHECKING:
    from ray_ckpt.cluster.local import LocalJobs

EXPORT = "hf-bf16"
STEPS = 60
KILL_AFTER = 34
"""The worker is killed once this step was reported and step 30 is committed."""
_ENVIRONMENT = {
    # Ray Train looks at its workers five times a second instead of every two seconds
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(kw_only=True)
class Story:
    """What happened, as it is told at the end."""

    root: str
    killed_at_step: int | None = None
    resumed_from_step: int | None = None
    memory_bytes: int = 0
    """Of what it resumed from: these came from the host's memory."""
    losses: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    """Every loss reported for a step; two for a step that was done again."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    sample: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def repeated(self) -> dict[int, list[float]]:
        """Steps done before the kill and again after it."""
        return {step: values for step, values in self.losses.items() if len(values) > 1}

    @property
    def is_exact(self) -> bool:
        """Whether every repeated step had the same loss, bit for bit."""
        return all(len(set(values)) == 1 for values in self.repeated.values())


@click.command()
@click.option("--root", help="Where the checkpoints go; by default a new folder.")
@click.option("--to", "destination", help="Where exports go: /path, s3://..., hf://org/repo.")
@click.option("--hold", is_flag=True, help="Leave Ray and its dashboard up until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def demo(root: str | None, destination: str | None, hold: bool, as_json: bool) -> None:
    """Train, kill a worker, resume, export, publish and purge: two minutes on two cores.

    Run it again with the same --root and it goes on where it stopped.

    Example: ray-ckpt demo --root /tmp/first --hold
    """
    root = root or f"{tempfile.mkdtemp(prefix='ray_ckpt-demo-')}/run"
    catalog = open_catalog(root)
    destination = destination or f"{catalog.uri}-published"
    _refuse_unwritable(catalog)
    started = time.monotonic()
    story = Story(root=catalog.uri)
    with Screen(quiet=as_json) as screen, kept_interrupt() as check:
        screen.say("starting a local Ray")
        from ray_ckpt.cluster.local import embedded_ray

        with embedded_ray("ray-ckpt demo", _ENVIRONMENT, on_poll=check) as jobs:
            screen.say(f"Ray dashboard: {jobs.dashboard}")
            _live(jobs, catalog, destination, story=story, screen=screen)
            story.seconds["total"] = round(time.monotonic() - started, 1)
            observed = catalog.observe()
            if not as_json:
                _tell(story, observed, catalog, screen=screen)
            if hold:
                _hold(jobs)
    if as_json:
        click.echo(json.dumps(_document(story, observed)))
    if not story.is_exact:
        raise IntegrityError(f"repeated steps had other losses: {story.repeated}", catalog.uri)


def _live(
    jobs: "LocalJobs", catalog: Catalog, destination: str, *, story: Story, screen: Screen
) -> None:
    """Everything that takes time; an interrupt says how to go on."""
    try:
        _train(jobs, catalog, destination, story=story, screen=screen)
        _look_at_export(jobs, catalog, story=story, screen=screen)
    except KeyboardInterrupt:
        again = f"ray-ckpt demo --root {shlex.quote(catalog.uri)}"
        click.echo(f"\ninterrupted; every committed step is safe. Go on with: {again}", err=True)
        raise


def _train(
    jobs: "LocalJobs", catalog: Catalog, destination: str, *, story: Story, screen: Screen
) -> None:
    """The training job from start to end, with a kill in the middle; then the manager's work."""
    began = time.monotonic()
    publish = f'[{{export = "{EXPORT}", to = {json.dumps(destination)}}}]'
    config = _jobs_folder() / "configs" / "demo.toml"
    arguments = [f"root={catalog.uri}", f"lifecycle.publish={publish}"]
    command = shlex.join(["jobs.train", "--config", str(config), *arguments])
    job = jobs.submit(command, name=f"train {run_name(catalog.uri)}")
    screen.say(f"training {STEPS} steps on 2 workers, saving every 10; root {catalog.uri}")
    while not jobs.is_over(job):
        _watch(catalog, story, screen)
        jobs.pause()
    jobs.output(job)
    story.seconds["train"] = round(time.monotonic() - began, 1)
    while not _is_settled(_watch(catalog, story, screen), catalog):
        jobs.pause()
    observed = catalog.observe()
    for kind in (ActionKind.EXPORT, ActionKind.PUBLISH):
        spent = [r.result["seconds"] for r in observed.records.values() if r.action.kind is kind]
        story.seconds[str(kind)] = round(sum(spent), 2)


def _watch(catalog: Catalog, story: Story, screen: Screen) -> dict[str, Any]:
    """One look at the manager; kills a worker when its time has come."""
    from ray_ckpt.cluster.connect import manager_status

    status = manager_status(catalog.uri)
    progress = status.get("progress", {})
    for step, loss in status.get("losses", []):
        values = story.losses.setdefault(step, [])
        if len(values) < sum(1 for s, _ in status["losses"] if s == step):
            values.append(loss)
    step = progress.get("step", 0)
    if story.killed_at_step is not None and progress.get("resumed_from"):
        if story.resumed_from_step is None:
            story.memory_bytes = progress["memory_bytes"]
            where = "this host's memory" if story.memory_bytes else "storage"
            screen.say(f"resumed from step-{progress['resumed_from']}, which came from {where}")
        story.resumed_from_step = progress["resumed_from"]
    screen.show(status, num_steps=STEPS)
    is_due = progress.get("last_committed_step", 0) >= 30 and KILL_AFTER <= step < STEPS - 10
    if story.killed_at_step is None and is_due and not progress["resumed_from"]:
        os.kill(progress["pids"][1], signal.SIGKILL)
        story.killed_at_step = step
        screen.say(f"SIGKILL to worker 1 (process {progress['pids'][1]}) at step {step}")
    return status


def _is_settled(status: dict[str, Any], catalog: Catalog) -> bool:
    """The manager has nothing left to do.

    Raises:
        RayCkptError: an action failed for good; the error says which, and what to type.
    """
    if status.get("dead"):
        dead = status["dead"][0]
        raise RayCkptError(f"{dead['title']} failed for good: {dead['error']}", catalog.uri)
    return bool(status.get("is_idle")) and _all_published(catalog.observe())


def _all_published(observed: Observation) -> bool:
    publishes = [r for r in observed.records.values() if r.action.kind is ActionKind.PUBLISH]
    done = {r.action.step for r in publishes if r.state is ActionState.SUCCEEDED}
    return {30, STEPS} <= done


def _look_at_export(jobs: "LocalJobs", catalog: Catalog, *, story: Story, screen: Screen) -> None:
    """The last export, loaded with transformers by a job of its own."""
    screen.say("loading the last export with transformers")
    sizes = ["model.dim=128", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=352"]
    step = [f"root={catalog.uri}", f"step={STEPS}", f"name={EXPORT}"]
    command = shlex.join(["jobs.sample", *step, *sizes])
    job = jobs.submit(command, name=f"look at {EXPORT} step-{STEPS}")
    output = jobs.wait(job)
    story.sample = json.loads(output.splitlines()[-1])


def _tell(story: Story, observed: Observation, catalog: Catalog, *, screen: Screen) -> None:
    """The table of what exists where, and what was proven."""
    screen.close()
    print_steps(observed)
    if story.killed_at_step is not None:
        click.echo(
            f"killed at step {story.killed_at_step}, resumed from step {story.resumed_from_step}; "
            f"{len(story.repeated)} steps were done again with "
            f"{'the same losses, bit for bit' if story.is_exact else 'OTHER losses'}"
        )
    difference = story.sample["max_logit_difference"]
    click.echo(f"the export is the trained model: weights equal, logits within {difference:.1e}")
    click.echo(f"it writes: {story.sample['text']!r}")
    click.echo(f"seconds: {story.seconds}")
    click.echo(f"look around:  ray-ckpt ls {catalog.uri}")


def _document(story: Story, observed: Observation) -> dict[str, Any]:
    """The last line of `--json`: the command line's contract."""
    steps = sorted(story.losses)
    committed = {c.step for c in observed.checkpoints if c.state is not CheckpointState.FOREIGN}
    return {
        "root": story.root,
        "steps_committed": sorted(committed),
        "killed_at_step": story.killed_at_step,
        "resumed_from_step": story.resumed_from_step,
        "resumed_from_memory_bytes": story.memory_bytes,
        "losses_repeated": len(story.repeated),
        "losses_identical": story.is_exact,
        "exports": [
            {"name": e.name, "step": e.step, "path": f"{story.root}/exports/{e.name}/step-{e.step}"}
            for e in observed.exports
        ],
        "published": [
            {
                "destination": record.action.destination,
                "step": record.action.step,
                "path": record.result["location"],
            }
            for record in observed.records.values()
            if record.action.kind is ActionKind.PUBLISH and "location" in record.result
        ],
        "purged_steps": sorted(
            c.step for c in observed.checkpoints if c.state is CheckpointState.TRASHED
        ),
        "first_loss": story.losses[steps[0]][-1] if steps else None,
        "last_loss": story.losses[steps[-1]][-1] if steps else None,
        "sample": story.sample,
        "seconds": story.seconds,
    }


def _refuse_unwritable(catalog: Catalog) -> None:
    """Found out now, not after Ray has started."""
    probe = ".ray_ckpt/probe"
    catalog.store.write(probe, b"")
    catalog.store.delete([probe])


def _jobs_folder() -> Path:
    """Where the jobs lie; the library may start them, never import them."""
    from importlib.util import find_spec

    spec = find_spec("jobs")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the package `jobs` is not installed", do="pip install -e '.[demo]'")
    return Path(spec.submodule_search_locations[0])


def _hold(jobs: "LocalJobs") -> None:
    click.echo(f"the dashboard stays up at {jobs.dashboard}; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            jobs.pause()
