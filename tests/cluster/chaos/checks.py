"""What must be true of a run once it has come to rest, whatever has happened to it: bit for bit.

lost        a step that was said committed is neither here nor purged, or has other bytes
duplicate   something was done twice at a place where others see it
stuck       an action that has neither ended nor says when it goes on, or failed for good
wrong       an export, a copy, a pin or a policy that is not as it was asked for
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor

from jobs.assets import make_assets
from ray_ckpt.core import names
from ray_ckpt.core.lifecycle import MERELY_LOOKS, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import find_damage
from ray_ckpt.storage.history import EventReader
from ray_ckpt.storage.proven import Origin, bring_all
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.load_into import read_tensors
from tests.cluster.chaos.training import MODEL, states
from tests.cluster.chaos.world import EXPORT_EVERY, KEEP_EVERY, REPOSITORY, World

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Sentences, by what they mean; all of them empty is what is promised."""

    lost: tuple[str, ...]
    duplicate: tuple[str, ...]
    stuck: tuple[str, ...]
    wrong: tuple[str, ...]


def examine(world: World) -> Findings:
    """Reads every byte that is left of the run, here and wherever it was copied to."""
    catalog = open_catalog(world.root)
    observed = catalog.observe()
    return Findings(
        lost=tuple(_lost(world, catalog, observed)),
        duplicate=tuple((*_twice_on_the_hub(world), *_twice_by_events(catalog))),
        stuck=tuple(_stuck(observed)),
        wrong=tuple((*_policy(world, observed), *_exports(world, catalog, observed))),
    )


def _lost(world: World, catalog: Catalog, observed: Observation) -> Iterator[str]:
    """A step that was said committed is here, with the right weights, or was purged by policy."""
    here = {view.step for view in observed.readable()}
    aside = {v.step for v in observed.checkpoints if v.state is CheckpointState.TRASHED}
    purged = {
        record.action.step
        for record in observed.records.values()
        if record.action.kind is ActionKind.PURGE and record.state is ActionState.SUCCEEDED
    }
    for step in sorted(set(world.told()) - here - aside - purged):
        yield f"step-{step} was committed and nobody knows what became of it"
    for step, expected in _expected(here):
        manifest = catalog.manifest(step)
        assert manifest.model is not None, "the training names its model"
        damage = catalog.damage(step)
        weights = read_tensors(catalog, manifest, manifest.model.keys)
        if damage or not _equal(weights, expected):
            yield f"step-{step} is not what was saved: {damage or 'other weights'}"


def _twice_on_the_hub(world: World) -> Iterator[str]:
    messages = [c.message for c in _hub(world).list_repo_commits(REPOSITORY)]
    contents = [line for text in messages for line in text.splitlines() if "Ray-Ckpt" in line]
    yield from (f"{n} commits on the Hub: {c}" for c, n in Counter(contents).items() if n > 1)


def _twice_by_events(catalog: Catalog) -> Iterator[str]:
    """A copy or a purge that ended well is never done again; an export only if it was removed."""
    told = Counter(
        event.text
        for event in EventReader(catalog.store).read()
        if event.what == "action.succeeded" and event.text.startswith(("publish", "purge"))
    )
    yield from (f"{count} times: {text}" for text, count in told.items() if count > 1)


def _stuck(observed: Observation) -> Iterator[str]:
    for record in observed.records.values():
        if record.action.kind not in MERELY_LOOKS and not record.state.is_terminal:
            yield f"{record.action.title} is {record.state}"
        if record.state is ActionState.DEAD:
            yield f"{record.action.title} is dead: {record.error}"
    yield from (f"still asked for: {request.title}" for request in observed.requests)


def _policy(world: World, observed: Observation) -> Iterator[str]:
    """What must be kept is here and verified; what need not be is not."""
    here = {v.step: v for v in observed.readable()}
    told = set(world.told())
    kept = {s for s in told if s % KEEP_EVERY == 0} | set(sorted(here)[-3:]) | world.pinned
    yield from (f"step-{step} must be kept, and is not here" for step in sorted(kept - set(here)))
    yield from (f"step-{step} is kept for nothing" for step in sorted(set(here) - kept))
    unverified = [s for s, v in here.items() if v.state is not CheckpointState.VERIFIED]
    yield from (f"step-{step} was never verified" for step in unverified)


def _exports(world: World, catalog: Catalog, observed: Observation) -> Iterator[str]:
    """Every export that was due or asked for is here, is the model, and is equal at every place.

    One that a person removed once its step was purged cannot be made again: its copies are left.
    """
    last = max(view.step for view in observed.readable())
    due = {("hf", s) for s in {*world.told(), last} if s % EXPORT_EVERY == 0 or s == last}
    asked = {(name, step) for step, name in world.asked.items()}
    made = {(e.name, e.step): catalog for e in observed.exports}
    purged = set(world.told()) - {view.step for view in observed.readable()}
    copies = open_catalog(world.copies)
    kept = {e.step for e in copies.observe().exports}
    made |= {("hf", s): copies for s in world.removed & purged & kept if ("hf", s) not in made}
    yield from (f"no export {name} of step-{step}" for name, step in (due | asked) - set(made))
    adapter = make_adapter("llama", json.loads(make_assets(MODEL).files["config.json"]))
    for step, expected in _expected(step for _, step in made):
        for name in (name for name, of in made if of == step):
            found = _weights(made[name, step], name, step)
            if not _equal(found, adapter.to_hf(dict(expected))):
                yield f"the export {name} of step-{step} is another model"
    for name, step in due & set(made):
        content = made[name, step].export(name, step).manifest.content_id
        for destination in (world.copies, world.s3_copies):
            yield from _copy(open_catalog(destination), step, content)
        yield from _on_the_hub(world, step, content)


def _copy(copies: Catalog, step: int, content_id: str) -> Iterator[str]:
    copy = copies.export("hf", step)
    damage = find_damage(copies.store, names.export_dir("hf", step), copy.manifest)
    if copy.manifest.content_id != content_id or damage:
        yield f"the copy of step-{step} at {copies.uri} differs: {damage}"


def _on_the_hub(world: World, step: int, content_id: str) -> Iterator[str]:
    commits = _hub(world).list_repo_commits(REPOSITORY, revision=f"step-{step}")
    if content_id not in commits[0].message:
        yield f"the tag step-{step} on the Hub names another export"


def _hub(world: World) -> HfApi:
    return HfApi(endpoint=world.hub.url, token=world.hub.token)


def _expected(steps: Iterable[int]) -> Iterator[tuple[int, Tensors]]:
    """The weights after each of these steps, by native names; valid until the next is asked for."""
    wanted = set(steps)
    for step, state in enumerate(states(), start=1):
        if not wanted:
            return
        if step in wanted:
            wanted.remove(step)
            yield step, state


def _weights(catalog: Catalog, name: str, step: int) -> Tensors:
    manifest = catalog.export(name, step).manifest
    with tempfile.TemporaryDirectory() as folder:
        source = names.export_dir(name, step)
        origin = Origin(store=catalog.store, folder=source, safe="", do="")
        bring_all(origin, manifest.files, Path(folder))
        shards = sorted(Path(folder).glob("*.safetensors"))
        return {key: value for shard in shards for key, value in load_file(shard).items()}


def _equal(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[k], expected[k]) for k in expected)
