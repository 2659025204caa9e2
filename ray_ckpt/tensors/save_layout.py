"""Where the items of a save have come to lie: what each rank tells, and all of it together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ckpt.core.draft import Place
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.tensors.save_columns import Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Of one rank's items, in the order of its plan: often the same from save to save."""

    files: npt.NDArray[np.int32]
    """[n]: which of the rank's files."""
    begins: Ints
    lengths: Ints
    """[n], in bytes."""

    def equals(self, other: "Layout | None") -> bool:
        """Whether every item lies where the other says."""
        return other is not None and all(
            np.array_equal(mine, its)
            for mine, its in (
                (self.files, other.files),
                (self.begins, other.begins),
                (self.lengths, other.lengths),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one rank tells the coordinator when it has written."""

    files: Sequence[FileEntry]
    taken_over: Sequence[str]
    """Names of those whose bytes are an older step's."""
    layout: Layout | None
    """None where it is that of the last save."""
    non_finite: Sequence[str]
    """Names of weights with NaN or Inf in them."""
    places: Sequence[Place]
    """Where alone the files lie; none for those at the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the items of a plan lie, in its order."""

    names: Sequence[str]
    """Of the files."""
    files: npt.NDArray[np.int32]
    """[n]: which of them."""
    begins: Ints
    lengths: Ints

    @classmethod
    def of(cls, written: Sequence[Written], layouts: Sequence[Layout]) -> "Places":
        """Of all ranks."""
        counts = [len(one.files) for one in written]
        before = np.cumsum([0, *counts[:-1]]).astype(np.int32)
        files = [one.files + first for one, first in zip(layouts, before, strict=True)]
        return cls(
            names=[entry.path for one in written for entry in one.files],
            files=np.concatenate(files),
            begins=np.concatenate([one.begins for one in layouts]),
            lengths=np.concatenate([one.lengths for one in layouts]),
        )
