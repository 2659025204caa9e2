"""Tensors come into place, from one source or several, once all their keys were compared.

Every key of the model has one owner, every owner one source at most, and a source brings exactly
the keys of its owners. What is lacking, unexpected or claimed twice is an error that lists it,
raised on every rank before a tensor is read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.core.errors import ConfigError, IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.loading import BASE
from ray_ckpt.tensors.fqn import told
from ray_ckpt.tensors.load_into import load_into
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.optimizer_state import OptimizerState
from ray_ckpt.tensors.proof import DamageFoundError
from ray_ckpt.tensors.random_state import RandomState
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.sources import OpenSource

log = logging.getLogger("ray_ckpt")
_SAFE = "no tensor was read, the model is as it was"
_RESTORE = "restore these files from a copy, or name another folder in load.start"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load` chose, and why."""

    step: int
    """Optimizer steps that are done; 0 for a new run."""
    reason: str
    skipped: tuple[tuple[int, str], ...] = ()
    """Newer steps that were passed over, newest first, each with the reason."""
    sources: tuple[str, ...] = ()
    """Each folder that tensors came from, with the owners it supplied."""
    as_initialised: tuple[str, ...] = ()
    """Owners and parts that no source supplied: they have the values they were made with."""
    memory_bytes: int = 0
    """So many bytes, of all ranks, came from copies in their hosts' memory and not from storage."""

    def log(self) -> None:
        """Says so."""
        begin = f"resuming from step-{self.step}" if self.step else "starting at step 0"
        log.info("%s: %s", begin, self.reason)
        for source in self.sources:
            log.info("loaded %s", source)
        if self.memory_bytes:
            log.info("%.2f GB of it came from the hosts' memory", self.memory_bytes / 1e9)
        if self.as_initialised:
            log.info("as initialised: %s", ", ".join(self.as_initialised))
        for step, why in self.skipped:
            log.warning("passed over step-%d: %s", step, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a load did."""

    sources: tuple[str, ...] = ()
    as_initialised: tuple[str, ...] = ()


def restore(
    sources: Sequence[OpenSource],
    ranks: Ranks,
    *,
    model: ModelWrapper,
    parts: Mapping[str, Stateful],
) -> Restored:
    """Model and parts have the sources' values; parts that no source supplies are as they were.

    Without a source the model is asked for nothing.

    Raises:
        StateDictError: keys or shapes differ; nothing was read and nothing changed.
        ConfigError: no source supplies the base, or one is named for an owner that is not there.
        DamageFoundError: the run's own step is damaged; what it was read into holds some of it.
        IntegrityError: a source is damaged, or is not the one that a step was trained on.
    """
    if not sources:
        names = (converter.name for converter in model.converters)
        return Restored(as_initialised=(BASE, *names, *sorted(parts)))
    tensors = ranks.together(model.state_dict)
    owner_of = model.owners(tensors)
    _refuse_unknown_owners(sources, model)
    states = ranks.together(lambda: _wanted(sources, parts))
    for source in sources:
        own = {key: tensor for key, tensor in tensors.items() if owner_of[key] in source.owners}
        _fit_model(source, own, ranks, model=model)
        _fit_parts(source, {n: states[n] for n in source.parts if n in states}, ranks)
    for source in sources:
        _refuse_left_behind(source)
        _refuse_another(source, ranks)
    for source in sources:
        wanted = {k: tensor for k, tensor in tensors.items() if owner_of[k] in source.owners}
        wanted.update((name, states[name]) for name in source.parts if name in states)
        _load_from(source, wanted, ranks)
        states.update((name, wanted[name]) for name in source.parts if name in states)
    ranks.together(lambda: _put(tensors, states, model=model, parts=parts))
    supplied = {owner for source in sources for owner in source.owners}
    return Restored(
        sources=tuple(f"{', '.join((*s.owners, *s.parts))} from {s.uri}" for s in sources),
        as_initialised=(
            *sorted({*owner_of.values()} - supplied),
            *sorted(set(parts) - set(states)),
        ),
    )


def _load_from(source: OpenSource, wanted: dict[str, Any], ranks: Ranks) -> None:
    """Damage of a source that the user named is told here, of a step of the run by who chose it."""
    try:
        load_into(wanted, source.reader, ranks=ranks)
    except DamageFoundError as error:
        if source.named is None:
            raise
        raise IntegrityError(
            f"the source is damaged: {error.what}",
            source.uri,
            "storage was not changed; the model may hold some of its values: do not train on",
            f"{_RESTORE}, and start this process again",
        ) from error


def _wanted(sources: Sequence[OpenSource], parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """For each part that a source supplies, memory for what it is to supply."""
    states: dict[str, Any] = {}
    for source in sources:
        for name in source.parts:
            part = parts.get(name)
            if isinstance(part, OptimizerState | RandomState):
                begin = f"{name}."
                held = [k.removeprefix(begin) for k in source.shapes if k.startswith(begin)]
                states[name] = part.wanted(held)
            elif part is not None:
                states[name] = part.state_dict()
    return {name: state for name, state in states.items() if state}


def _put(
    tensors: Mapping[str, Any],
    states: Mapping[str, Any],
    *,
    model: ModelWrapper,
    parts: Mapping[str, Stateful],
) -> None:
    model.load_state_dict(tensors)
    for name, part in parts.items():  # in this order: a schedule reads what the optimizer holds
        if name in states:
            _put_part(name, part, states[name])


def _put_part(name: str, part: Stateful, state: Any) -> None:
    """The part's own objection (a dataloader of another size) is told as ours."""
    try:
        part.load_state_dict(state)
    except RayCkptError:
        raise
    except Exception as error:
        raise StateDictError(
            f"{name} refused its state: {error!r}",
            "TrainingState",
            "the step is untouched; this process holds a part of it: start it again",
            f"without it: LoadConfig(exclude={_excluding([name])})",
        ) from error


def _refuse_unknown_owners(sources: Iterable[OpenSource], model: ModelWrapper) -> None:
    known = {BASE, *(converter.name for converter in model.converters)}
    named = {owner for source in sources for owner in source.owners}
    if BASE not in named:
        raise ConfigError(
            "no source supplies the base's weights",
            "load.start",
            _SAFE,
            "add Source(path=..., owners=('base',)) to FromSources",
        )
    strangers = sorted(named - known)
    if strangers:
        raise ConfigError(
            f"sources are named for {', '.join(strangers)}, and no converter is called so",
            "load.start",
            _SAFE,
            f"owners of this model: {', '.join(sorted(known))}",
        )


def _fit_model(
    source: OpenSource, own: Mapping[str, Any], ranks: Ranks, *, model: ModelWrapper
) -> None:
    """The source brings these tensors of all ranks together, of these shapes, and no other."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied: set[str] = set()
    for one, one_tied in ranks.gather((_shapes_of(own), set(model.tied))):
        shapes.update(one)
        tied |= one_tied
    missing = sorted(shapes.keys() - source.model_keys)
    unexpected = sorted(source.model_keys - shapes.keys() - tied)
    if missing or unexpected:
        raise StateDictError(
            f"the source does not fit the {' and '.join(source.owners)} of the model: it lacks "
            f"{len(missing)} tensors ({told(missing) or 'none'}) and brings {len(unexpected)} "
            f"unexpected ones ({told(unexpected) or 'none'})",
            source.uri,
            _SAFE,
            _what_fits(source, unexpected, model),
        )
    _refuse_other_shapes(source, shapes)


def _what_fits(source: OpenSource, unexpected: Sequence[str], model: ModelWrapper) -> str:
    """The next thing to type."""
    if source.named is None:
        return (
            "load it with the model and the converters it was saved from; another model begins in "
            f"a root of its own: LoadConfig(start=FromWeights(path='{source.uri}'))"
        )
    others = sorted({*model.owners(unexpected).values()} - {*source.owners})
    if others:
        owners = (*source.owners, *others)
        return f"to take these too: FromSources(sources=(Source(path=..., owners={owners}),))"
    return "name a folder of this very model in load.start, and its format: 'dcp', 'hf' or 'peft'"


def _fit_parts(source: OpenSource, states: Mapping[str, Any], ranks: Ranks) -> None:
    """Every value that a part asks for is there; what else the source holds of it is left alone."""
    flat = flatten_state_dict(dict(states))[0]
    gathered = ranks.gather((set(flat), _shapes_of(flat)))
    missing = sorted(set[str]().union(*(keys for keys, _ in gathered)) - source.shapes.keys())
    if missing:
        part = missing[0].partition(".")[0]
        has_some = any(key.startswith(f"{part}.") for key in source.shapes)
        raise StateDictError(
            f"the source lacks {len(missing)} values of {part}: {told(missing)}"
            if has_some
            else f"the source holds nothing of {part}",
            source.uri,
            _SAFE,
            f"load it with the {part} it was saved from, or without: {_without(part, source)}",
        )
    _refuse_other_shapes(source, {key: shape for _, one in gathered for key, shape in one.items()})


def _refuse_left_behind(source: OpenSource) -> None:
    """A run that goes on without its optimizer says so: nothing is left out in silence."""
    if source.left:
        raise StateDictError(
            f"the step holds {', '.join(source.left)}, and this run has no such part",
            source.uri,
            _SAFE,
            "give TrainingState these parts, or go on without: "
            f"LoadConfig(exclude={_excluding(source.left)})",
        )


def _without(part: str, source: OpenSource) -> str:
    if source.named is not None:
        return f"take {part} out of the parts in load.start"
    return f"LoadConfig(exclude={_excluding([part])})"


def _excluding(parts: Sequence[str]) -> tuple[str, ...]:
    """These parts, and the schedule with the optimizer into which it writes."""
    with_it = ("lr_scheduler",) if "optimizer" in parts else ()
    return tuple(dict.fromkeys((*parts, *with_it)))


def _shapes_of(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of those that are tensors; whole, however they are sharded."""
    return {key: tuple(v.shape) for key, v in values.items() if isinstance(v, Tensor)}


def _refuse_other_shapes(source: OpenSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    other = [
        f"{key} is {list(shape)} here and {list(held)} there"
        for key, shape in sorted(shapes.items())
        if (held := source.shapes[key]) is not None and held != shape
    ]
    if other:
        raise StateDictError(
            f"{len(other)} tensors have another shape in the source: {told(other)}",
            source.uri,
            _SAFE,
            "load it with a model of the same sizes",
        )


def _refuse_another(source: OpenSource, ranks: Ranks) -> None:
    """The source's files are whole, and they are the ones that a step was trained on."""
    if source.files is None:
        return
    damage = source.files.damage(ranks)
    if damage:
        raise IntegrityError(
            f"the source is damaged: {told(damage)}",
            source.uri,
            _SAFE,
            _RESTORE,
        )
    if source.expected is None or source.identified(ranks).digest == source.expected.digest:
        return
    raise IntegrityError(
        f"this is not the {source.expected.name} ({' and '.join(source.expected.owners)}, "
        f"{source.expected.format}) that the step was trained on: its files differ",
        source.uri,
        _SAFE,
        "name the original folder, or an exact copy, in load.start",
    )
