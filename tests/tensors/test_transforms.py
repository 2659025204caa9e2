"""Transforms are pure: what goes in stays as it was, what comes out is cast and renamed."""

from typing import Any

import pytest
import torch

from ray_ckpt.core.errors import StateDictError, UsageError
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import rename
from ray_ckpt.tensors.transforms import TORCH_DTYPES, StateDictTransforms, cast_floating

ADAPTER = RuleAdapter("toy", [rename("a", "model.a"), rename("b", "model.b")])


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_floating_tensors_of_another_dtype_are_cast_and_all_others_are_the_very_same(
    dtype: torch.dtype,
) -> None:
    state_dict = {
        "double": torch.tensor([1.0, 2.5], dtype=torch.float64),
        "as it is": torch.tensor([1.0, 2.5], dtype=dtype),
        "integer": torch.tensor([1, 2]),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1j]),
    }
    cast = cast_floating(state_dict, dtype)
    assert cast.keys() == state_dict.keys()
    assert cast["double"].dtype == dtype
    assert torch.equal(cast["double"], state_dict["double"].to(dtype))
    assert [key for key in cast if cast[key] is state_dict[key]] == [
        "as it is",
        "integer",
        "bool",
        "complex",
    ]


def test_the_input_is_left_as_it_was() -> None:
    state_dict = {"a": torch.randn(3), "b": torch.tensor([1, 2])}
    before = {key: tensor.clone() for key, tensor in state_dict.items()}
    kept = dict(state_dict)
    StateDictTransforms(adapter=ADAPTER, dtype="bfloat16").to_hf(state_dict)
    assert state_dict.keys() == kept.keys()
    assert all(state_dict[key] is kept[key] for key in kept)
    assert all(torch.equal(state_dict[key], before[key]) for key in before)
    assert state_dict["a"].dtype == torch.float32


def test_an_export_is_cast_and_renamed_and_comes_back_in_the_models_dtype() -> None:
    transforms = StateDictTransforms(adapter=ADAPTER, dtype="bfloat16")
    native = {"a": torch.randn(3), "b": torch.tensor([1, 2])}
    hf = transforms.to_hf(native)
    assert {key: tensor.dtype for key, tensor in hf.items()} == {
        "model.a": torch.bfloat16,
        "model.b": torch.int64,
    }
    back = transforms.from_hf(hf, torch.float32)
    assert torch.equal(back["a"], native["a"].bfloat16().float())
    assert torch.equal(back["b"], native["b"])


class _Converter:
    """Adds a number, and has a format of its own if it is given one."""

    def __init__(self, name: str, number: float, adapter: RuleAdapter | None = None) -> None:
        self.name = name
        self._number = number
        self._adapter = adapter

    def state_dict_transform(self, state_dict):
        return {key: value * 2 + self._number for key, value in state_dict.items()}

    def state_dict_adapter(self, base):
        return self._adapter


def test_converters_are_undone_in_full_precision_the_last_conversion_first() -> None:
    converters: Any = (_Converter("first", 1.0), _Converter("second", 2**-9))
    transforms = StateDictTransforms(adapter=ADAPTER, dtype="bfloat16", converters=converters)
    value = torch.tensor([1.0])
    hf = transforms.to_hf({"a": value, "b": value})
    assert torch.equal(hf["model.a"], ((value * 2 + 2**-9) * 2 + 1).bfloat16())


def test_a_format_of_a_converters_own_takes_the_place_of_the_familys() -> None:
    own = RuleAdapter("own", [rename("a", "adapter.a"), rename("b", "adapter.b")])
    converters: Any = (_Converter("plain", 0), _Converter("own", 0, own))
    transforms = StateDictTransforms(adapter=ADAPTER, dtype="float32", converters=converters)
    assert set(transforms.to_hf({"a": torch.ones(1)})) == {"adapter.a"}


def test_two_formats_at_once_are_refused() -> None:
    own = RuleAdapter("own", [rename("a", "adapter.a")])
    converters: Any = (_Converter("lora", 0, own), _Converter("other", 0, own))
    transforms = StateDictTransforms(adapter=ADAPTER, converters=converters)
    with pytest.raises(UsageError, match="lora and other"):
        transforms.to_hf({"a": torch.ones(1)})


def test_a_whole_model_is_asked_for_by_name() -> None:
    transforms = StateDictTransforms(adapter=ADAPTER)
    assert set(transforms.to_hf({"a": torch.ones(1)})) == {"model.a"}
    with pytest.raises(StateDictError, match=r"expects 1 native tensors.*: b\n"):
        transforms.whole_to_hf({"a": torch.ones(1)})


def test_all_of_it_can_be_recorded() -> None:
    converters: Any = (_Converter("first", 1.0),)
    transforms = StateDictTransforms(adapter=ADAPTER, dtype="bfloat16", converters=converters)
    native = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    specs = {k: TensorSpec(shape=tuple(v.shape), dtype=v.dtype) for k, v in native.items()}
    recording = record(transforms.whole_to_hf, specs)
    made = recording.run(recording.outputs, native.__getitem__)
    assert all(torch.equal(made[key], value) for key, value in transforms.to_hf(native).items())
