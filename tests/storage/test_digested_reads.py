"""The digest of a file is made of what was read of it, and no byte of that is read again."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage import digested_reads
from ray_ckpt.storage.digested_reads import DigestedReads, Range, apart
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.storage.disk.store import LocalStore

DATA = random.Random(0).randbytes(10_000)
WHOLE = digest_of(DATA, "crc64nvme")


class Counted(LocalStore):
    """Knows how many bytes were read."""

    num_bytes = 0

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        self.num_bytes += sum(buffer.nbytes for buffer in buffers)
        super().read_into_each(key, offset, buffers)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    folder = tmp_path_factory.mktemp("digested")
    (folder / "file").write_bytes(DATA)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(digested_reads, "_SMALL_BYTES", 101)
        yield Counted(str(folder))


def read(reads: DigestedReads, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    reads.read_into("file", begin, memoryview(buffer))
    return bytes(buffer)


SPANS = st.lists(
    st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))).map(sorted), max_size=6
)


@given(spans=SPANS, spans_elsewhere=SPANS)
def test_whatever_was_read_here_and_elsewhere_the_digest_is_that_of_the_file(
    store: Counted, spans: list[list[int]], spans_elsewhere: list[list[int]]
) -> None:
    here, elsewhere = DigestedReads(store), DigestedReads(store)
    for reads, of_it in ((here, spans), (elsewhere, spans_elsewhere)):
        for begin, end in of_it:
            assert read(reads, begin, end) == DATA[begin:end]
    assert here.digest("file", len(DATA), elsewhere.ranges("file")) == WHOLE


def test_only_what_nobody_has_read_is_read_in_the_end(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digested_reads, "_BLOCK_BYTES", 300)
    here, elsewhere = DigestedReads(store), DigestedReads(store)
    for begin, end in ((0, 2000), (1000, 2500), (2000, 5000), (9200, 9300)):
        read(here, begin, end)
    read(elsewhere, 5400, 9000)
    before = store.num_bytes
    assert here.digest("file", len(DATA), elsewhere.ranges("file")) == WHOLE
    assert store.num_bytes - before == 400 + 1000


def test_who_has_read_on_both_sides_of_a_border_is_no_rival(store: Counted) -> None:
    """Each has read a little of what the other has: only so much is read again, and no more."""
    one, other = DigestedReads(store), DigestedReads(store)
    for begin, end in ((0, 4000), (4000, 4100)):
        read(one, begin, end)
    for begin, end in ((4000, 4100), (4100, 10_000)):
        read(other, begin, end)
    before = store.num_bytes
    assert one.digest("file", len(DATA), other.ranges("file")) == WHOLE
    assert store.num_bytes == before


@given(spans=SPANS)
def test_of_ranges_with_bytes_in_common_the_longest_stay(spans: list[list[int]]) -> None:
    ranges = [Range(begin=begin, end=end, crc=0) for begin, end in spans if begin < end]
    taken = apart(ranges)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(taken))
    for each in ranges:
        rivals = [t for t in taken if t.begin < each.end and each.begin < t.end]
        assert each in taken or max(t.num_bytes for t in rivals) >= each.num_bytes


def test_one_other_bit_is_another_digest(store: Counted, tmp_path: Path) -> None:
    data = bytearray(DATA)
    data[7000] ^= 1
    (tmp_path / "file").write_bytes(data)
    for begin, end in ((0, 0), (6000, 8000), (0, 6999)):
        reads = DigestedReads(LocalStore(str(tmp_path)))
        read(reads, begin, end)
        assert reads.digest("file", len(DATA)) not in (WHOLE, "")


def test_a_file_that_ends_before_is_an_error(store: Counted) -> None:
    with pytest.raises(IntegrityError, match="ends before"):
        DigestedReads(store).digest("file", len(DATA) + 1)
