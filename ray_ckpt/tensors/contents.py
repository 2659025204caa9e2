"""What one save holds: which tensors of the model, and what lies beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import BASE
from ray_ckpt.core.manifest import ModelEntry, NeededSource
from ray_ckpt.tensors.adapters.identity import IdentityAdapter
from ray_ckpt.tensors.converters import ModelConverter, entries_of
from ray_ckpt.tensors.model_wrapper import ModelWrapper, StateDictMode
from ray_ckpt.tensors.transforms import TORCH_DTYPES, cast_floating


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A state dict as DCP takes it, and what the manifest says of it."""

    state_dict: dict[str, Any]
    model: ModelEntry
    """Its keys are not filled in yet."""
    holds: Literal["everything", "model"] = "everything"
    needs: tuple[NeededSource, ...] = ()


def everything(
    model: ModelWrapper, parts: Mapping[str, Stateful], needs: tuple[NeededSource, ...]
) -> Contents:
    """The model as it trains, and all parts: what a resume needs.

    The base is left out where a converter says that saves hold an adapter alone.

    Raises:
        ConfigError: it says so, and no load has named the base.
    """
    tensors = model.state_dict()
    if saves_adapter(model):
        if not needs:
            raise ConfigError(
                "saves hold the adapter alone, and nothing says which base it belongs to",
                "converters",
                "nothing was saved",
                "call load(config=LoadConfig(start=FromWeights(path=...))) before the first save",
            )
        owner_of = model.owners(tensors)
        tensors = {key: tensor for key, tensor in tensors.items() if owner_of[key] != BASE}
    else:
        needs = ()
    states = {name: part.state_dict() for name, part in parts.items()}
    return Contents(state_dict={**tensors, **states}, model=_entry(model), needs=needs)


def model_as_it_trains(model: ModelWrapper) -> Contents:
    """Every tensor of the model and nothing else: a seed."""
    return Contents(state_dict=model.state_dict(), model=_entry(model), holds="model")


def exported_model(model: ModelWrapper, dtype: Dtype | None) -> Contents:
    """The model with every converter undone, cast if asked to, and nothing else."""
    tensors = model.state_dict(StateDictMode.EXPORT)
    if dtype is not None:
        tensors = cast_floating(tensors, TORCH_DTYPES[dtype])
    return Contents(state_dict=tensors, model=replace(_entry(model), converters=()), holds="model")


def refuse_own_formats(model: ModelWrapper) -> None:
    """Raises if a converter would leave something else than a model's own tensors.

    Raises:
        ConfigError: names it; nothing was saved.
    """
    for converter in model.converters:
        if converter.state_dict_adapter(IdentityAdapter()) is not None:
            raise ConfigError(
                f"the last save is to hold the model alone, and {converter.name} exports it in a "
                "format of its own",
                "save.last",
                "nothing was saved",
                "last = {kind = 'hf'}, or leave out the flavor of the converter",
            )


def saves_adapter(model: ModelWrapper) -> bool:
    """Whether a converter says that saves hold its own keys and not the base's."""
    return any(_saves(converter) == "adapter" for converter in model.converters)


def _saves(converter: ModelConverter) -> str:
    return converter.options().get("saves", "everything")


def _entry(model: ModelWrapper) -> ModelEntry:
    return ModelEntry(
        family=None, keys=(), converters=entries_of(model.converters), tied=model.tied
    )
