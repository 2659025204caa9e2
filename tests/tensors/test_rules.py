"""A table of rules speaks for every tensor, in both directions, or names the one it does not."""

import pytest
import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.rules import (
    RuleAdapter,
    halves_to_interleaved,
    interleaved_to_halves,
    rename,
    rotary,
)

ADAPTER = RuleAdapter(
    "toy",
    [
        rename("embed", "model.embed"),
        rename("layers.{n}.w", "model.blocks.{n}.weight"),
        rotary("layers.{n}.q", "model.blocks.{n}.q_proj", num_heads=2),
    ],
)


def _native() -> dict[str, Tensor]:
    return {
        "embed": torch.randn(5, 4),
        **{f"layers.{n}.w": torch.randn(4, 4) for n in (0, 1, 10)},
        **{f"layers.{n}.q": torch.randn(8, 4) for n in (0, 1, 10)},
    }


def test_names_are_exchanged_and_layer_numbers_kept() -> None:
    assert set(ADAPTER.to_hf(_native())) == {
        "model.embed",
        *(f"model.blocks.{n}.weight" for n in (0, 1, 10)),
        *(f"model.blocks.{n}.q_proj" for n in (0, 1, 10)),
    }


def test_there_and_back_is_the_same_bit_for_bit() -> None:
    native = _native()
    back = ADAPTER.from_hf(ADAPTER.to_hf(native))
    assert back.keys() == native.keys()
    assert all(torch.equal(back[key], native[key]) for key in native)


@pytest.mark.parametrize("direction", [ADAPTER.to_hf, ADAPTER.from_hf])
def test_every_tensor_without_a_rule_is_named(direction) -> None:
    state_dict = {"layers.0.lora": torch.zeros(1), "stranger": torch.zeros(1)}
    with pytest.raises(StateDictError, match=r"toy.*layers\.0\.lora, stranger"):
        direction(state_dict)


def test_a_name_must_match_as_a_whole() -> None:
    for name in ("layers.0.w.scale", "my.layers.0.w", "layers.x.w", "layers.0xw"):
        with pytest.raises(StateDictError, match=name):
            ADAPTER.to_hf({name: torch.zeros(1)})


def test_a_rule_that_matches_nothing_is_named_for_a_whole_model() -> None:
    keys = [key for key in _native() if not key.endswith(".q")]
    with pytest.raises(StateDictError, match=r"toy.*layers\.\{n\}\.q"):
        ADAPTER.sources(keys)


def test_sources_name_every_key_once_in_the_models_order() -> None:
    keys = list(_native())
    sources = ADAPTER.sources(keys)
    assert list(sources) == list(ADAPTER.to_hf(_native()))
    assert [native for natives in sources.values() for native in natives] == keys


def test_rotary_rows_of_each_head_are_sorted_into_halves() -> None:
    rows = torch.arange(8.0)[:, None]
    assert interleaved_to_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved_to_halves(rows, 1).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_orders_of_rotary_rows_undo_each_other(num_heads: int, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 3).to(dtype)
    before = weight.clone()
    there = interleaved_to_halves(weight, num_heads)
    assert (there.shape, there.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(halves_to_interleaved(there, num_heads), weight)
    assert torch.equal(
        interleaved_to_halves(halves_to_interleaved(weight, num_heads), num_heads), weight
    )
    assert torch.equal(weight, before)
