"""Rows change places and come back, for weights and for biases."""

import pytest
import torch

from ray_ckpt.tensors.layouts import (
    halves_to_interleaved,
    interleaved_to_halves,
    join_alternating,
    join_qkv,
    split_alternating,
    split_qkv,
)


def test_rotary_rows_of_each_head_are_sorted_into_halves() -> None:
    rows = torch.arange(8.0)[:, None]
    assert interleaved_to_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved_to_halves(rows, 1).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(16, 3), (16,)], ids=["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_orders_of_rotary_rows_undo_each_other(
    num_heads: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape).to(dtype)
    before = tensor.clone()
    there = interleaved_to_halves(tensor, num_heads)
    assert (there.shape, there.dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(halves_to_interleaved(there, num_heads), tensor)
    assert torch.equal(
        interleaved_to_halves(halves_to_interleaved(tensor, num_heads), num_heads), tensor
    )
    assert torch.equal(tensor, before)


def test_a_bias_is_reordered_as_the_weight_is() -> None:
    weight = torch.randn(12, 5)
    assert torch.equal(
        interleaved_to_halves(weight, 3)[:, 0], interleaved_to_halves(weight[:, 0], 3)
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slices_that_take_turns_are_parted_and_put_back(dim: int) -> None:
    fused = torch.randn(6, 6, 6)
    parts = split_alternating(fused, dim, 3)
    assert torch.equal(parts[1], fused.index_select(dim, torch.tensor([1, 4])))
    assert torch.equal(join_alternating(parts, dim), fused)


@pytest.mark.parametrize("shape", [(32, 3), (32,)], ids=["weight", "bias"])
def test_fused_projections_are_parted_by_head_and_put_back(shape: tuple[int, ...]) -> None:
    fused = torch.randn(shape)
    parts = split_qkv(fused, num_heads=4, num_kv_heads=2)
    assert [part.shape[0] for part in parts] == [16, 8, 8]
    assert torch.equal(parts[0][:8], fused[:8])
    assert torch.equal(parts[1][:4], fused[8:12])
    assert torch.equal(join_qkv(parts, num_kv_heads=2), fused)
