"""Who writes what in a save: made of all ranks' columns, once, and good until one of them changes.

    what several ranks hold     is written by the one of them that has least to write
    what is written             must make up every tensor, each element once

The same as DCP's global plan, but for who writes what several ranks hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.coverage import badly_covered, in_groups
from ray_ckpt.tensors.save_columns import Columns, Entry, Ints, Paths, Table

_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)  # no slots: what follows from it is kept once it is known
class GlobalPlan:
    """Items [n] that are written: rank after rank, each rank's in its own order."""

    num_ranks: int
    all_entries: Sequence[Entry]
    paths: Paths
    """All ranks'; of two for one key the lower rank's."""
    ranks: npt.NDArray[np.int32]
    """Who writes the item."""
    entries: npt.NDArray[np.int32]
    offsets: Ints
    """[n, d], 0 in dimensions that the item has not."""
    sizes: Ints
    """[n, d], 1 there."""
    kept: Sequence[npt.NDArray[np.bool_]]
    """Of each rank's items, whether it writes them."""

    @classmethod
    def of(cls, table: Table, columns: Sequence[Columns]) -> "GlobalPlan":
        """The plan of all ranks' items.

        Raises:
            StateDictError: pieces do not make up a tensor, or something is a tensor on one rank
                and none on another.
        """
        entries, items = _together(table, columns)
        kept = _chosen(entries, items, len(columns))
        plan = cls(
            num_ranks=len(columns),
            all_entries=entries,
            paths={k: v for one in reversed([table, *columns]) for k, v in one.paths.items()},
            ranks=items.ranks[kept],
            entries=items.entries[kept],
            offsets=items.offsets[kept],
            sizes=items.sizes[kept],
            kept=np.split(kept, np.cumsum([len(one.entries) for one in columns])[:-1]),
        )
        plan._refuse_what_is_not_whole()
        return plan

    @property
    def starts(self) -> list[int]:
        """Where each rank's items begin; one more is their number."""
        return np.searchsorted(self.ranks, np.arange(self.num_ranks + 1)).tolist()

    @cached_property
    def num_bytes(self) -> list[int]:
        """Of the tensors that each rank writes; the rest of a save is small."""
        weights = self._facts.element_bytes[self.entries] * self.sizes.prod(axis=1)
        found = np.zeros(self.num_ranks, np.int64)
        np.add.at(found, self.ranks, weights)
        return found.tolist()

    @cached_property
    def by_name(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """An order of the items in which each name's stand together, and where each begins."""
        return in_groups([self._facts.names[self.entries]])

    @cached_property
    def first_entries(self) -> list[Entry]:
        """For each name, in the order of `by_name`, what its tensor is, or that it is a value."""
        order, starts = self.by_name
        return [self.all_entries[number] for number in self.entries[order[starts]].tolist()]

    @cached_property
    def shared_offsets(self) -> "Distinct":
        """Of each item, as many as it has dimensions."""
        return self._distinct(self.offsets)

    @cached_property
    def shared_sizes(self) -> "Distinct":
        """The same of its size."""
        return self._distinct(self.sizes)

    def _distinct(self, rows: Ints) -> "Distinct":
        depths = np.maximum(self._facts.depths[self.entries], 0)
        order, starts = in_groups([depths, *rows.T])
        first = order[starts]
        pairs = zip(rows[first].tolist(), depths[first].tolist(), strict=True)
        numbers = np.empty(len(order), np.int32)
        numbers[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
        return Distinct([tuple(row[:depth]) for row, depth in pairs], numbers)

    @cached_property
    def _facts(self) -> "_Facts":
        return _facts(self.all_entries)

    @property
    def named(self) -> Iterator[tuple[Entry, int, int]]:
        """Each name's first entry, and where in the order of `by_name` its items are."""
        order, starts = self.by_name
        ends = np.append(starts[1:], len(order))[: len(starts)]
        return zip(self.first_entries, starts.tolist(), ends.tolist(), strict=True)

    def _refuse_what_is_not_whole(self) -> None:
        order, starts = self.by_name
        counts = np.diff(np.append(starts, len(order)))
        owners = np.repeat(np.arange(len(starts)), counts)
        facts, entries = self._facts, self.entries[order]
        alone = ~facts.are_shards[entries] & (counts[owners] > 1)
        depths = facts.depths[entries]
        uneven = depths != depths[starts][owners] if len(starts) else alone
        if names := self._names(owners[alone | uneven].tolist()):
            raise _refusal(names, "is one thing on one rank and another on the next")
        shapes = _shapes(self.first_entries, self.sizes.shape[1])
        bad = badly_covered(owners, self.offsets[order], self.sizes[order], shapes)
        if names := self._names(bad):
            raise _refusal(names, "has pieces that overlap, or leave gaps, on these ranks")

    def _names(self, numbers: Sequence[int]) -> list[str]:
        return [self.first_entries[number].name for number in sorted(set(numbers))]


@dataclass(frozen=True, slots=True)
class Distinct:
    """Few values of many items."""

    values: Sequence[tuple[int, ...]]
    numbers: npt.NDArray[np.int32]
    """[n]: which of them."""


@dataclass(frozen=True, slots=True)
class _Items:
    """[n]: everything that every rank has, rank after rank."""

    ranks: npt.NDArray[np.int32]
    entries: npt.NDArray[np.int32]
    offsets: Ints
    sizes: Ints


@dataclass(frozen=True, slots=True)
class _Facts:
    """By an entry's number."""

    names: npt.NDArray[np.int32]
    depths: npt.NDArray[np.int32]
    """Number of dimensions; -1 for a value."""
    element_bytes: Ints
    are_shards: npt.NDArray[np.bool_]


def _facts(entries: Sequence[Entry]) -> _Facts:
    names: dict[str, int] = {}
    return _Facts(
        names=np.array([names.setdefault(e.name, len(names)) for e in entries], np.int32),
        depths=np.array([-1 if e.is_value else len(e.shape) for e in entries], np.int32),
        element_bytes=np.array([0 if e.is_value else e.dtype.itemsize for e in entries], np.int64),
        are_shards=np.array([e.is_shard for e in entries], bool),
    )


def _together(table: Table, columns: Sequence[Columns]) -> tuple[list[Entry], _Items]:
    numbers = {entry: number for number, entry in enumerate(table.entries)}
    shared = np.arange(len(numbers), dtype=np.int32)
    parts = list[npt.NDArray[np.int32]]()
    for one in columns:
        own = [numbers.setdefault(entry, len(numbers)) for entry in one.own]
        parts.append(np.concatenate([shared, np.array(own, np.int32)])[one.entries])
    ranks = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    depth = max(one.offsets.shape[1] for one in columns)
    items = _Items(
        ranks,
        np.concatenate(parts),
        _widened([one.offsets for one in columns], depth, 0),
        _widened([one.sizes for one in columns], depth, 1),
    )
    return list(numbers), items


def _widened(parts: Sequence[Ints], depth: int, rest: int) -> Ints:
    """All rows, [n, depth]."""
    found = np.full((sum(map(len, parts)), depth), rest, np.int64)
    begin = 0
    for part in parts:
        found[begin : begin + len(part), : part.shape[1]] = part
        begin += len(part)
    return found


def _chosen(entries: Sequence[Entry], items: _Items, num_ranks: int) -> npt.NDArray[np.bool_]:
    """Which items are written: of equal ones, the one whose rank has least to write by then.

    The largest ones come first, and so end most evenly; a value counts as one byte.
    """
    facts = _facts(entries)
    keys = [facts.names[items.entries], facts.depths[items.entries], *items.offsets.T]
    order, starts = in_groups(keys)
    counts = np.diff(np.append(starts, len(order)))
    weights = np.maximum(facts.element_bytes[items.entries] * items.sizes.prod(axis=1), 1)
    alone = order[starts[counts == 1]]
    kept = np.zeros(len(order), bool)
    kept[alone] = True
    loads = np.zeros(num_ranks, np.int64)
    np.add.at(loads, items.ranks[alone], weights[alone])
    shared = np.flatnonzero(counts > 1)
    shared = shared[np.argsort(-weights[order[starts[shared]]], kind="stable")]
    ranks = items.ranks[order]
    for start, count in zip(starts[shared].tolist(), counts[shared].tolist(), strict=True):
        chosen = order[start + loads[ranks[start : start + count]].argmin()]
        kept[chosen] = True
        loads[items.ranks[chosen]] += weights[chosen]
    return kept


def _shapes(entries: Sequence[Entry], depth: int) -> Ints:
    """[len(entries), depth]; 1 in dimensions that a tensor has not."""
    filler = (1,) * depth
    flat = [size for entry in entries for size in (*entry.shape, *filler[len(entry.shape) :])]
    return np.array(flat, np.int64).reshape(len(entries), depth)


def _refusal(names: Sequence[str], what: str) -> StateDictError:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return StateDictError(
        f"{', '.join(names[:_NUM_NAMED])}{more}: {what}",
        safe="nothing was written; older steps are untouched",
        do="give every rank the same state, each tensor sharded over the ranks that hold it",
    )
