"""What a run begins from: a step, what that step needs, or what the config names."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import BASE, FromSources, LoadConfig, Source, Start
from ray_ckpt.core.manifest import Manifest, NeededSource, StartSource
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.hub.download import pinned
from ray_ckpt.tensors.choosing import Choice
from ray_ckpt.tensors.contents import saves_adapter
from ray_ckpt.tensors.converters import owners
from ray_ckpt.tensors.index import NOT_THE_MODEL
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.sources import Naming, OpenSource, open_source, open_step


def open_sources(
    catalog: Catalog,
    choice: Choice,
    config: LoadConfig,
    naming: Naming,
    *,
    parts: tuple[str, ...],
) -> list[OpenSource]:
    """Every folder that tensors come from; none for a run from scratch. No tensor is read.

    Raises:
        ConfigError: a folder is not there, the step needs one that the config does not name, or a
            part is excluded that neither the run, whose `parts` are given, nor the step has.
    """
    named = config.start.sources
    manifest = choice.manifest
    if manifest is None:
        refuse_unknown_parts("load.exclude", config.exclude, {*parts, *NOT_THE_MODEL})
        return [open_source(source, naming) for source in named]
    step = open_step(
        catalog,
        manifest,
        owners=_owners(manifest, naming),
        parts=tuple(part for part in parts if part not in config.exclude)
        if manifest.holds == "everything"
        else (),
    )
    held = {key.partition(".")[0] for key in step.shapes.keys() - step.model_keys}
    refuse_unknown_parts("load.exclude", config.exclude, {*parts, *held, *NOT_THE_MODEL})
    step = replace(step, left=tuple(sorted(held - {*parts, *config.exclude})))
    return [step, *(_open_needed(needed, named, naming) for needed in manifest.needs)]


def pinned_start(choice: Choice, start: Start) -> Start:
    """The same, with what lies on the Hub as it is now: other ranks look at it a little later.

    Where a step goes on by itself nobody asks the Hub.
    """
    is_needed = choice.manifest is None or bool(choice.manifest.needs)
    if not is_needed or not any(names.is_repository(source.path) for source in start.sources):
        return start
    pins = (
        replace(source, path=pinned(source.path)) if names.is_repository(source.path) else source
        for source in start.sources
    )
    return FromSources(sources=tuple(pins))


def refuse_unknown_parts(field: str, named: Iterable[str], known: Collection[str]) -> None:
    """Raises ConfigError for a part that nobody has: a slip of the pen must not be passed over."""
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ConfigError(
            f"no part is called {', '.join(unknown)}",
            field,
            "nothing was loaded",
            f"parts of this run and its steps: {', '.join(sorted(known))}",
        )


def _owners(manifest: Manifest, naming: Naming) -> tuple[str, ...]:
    """Whose keys the step itself must bring: all but those that it needs another source for."""
    elsewhere = {owner for needed in manifest.needs for owner in needed.owners}
    return tuple(sorted({BASE, *(c.name for c in naming.converters)} - elsewhere))


def _open_needed(needed: NeededSource, named: Sequence[Source], naming: Naming) -> OpenSource:
    """What a step cannot be loaded without, where the config says that it lies."""
    found = next((s for s in named if set(needed.owners) <= set(s.owners)), None)
    if found is None:
        raise ConfigError(
            f"the step holds an adapter alone and needs the {' and '.join(needed.owners)} that it "
            f"was trained on: {needed.name} ({needed.format})",
            "load.start",
            "nothing was loaded",
            f"name it: LoadConfig(start=FromWeights(path='.../{needed.name}', "
            f"format='{needed.format}'))",
        )
    opened = open_source(found, naming)
    owner_of = owners(opened.model_keys, naming.converters)
    return replace(
        opened,
        owners=needed.owners,
        parts=(),
        model_keys=frozenset(k for k, owner in owner_of.items() if owner in needed.owners),
        expected=needed,
    )


def base_of_saves(sources: Sequence[OpenSource], model: ModelWrapper) -> OpenSource | None:
    """The folder that saves will need, where a converter says that they hold the adapter alone.

    Raises:
        ConfigError: the base does not come from a folder of its own.
    """
    if not saves_adapter(model):
        return None
    base = next((s for s in sources if BASE in s.owners and s.named is not None), None)
    if base is None:
        raise ConfigError(
            "saves are to hold the adapter alone, and the base comes from no folder of its own: "
            "nobody could load them",
            "converters",
            "nothing was loaded",
            "name the base: LoadConfig(start=FromWeights(path=...)) in a root without other "
            "checkpoints, or LoRA(saves='everything')",
        )
    return base


def origins_of(
    choice: Choice, sources: Sequence[OpenSource], ranks: Ranks
) -> tuple[StartSource, ...]:
    """What the manifests of saves say the run started from, before its first step. Collective."""
    if choice.step is not None:
        return tuple(origin for source in sources for origin in source.started_from)
    return ranks.on_coordinator(lambda: tuple(source.origin() for source in sources))


def needs_of(base: OpenSource | None, ranks: Ranks) -> tuple[NeededSource, ...]:
    """What the manifests of saves name. Collective; ranks share the reading of a new base."""
    if base is None:
        return ()
    return (base.expected or replace(base.identified(ranks), owners=(BASE,)),)
