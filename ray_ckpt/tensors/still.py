"""Which tensors stand still from save to save, so that their file need not be written again.

    save 1    everything in one file: what each tensor's bytes are is known from now on
    save 2    who is the same joins the still file; the rest is the moving file
    save 3    nobody in the still file has moved: the file is taken over from save 2 as it is

A tensor joins once it was the same for as many saves in a row as its patience says, 1 at first.
Whoever was expected to be the same and is not has twice the patience from then on, so that who
moves to and fro stays in the moving file. Who moves leaves the still file, which is then written
anew. Who joins waits until all who wait are a quarter of it, or until it is written anew anyway.

Knows digests, not tensors: who computes them, and who writes, is somebody else's.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import MetadataIndex

from ray_ckpt.storage.commit import Kept

LEAST_BYTES = 8 << 20
"""A smaller still file costs as much, in one more file to make and to link, as it spares."""
_SHARE_TO_JOIN = 4
"""Who joins has one byte for this many of those that are written again for it, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the last save knows of one tensor."""

    digest: str
    """Of the item as it lies in a shard: dtype, shape and every element."""
    num_bytes: int
    is_sound: bool
    """False for a weight with NaN or Inf in it."""
    num_same: int = 0
    """So many saves in a row found it as the one before had it."""
    patience: int = 1
    """After so many of them it joins the still file."""

    def after(self, now: "Seen", *, was_expected: bool) -> "Seen":
        """What is known once a save has found it as `now`; `was_expected` to be the same."""
        if now.digest == self.digest:
            num_same, patience = self.num_same + 1, self.patience
        else:
            num_same, patience = 0, self.patience * (2 if was_expected else 1)
        return Seen(
            digest=now.digest,
            num_bytes=now.num_bytes,
            is_sound=now.is_sound,
            num_same=num_same,
            patience=patience,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StillFile:
    """The file of the last save that holds what stands still."""

    kept: Kept
    places: Mapping[MetadataIndex, tuple[int, int]]
    """Where each item begins in it, and its length, in bytes."""
    num_steps: int
    """That share its bytes: the one that wrote it, and those that took it over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What one rank knows when a save of its own has ended well."""

    seen: Mapping[MetadataIndex, Seen] = field(default_factory=dict[MetadataIndex, Seen])
    """Of every plain tensor."""
    file: StillFile | None = None

    @property
    def members(self) -> Collection[MetadataIndex]:
        """Tensors in the still file."""
        return self.file.places.keys() if self.file else ()

    def expected(self) -> set[MetadataIndex]:
        """Tensors that are worth a look before anything is written: they may be the same."""
        ripe = {index for index, one in self.seen.items() if one.num_same + 1 >= one.patience}
        return {*ripe, *self.members}

    def divide(self, looked: Mapping[MetadataIndex, str], *, full_every_saves: int) -> "Division":
        """Which tensors go to the still file now; `looked` has the digests of those expected."""
        same = {index for index, digest in looked.items() if self.seen[index].digest == digest}
        staying = same.intersection(self.members)
        joining = same - staying
        if self.file is not None and len(staying) == len(self.file.places):
            is_young = self.file.num_steps < full_every_saves
            if is_young and _SHARE_TO_JOIN * self._num_bytes(joining) < self._num_bytes(staying):
                return Division(still=frozenset(staying), same=frozenset(same), file=self.file)
        still = same if self._num_bytes(same) >= LEAST_BYTES else set[MetadataIndex]()
        return Division(still=frozenset(still), same=frozenset(same))

    def after(
        self, found: Mapping[MetadataIndex, Seen], *, expected: Collection[MetadataIndex]
    ) -> dict[MetadataIndex, Seen]:
        """`seen`, once a save has found all these."""
        return {
            index: before.after(now, was_expected=index in expected)
            if (before := self.seen.get(index))
            else now
            for index, now in found.items()
        }

    def _num_bytes(self, indexes: Collection[MetadataIndex]) -> int:
        return sum(self.seen[index].num_bytes for index in indexes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Which tensors of a save go where."""

    still: frozenset[MetadataIndex]
    """To the still file; all others to the moving one."""
    same: frozenset[MetadataIndex]
    """As the save before had them, as far as anybody looked."""
    file: StillFile | None = None
    """Holds just the still ones already; None if they are to be written."""


NOTHING = Knowledge()


class Memory:
    """What a rank knows from save to save, as long as the one who writes them lives."""

    def __init__(self) -> None:
        self._kept = NOTHING
        self.known = NOTHING
        """What the save before this one has kept."""
        self.is_refused = False
        """Whether the place has said that no file can be taken over there."""

    def begin(self) -> None:
        """A save begins: should it not end well, nothing is known to the next one."""
        self.known, self._kept = self._kept, NOTHING

    def keep(self, knowledge: Knowledge) -> None:
        """For the next save; this one has ended well."""
        self._kept = knowledge
