"""Tensors that hold the elements of one input, in another order or type, and nothing else.

Most outputs of an export are such views: renamed, cast, cut out, their rows exchanged. They are
made block by block from the bytes on storage, without the input ever being in memory as a whole.

    [6, 4] of w, rows 2 and 3        View("w", offset=8, sizes=(8,), strides=(1,))
    w, rows 0 2 4 1 3 5              View("w", offset=0, sizes=(2, 3, 4), strides=(4, 8, 1))
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Elements of one input in row-major order of `sizes`, each cast in turn to `casts`."""

    source: str
    offset: int
    """Of the first one in the input, which is contiguous; in elements, like the strides."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    casts: tuple[torch.dtype, ...] = ()

    @property
    def num_elements(self) -> int:
        """Of the view."""
        return math.prod(self.sizes)

    @property
    def span(self) -> int:
        """Elements of the input from the first to the last one that is used."""
        reach = sum((n - 1) * stride for n, stride in zip(self.sizes, self.strides, strict=True))
        return 1 + reach if self.num_elements else 0

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one piece of its input, in order."""
        return self.strides in ((), (1,))

    def of(self, tensor: Tensor) -> "View | None":
        """What `tensor` is, which shares the memory of a contiguous tensor with these elements."""
        sizes, strides, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        if self.is_contiguous:
            return _merged(replace(self, offset=self.offset + offset, sizes=sizes, strides=strides))
        is_whole = offset == 0 and tensor.numel() == self.num_elements and tensor.is_contiguous()
        return self if is_whole else None

    def cast(self, dtype: torch.dtype) -> "View":
        """The same elements in another type."""
        return replace(self, casts=(*self.casts, dtype))

    def blocks(self, max_elements: int) -> Iterator["View"]:
        """Views that follow one upon the other and span at most so many elements of the input.

        One that spans more is left where no cut helps: in a transposed matrix every row reaches
        from one end of the input to the other.
        """
        if self.span <= max_elements or not self.sizes:
            yield self
            return
        inner = replace(self, sizes=self.sizes[1:], strides=self.strides[1:])
        count, stride = self.sizes[0], self.strides[0]
        if inner.span > max_elements and stride > 0 and inner.span <= stride:
            for index in range(count):
                yield from replace(inner, offset=self.offset + index * stride).blocks(max_elements)
            return
        step = max(1, (max_elements - inner.span) // max(1, stride) + 1)
        if inner.span > max_elements:
            step = count
        for first in range(0, count, step):
            num = min(step, count - first)
            yield replace(self, offset=self.offset + first * stride, sizes=(num, *self.sizes[1:]))

    def taken(self, elements: Tensor) -> Tensor:
        """The tensor, from the `span` elements of the input that begin at `offset`."""
        taken = elements.as_strided(self.sizes, self.strides)
        for dtype in self.casts:
            taken = taken.to(dtype)
        return taken


def whole(source: str, shape: Sequence[int]) -> View:
    """All elements of an input of this shape, as they are."""
    return View(source=source, offset=0, sizes=(math.prod(shape),), strides=(1,))


def _merged(view: View) -> View:
    """The same elements in as few dimensions as possible."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(view.sizes, view.strides, strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if not sizes:
        sizes, strides = [min(1, view.num_elements)], [1]
    return replace(view, sizes=tuple(sizes), strides=tuple(strides))
