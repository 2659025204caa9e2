"""Pieces make up a tensor if a look at every single element says so."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.tensors.coverage import badly_covered, in_groups

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def _counted(box: Box, counts: dict[tuple[int, ...], int]) -> None:
    for place in itertools.product(*(range(o, o + s) for o, s in zip(*box, strict=True))):
        counts[place] = counts.get(place, 0) + 1


def _is_made_up(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    counts: dict[tuple[int, ...], int] = {}
    for box in boxes:
        _counted(box, counts)
    whole: dict[tuple[int, ...], int] = {}
    _counted(((0,) * len(shape), shape), whole)
    return counts == whole


def _cut(boxes: list[Box], dimension: int, at: int) -> list[Box]:
    """Every box that the plane goes through in two."""
    found: list[Box] = []
    for offsets, sizes in boxes:
        inside = at - offsets[dimension]
        if not 0 <= inside <= sizes[dimension]:
            found.append((offsets, sizes))
            continue
        for begin, size in ((0, inside), (inside, sizes[dimension] - inside)):
            moved, smaller = list(offsets), list(sizes)
            moved[dimension] += begin
            smaller[dimension] = size
            found.append((tuple(moved), tuple(smaller)))
    return found


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[Box], tuple[int, ...]]:
    """A shape and pieces of it, often with one that is lacking, doubled, moved or cut short."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4))):
        dimension = draw(st.integers(0, len(shape) - 1))
        boxes = _cut(boxes, dimension, draw(st.integers(0, shape[dimension])))
    number = draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = boxes[number]
    other = draw(st.integers(0, len(shape) - 1))
    moved = tuple(o + (d == other) for d, o in enumerate(offsets))
    shorter = tuple(s - (d == other and s > 0) for d, s in enumerate(sizes))
    change = draw(st.sampled_from(["none", "lacks", "twice", "moved", "shorter"]))
    faults: dict[str, list[Box]] = {
        "none": [boxes[number]],
        "lacks": [] if len(boxes) > 1 else [boxes[number]],
        "twice": [boxes[number]] * 2,
        "moved": [(moved, sizes)],
        "shorter": [(offsets, shorter)],
    }
    boxes[number : number + 1] = faults[change]
    return boxes, shape


@settings(max_examples=300, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=4))
def test_tensors_are_found_that_their_pieces_do_not_make_up(
    many: list[tuple[list[Box], tuple[int, ...]]],
) -> None:
    depth = max(len(shape) for _, shape in many)
    pieces = [(number, box) for number, (boxes, _) in enumerate(many) for box in boxes]

    def padded(row: tuple[int, ...], rest: int) -> list[int]:
        return [*row, *[rest] * (depth - len(row))]

    found = badly_covered(
        np.array([number for number, _ in pieces]),
        np.array([padded(offsets, 0) for _, (offsets, _) in pieces], np.int64),
        np.array([padded(sizes, 1) for _, (_, sizes) in pieces], np.int64),
        np.array([padded(shape, 1) for _, shape in many], np.int64),
    )
    expected = [n for n, (boxes, shape) in enumerate(many) if not _is_made_up(boxes, shape)]
    outside = {
        number
        for number, (offsets, sizes) in pieces
        if any(o + s > e for o, s, e in zip(offsets, sizes, many[number][1], strict=True))
    }
    assert set(found) == set(expected) | outside
    assert found == sorted(found)


@pytest.mark.parametrize("columns", [[[3, 1, 3, 1, 2]], [[0, 0, 0, 0, 0], [3, 1, 3, 1, 2]]])
def test_equal_rows_stand_together_in_their_own_order(columns: list[list[int]]) -> None:
    order, starts = in_groups([np.array(column) for column in columns])
    assert order.tolist() == [1, 3, 4, 0, 2]
    assert starts.tolist() == [0, 2, 3]
