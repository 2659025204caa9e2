"""What holds for each converter, and for several at once; rows of EXAMPLES."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.manifest import ConverterEntry
from ray_ckpt.tensors.converters import (
    CONVERTERS,
    ModelConverter,
    make_converters,
    transform_for_export,
)
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.recording import TensorSpec, record
from tests.tensors.converters.examples import EXAMPLES
from tests.tensors.converters.models import make_model, same_bits, shard, train, whole
from tests.tensors.ranks import run

EVERY = pytest.mark.parametrize("example", EXAMPLES)


def make(example: str) -> tuple[ModelConverter, ...]:
    entries = [ConverterEntry(name=n, options=o) for n, o in EXAMPLES[example].items()]
    return make_converters(entries, {})


def trained(example: str) -> tuple[ModelWrapper, dict[str, Any]]:
    """On this rank alone."""
    converters = make(example)
    model = make_model(converters)
    train(model, range(3), converters)
    wrapper = ModelWrapper(model, converters=converters)
    return wrapper, wrapper.state_dict()


@EVERY
def test_saved_by_two_ranks_and_loaded_by_others_training_goes_on_with_the_same_bits(
    example: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "step-3")
    saved = run(_train_and_save, example, folder)
    loaded = run(_load_and_train, example, folder)
    for before, after in zip(saved, loaded, strict=True):
        assert same_bits(before["state"], after["state"])
        assert before["losses"] == after["losses"]
        assert same_bits(before["end"], after["end"])
        assert before["types"] == {"Tensor", "DTensor"} or before["types"] == {"DTensor"}


def _train_and_save(example: str, folder: str) -> dict[str, Any]:
    converters = make(example)
    model = shard(make_model(converters))
    train(model, range(3), converters)
    wrapper = ModelWrapper(model, converters=converters)
    state = wrapper.state_dict()
    facts = {"state": _whole(state), "types": _types(state)}
    dcp.save(state, checkpoint_id=folder)
    losses = train(model, range(3, 6), converters)
    return {**facts, "losses": losses, "end": _whole(wrapper.state_dict())}


def _load_and_train(example: str, folder: str) -> dict[str, Any]:
    converters = make(example)
    model = shard(make_model(converters, seed=1))
    wrapper = ModelWrapper(model, converters=converters)
    state = wrapper.state_dict()
    dcp.load(state, checkpoint_id=folder)
    wrapper.load_state_dict(state)
    loaded = _whole(wrapper.state_dict())
    losses = train(model, range(3, 6), converters)
    return {"state": loaded, "losses": losses, "end": _whole(wrapper.state_dict())}


@EVERY
def test_an_export_on_two_ranks_is_plain_and_leaves_the_model_as_it_was(example: str) -> None:
    plain = {key: (value.shape, value.dtype) for key, value in make_model().state_dict().items()}
    for facts in run(_export, example):
        assert facts["specs"] == plain
        assert facts["types"] == {"DTensor"}
        assert facts["unchanged"]
        assert facts["same as on one rank"]


def _export(example: str) -> dict[str, Any]:
    converters = make(example)
    model = shard(make_model(converters))
    train(model, range(3), converters)
    wrapper = ModelWrapper(model, converters=converters)
    before = _whole(wrapper.state_dict())
    exported = wrapper.state_dict("export")
    alone = transform_for_export(before, converters)
    return {
        "specs": {key: (value.shape, value.dtype) for key, value in exported.items()},
        "types": _types(exported),
        "unchanged": same_bits(before, _whole(wrapper.state_dict())),
        "same as on one rank": all(
            torch.allclose(whole(exported[key]), alone[key], atol=1e-6) for key in alone
        ),
    }


@EVERY
def test_export_takes_a_plain_dict_and_changes_neither_it_nor_its_tensors(example: str) -> None:
    wrapper, state = trained(example)
    given = {key: value.clone() for key, value in state.items()}
    copies, versions = dict(given), {key: value._version for key, value in given.items()}
    exported = transform_for_export(given, wrapper.converters)
    assert given.keys() == copies.keys()
    assert all(given[key] is copies[key] for key in copies)
    assert {key: value._version for key, value in given.items()} == versions
    assert same_bits(given, state)
    assert set(exported) == set(make_model().state_dict())
    assert {type(value) for value in exported.values()} == {Tensor}


@EVERY
def test_a_recorded_export_makes_the_same_bits(example: str) -> None:
    wrapper, state = trained(example)
    specs = {key: TensorSpec(shape=tuple(v.shape), dtype=v.dtype) for key, v in state.items()}
    recording = record(lambda sd: transform_for_export(sd, wrapper.converters), specs)
    replayed = recording.run(list(recording.outputs), lambda key: state[key])
    assert same_bits(replayed, transform_for_export(state, wrapper.converters))


@EVERY
def test_a_full_state_dict_is_safe_to_unpickle(example: str, tmp_path: Path) -> None:
    _, state = trained(example)
    path = tmp_path / "state.pt"
    torch.save(state, path)
    assert same_bits(torch.load(path, weights_only=True), state)
    assert {type(value) for value in state.values()} == {Tensor}


@EVERY
def test_every_key_has_one_owner_and_the_base_is_the_plain_model(example: str) -> None:
    wrapper, state = trained(example)
    assert set(wrapper.owners(state)) == set(state)
    assert set(wrapper.state_dict("base")) == set(make_model().state_dict())


@EVERY
def test_a_model_is_converted_once(example: str) -> None:
    model = make_model(make(example))
    for converter in make(example):
        with pytest.raises(ConfigError, match="in this order"):
            converter.convert(model)


@pytest.mark.parametrize(
    "order", [["ema", "lora"], ["lora", "qat"], ["lora", "float8"], ["ema", "qat"]]
)
def test_an_order_that_no_export_could_undo_is_refused(order: list[str]) -> None:
    options = {name: o for entries in EXAMPLES.values() for name, o in entries.items()}
    early, late = (CONVERTERS[name](**options[name]) for name in order)
    model = make_model([early])
    with pytest.raises(ConfigError, match=rf"{order[1]} cannot convert[\s\S]*in this order"):
        late.convert(model)


def _whole(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in state.items()}


def _types(state: Mapping[str, Any]) -> set[str]:
    """Of the tensors, and of the pieces they consist of."""
    pieces = [v.to_local() for v in state.values() if isinstance(v, DTensor)]
    assert {type(piece) for piece in pieces} <= {Tensor}
    return {type(value).__name__ for value in state.values()}
