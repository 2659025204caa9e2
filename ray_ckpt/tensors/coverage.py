"""Whether pieces make up whole tensors: every element once, none twice. Numbers alone.

A box is told by its corners: +1 where it begins, -1 where it ends, and the product over its
dimensions. Boxes tile the whole exactly if their corners and the whole's, taken away, cancel out
everywhere. That needs one sort, whatever the pieces look like.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ray_ckpt.tensors.save_columns import Ints

Numbers = npt.NDArray[np.integer]


def in_groups(columns: Sequence[Numbers]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """An order of rows in which equal ones stand together, and where in it each group begins.

    Groups come in the order of `columns`, rows of one group in their own.
    """
    count = len(columns[0])
    telling = [column for column in columns if column.any()]
    order = np.lexsort(telling[::-1]) if telling else np.arange(count)
    is_first = np.zeros(count, bool)
    is_first[:1] = True
    for column in telling:
        placed = column[order]
        is_first[1:] |= placed[1:] != placed[:-1]
    return order, np.flatnonzero(is_first)


def badly_covered(owners: Numbers, offsets: Ints, sizes: Ints, shapes: Ints) -> list[int]:
    """Numbers of the tensors that their pieces do not make up, ascending.

    Args:
        owners: [n], of each piece; a tensor's number is its row in `shapes`.
        offsets, sizes: [n, d].
        shapes: [m, d]; dimensions that a tensor has not are 1 in it and in its pieces' sizes.
    """
    ends = offsets + sizes
    is_outside = ((offsets < 0) | (sizes < 0) | (ends > shapes[owners])).any(axis=1)
    outside = set(owners[is_outside].tolist())
    is_telling = ~_is_simple(owners, offsets, sizes, shapes)[owners]
    owner, offset, end = owners[is_telling], offsets[is_telling], ends[is_telling]
    sign = np.ones(len(owner), np.int64)
    wholes = np.unique(owner)
    is_split = np.zeros(shapes.shape, bool)
    np.logical_or.at(is_split, owner, (offset != 0) | (end != shapes[owner]))
    owner = np.concatenate([owner, wholes])
    offset = np.concatenate([offset, np.zeros_like(shapes[wholes])])
    end = np.concatenate([end, shapes[wholes]])
    sign = np.concatenate([sign, -np.ones(len(wholes), np.int64)])
    rows, corners = np.arange(len(owner)), list[Ints]()
    for dimension in range(shapes.shape[1]):
        doubles = is_split[owner[rows], dimension]
        begins = np.where(doubles, offset[rows, dimension], 0)
        stops = end[rows[doubles], dimension]
        corners = [np.concatenate([corner, corner[doubles]]) for corner in corners]
        corners.append(np.concatenate([begins, stops]))
        sign = np.concatenate([sign, -sign[doubles]])
        rows = np.concatenate([rows, rows[doubles]])
    if not len(rows):
        return sorted(outside)
    order, starts = in_groups([owner[rows], *corners])
    is_left = np.add.reduceat(sign[order], starts) != 0
    return sorted(outside | set(owner[rows][order[starts[is_left]]].tolist()))


def _is_simple(owners: Numbers, offsets: Ints, sizes: Ints, shapes: Ints) -> npt.NDArray[np.bool_]:
    """[m]: whether the tensor is one piece, or has no element at all."""
    counts = np.bincount(owners, minlength=len(shapes))
    is_whole = ((offsets == 0) & (sizes == shapes[owners])).all(axis=1)
    found = np.zeros(len(shapes), bool)
    found[owners] = is_whole & (counts[owners] == 1)
    return found | (shapes == 0).any(axis=1)
