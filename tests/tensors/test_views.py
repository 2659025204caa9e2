"""Which outputs of a transform are views of one input, and that a view is made block by block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_ckpt.tensors.layouts import (
    interleaved_to_halves,
    split_alternating,
    split_qkv,
    swap_last_two,
    unstack,
)
from ray_ckpt.tensors.recording import Recording, TensorSpec, record

INPUTS = {"w": torch.arange(48.0).view(8, 6), "e": torch.arange(60.0).view(3, 4, 5)}
VIEWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the same": lambda w, e: w,
    "cast": lambda w, e: w.to(torch.bfloat16),
    "cast twice": lambda w, e: w.half().to(torch.bfloat16),
    "rows of a rotary embedding": lambda w, e: interleaved_to_halves(w, 2),
    "the same, cast": lambda w, e: interleaved_to_halves(w.bfloat16(), 2),
    "transposed": lambda w, e: swap_last_two(w),
    "one of a stack": lambda w, e: list(unstack(e))[1],
    "a part of fused rows": lambda w, e: next(iter(split_qkv(w, 2, 1))),
    "every other column": lambda w, e: list(split_alternating(e, 1, 2))[1],
    "reshaped": lambda w, e: e.reshape(12, 5)[3:7],
    "one element": lambda w, e: w[2, 3],
    "none": lambda w, e: w[:0],
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "computed": lambda w, e: w + 1,
    "of two": lambda w, e: torch.cat([w.reshape(-1), e.reshape(-1)]),
    "gathered": lambda w, e: w[[0, 2, 1]],
    "written in place": lambda w, e: w.clone().mul_(2),
    "seen as another type": lambda w, e: w.view(torch.int32),
    "a constant": lambda w, e: torch.ones(2),
    "negated": lambda w, e: torch.neg(w),
    "padded": lambda w, e: torch.nn.functional.pad(w, (0, 1)),
    "expanded": lambda w, e: w[0].expand(3, 6).clone() * 1,
}


def _recorded(make: Callable[[Tensor, Tensor], Tensor]) -> Recording:
    specs = {k: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for k, t in INPUTS.items()}
    return record(lambda sd: {"out": make(sd["w"], sd["e"])}, specs)


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("max_elements", [1, 4, 7, 1000])
def test_a_view_is_made_from_blocks_that_follow_one_upon_the_other(
    make: Callable[[Tensor, Tensor], Tensor], max_elements: int
) -> None:
    view = _recorded(make).outputs["out"].view
    assert view is not None
    flat = INPUTS[view.source].reshape(-1)
    made = [
        block.taken(flat[block.offset : block.offset + block.span]).reshape(-1)
        for block in view.blocks(max_elements)
    ]
    expected = make(INPUTS["w"], INPUTS["e"])
    assert torch.equal(torch.cat(made), expected.reshape(-1))


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_blocks_span_no_more_than_asked_for_where_a_cut_helps(
    make: Callable[[Tensor, Tensor], Tensor],
) -> None:
    view = _recorded(make).outputs["out"].view
    assert view is not None
    is_transposed = view.sizes == (6, 8)
    assert is_transposed == any(block.span > 24 for block in view.blocks(24))


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_more_than_a_view_is_not_taken_for_one(
    make: Callable[[Tensor, Tensor], Tensor],
) -> None:
    assert _recorded(make).outputs["out"].view is None
