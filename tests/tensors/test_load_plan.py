"""Whoever cut a tensor how: each element that a rank holds comes from the piece that has it."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ray_ckpt.tensors import load_plan
from ray_ckpt.tensors.load_plan import Part, plan_load, reads_of
from ray_ckpt.tensors.save_columns import padded
from ray_ckpt.tensors.step_index import StepIndex

Box = tuple[tuple[int, int], ...]
"""Begin and end in each dimension."""


def cut(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes between the cuts; empty ones too, as of ranks that have nothing."""
    edges = [sorted({0, n, *(c % (n + 1) for c in cs)}) for n, cs in zip(shape, cuts, strict=True)]
    spans = [list(itertools.pairwise(edge)) or [(0, 0)] for edge in edges]
    return list(itertools.product(*spans))


def index_of(tensors: dict[str, tuple[Tensor, list[Box]]]) -> StepIndex:
    """Each box of each tensor is a piece, one after the other in one file."""
    boxes = [box for _, of_one in tensors.values() for box in of_one]
    depth = max((len(box) for box in boxes), default=0)
    lengths = np.arange(1, len(boxes) + 1)
    return StepIndex(
        names=list(tensors),
        shapes=[tuple(tensor.shape) for tensor, _ in tensors.values()],
        dtypes=[tensor.dtype for tensor, _ in tensors.values()],
        starts=np.cumsum([0, *(len(of_one) for _, of_one in tensors.values())]),
        offsets=padded([[begin for begin, _ in box] for box in boxes], depth, 0),
        sizes=padded([[end - begin for begin, end in box] for box in boxes], depth, 1),
        files=["file"],
        file_numbers=np.zeros(len(boxes), np.int32),
        begins=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )


def taken(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(begin, end) for begin, end in box)]


CUTS = st.lists(st.integers(0, 12), max_size=3)


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    data=st.data(),
    at_once=st.sampled_from([1, 5, 1 << 18]),
)
@settings(deadline=None)
def test_what_a_rank_holds_is_filled_from_whatever_was_saved(
    shapes: list[list[int]], data: st.DataObject, at_once: int
) -> None:
    saved: dict[str, tuple[Tensor, list[Box]]] = {}
    parts: list[tuple[str, Box]] = []
    for number, shape in enumerate(shapes):
        whole = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape)
        cuts = data.draw(st.tuples(*(CUTS for _ in shape)))
        saved[f"w{number}"] = whole, cut(shape, cuts)
        others = data.draw(st.tuples(*(CUTS for _ in shape)))
        parts += [(f"w{number}", box) for box in cut(shape, others)]
    index = index_of(saved)
    held = [
        Part(
            name=name,
            number=index.numbers[name],
            local=torch.zeros_like(taken(saved[name][0], box)),
            offsets=[begin for begin, _ in box],
        )
        for name, box in parts
    ]
    before, load_plan._PAIRS_AT_ONCE = load_plan._PAIRS_AT_ONCE, at_once
    try:
        reads = reads_of(index, held)
    finally:
        load_plan._PAIRS_AT_ONCE = before
    for read in reads:
        whole, boxes = saved[read.name]
        piece = taken(whole, boxes[read.piece - index.pieces(read.number)[0]])
        begins = zip(read.offsets, read.sizes, strict=True)
        read.target.copy_(piece[tuple(slice(at, at + n) for at, n in begins)])
        assert tuple(read.target.shape) == read.sizes
    assert [read.piece for read in reads] == sorted(read.piece for read in reads), "as they lie"
    for part, (name, box) in zip(held, parts, strict=True):
        assert torch.equal(part.local, taken(saved[name][0], box))
    num_elements = sum(part.local.numel() for part in held)
    assert sum(read.target.numel() for read in reads) == num_elements, "none comes twice"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"other": torch.zeros(2)}, "there is no other"),
        ({"w": torch.zeros(3)}, r"w is \[3\] here and \[2\] there"),
        ({"w": 0.5}, "w is a tensor there and float here"),
    ],
)
def test_what_does_not_fit_is_told(held: dict[str, object], says: str) -> None:
    index = index_of({"w": (torch.zeros(2), [((0, 2),)])})
    with pytest.raises(ValueError, match=says):
        plan_load(index, held, lambda _: True)


def test_another_rank_s_part_is_left_to_it() -> None:
    index = index_of({"w": (torch.zeros(2), [((0, 2),)])})
    assert plan_load(index, {"w": torch.zeros(2)}, lambda _: False).reads == []
