"""A file's digest from the ranges of it that were read anyway, by whoever read them.

    one process     |-------------------|    |------|
    another                    |--------|             |----------------|
    the file        |-------------------|gap||------|-|----------------|    each byte counts once

The checksum of a whole is made of those of its parts (`digests.joined`), so that what was digested
on its way into place is never read again; what nobody wanted is read at the end.
"""

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Ranges
from ray_ckpt.storage.digests import crc64_of, crc64_text, joined

_BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 64 << 10
"""Of what lies between two gaps: to read it with them is less work than to read them apart."""
_READS_AT_ONCE = 2
"""At least: on a disk one of them is digested while the other waits."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Range:
    """Bytes of one file that were read, and their checksum."""

    begin: int
    end: int
    crc: int

    @property
    def num_bytes(self) -> int:
        """How many they are."""
        return self.end - self.begin


class DigestedReads:
    """A store's reads of ranges, each digested as it arrives. Threads may share it."""

    def __init__(self, store: Ranges) -> None:
        self._store = store
        self._ranges: defaultdict[str, list[Range]] = defaultdict(list)
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """The store's."""
        return self._store.uri

    @property
    def reads_at_once(self) -> int:
        """The store's."""
        return self._store.reads_at_once

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """As the store does it."""
        self.read_into_each(key, offset, [buffer])

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """As the store does it."""
        self.read_parts(key, offset, [buffers])

    def read_parts(self, key: str, offset: int, parts: Sequence[Sequence[memoryview]]) -> None:
        """One read, of which each part is digested by itself."""
        self._store.read_into_each(key, offset, [buffer for part in parts for buffer in part])
        found: list[Range] = []
        for part in parts:
            found.append(_range_of(found[-1].end if found else offset, part))
        with self._lock:
            self._ranges[key] += found

    def ranges(self, key: str) -> list[Range]:
        """What was read of the file, in order, nothing twice."""
        with self._lock:
            found = set(self._ranges[key])
        return apart(found)

    def digest(self, key: str, size_bytes: int, others: Iterable[Range] = ()) -> str:
        """`crc64nvme:hex` of the whole file; reads what is in no range, neither here nor elsewhere.

        `others` are ranges that other processes have read.
        """
        taken = list(_worth_it(apart([*self.ranges(key), *others])))
        gaps = _blocks(_between(taken, size_bytes))
        num_threads = max(_READS_AT_ONCE, self._store.reads_at_once)
        read = at_once(lambda gap: self._read(key, *gap), gaps, num_threads=num_threads)
        value = 0
        for each in sorted([*taken, *read]):
            value = joined(value, each.crc, each.num_bytes)
        return crc64_text(value)

    def _read(self, key: str, begin: int, end: int) -> Range:
        buffer = memoryview(bytearray(end - begin))
        self._store.read_into_each(key, begin, [buffer])
        return _range_of(begin, [buffer])


def read_parts(reads: Ranges, key: str, offset: int, parts: Sequence[Sequence[memoryview]]) -> None:
    """One read into the buffers of several parts, each of which is digested by itself.

    So two who read many parts each, and one of them both, count no byte twice.
    """
    if isinstance(reads, DigestedReads):
        reads.read_parts(key, offset, parts)
    else:
        reads.read_into_each(key, offset, [buffer for part in parts for buffer in part])


def apart(ranges: Iterable[Range]) -> list[Range]:
    """Those of the ranges that have no byte in common, in order; of two that do the longer one."""
    taken: list[Range] = []
    for each in sorted(ranges, key=lambda r: (-r.num_bytes, r.begin)):
        at = bisect.bisect(taken, each)
        is_free = at == 0 or taken[at - 1].end <= each.begin
        is_free &= at == len(taken) or each.end <= taken[at].begin
        if is_free:
            taken.insert(at, each)
    return taken


def _range_of(begin: int, buffers: Sequence[memoryview]) -> Range:
    crc, end = 0, begin
    for buffer in buffers:
        crc = crc64_of(buffer, crc)
        end += buffer.nbytes
    return Range(begin=begin, end=end, crc=crc)


def _worth_it(ranges: Sequence[Range]) -> Iterator[Range]:
    """All but small ones that lie alone between two gaps."""
    run: list[Range] = []
    for each in [*ranges, None]:
        if run and (each is None or run[-1].end != each.begin):
            if run[-1].end - run[0].begin >= _SMALL_BYTES:
                yield from run
            run = []
        if each is not None:
            run.append(each)


def _between(ranges: Sequence[Range], size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where nothing was read: begin and end."""
    begins = [*(r.begin for r in ranges), size_bytes]
    for end_before, begin in zip([0, *(r.end for r in ranges)], begins, strict=True):
        if end_before < begin:
            yield end_before, begin


def _blocks(gaps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, none larger than a block."""
    return [
        (at, min(at + _BLOCK_BYTES, end))
        for begin, end in gaps
        for at in range(begin, end, _BLOCK_BYTES)
    ]
