"""Transforms are pure: what goes in stays as it was, what comes out is cast and renamed."""

import pytest
import torch

from ray_ckpt.tensors.rules import RuleAdapter, rename
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
