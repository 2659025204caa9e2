"""A load reads what it needs of each chunk, straight into place, whatever is wanted of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors import chunks as chunks_module
from ray_ckpt.tensors.chunks import Chunk, Chunks
from ray_ckpt.tensors.framing import HEAD_BYTES
from ray_ckpt.tensors.load_into import load_into
from ray_ckpt.tensors.load_plan import LoadPlan, Read
from ray_ckpt.tensors.reader import DcpReader
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import around
from ray_ckpt.tensors.values import Values

WHOLE = torch.arange(512 * 600, dtype=torch.float32).reshape(512, 600)
VALUES = {"lr": 0.1, "betas": (0.9, 0.999), "names": ["a"], "none": None}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Part = tuple[slice, slice]
ALL = slice(None)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    dcp.save(
        {"w": WHOLE, "turned": WHOLE.t(), **VALUES}, checkpoint_id=tmp_path / "step", no_dist=True
    )
    return tmp_path / "step"


@pytest.fixture
def num_bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many each read took."""
    taken: list[int] = []
    read_into_each = LocalStore.read_into_each

    def counted(self: LocalStore, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        taken.append(sum(buffer.nbytes for buffer in buffers))
        read_into_each(self, key, offset, buffers)

    monkeypatch.setattr(LocalStore, "read_into_each", counted)
    return taken


def read(step: Path, key: str, part: Part, into: Tensor) -> None:
    reader = DcpReader(LocalStore(str(step.parent)), step.name, digests=None)
    number = reader.index.numbers[key]
    begins = [p.indices(n)[0] for p, n in zip(part, reader.index.shapes[number], strict=True)]
    wanted = Read(
        name=key,
        number=number,
        piece=reader.index.pieces(number)[0],
        offsets=tuple(begins),
        sizes=tuple(into.shape),
        target=into,
    )
    progress = Told()
    values = Values(reader.uri, runs_pickles=False)
    reader.read(LoadPlan(reads=[wanted], values=[]), {key: into}, values, progress)
    assert progress.num_bytes == into.nbytes


class Told(Progress):
    """How many bytes have arrived."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


def _stored(step: Path, key: str) -> tuple[str, int, int]:
    """File, first byte and length of the tensor, with what frames it."""
    index = DcpReader(LocalStore(str(step.parent)), step.name, digests=None).index
    return index.place(index.pieces(index.numbers[key])[0])


def _bytes_in_front(tensor: Tensor) -> int:
    return len(around(TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype))[0])


@pytest.mark.parametrize(
    ("part", "most"),
    [
        pytest.param((ALL, ALL), 1.0, id="all of it"),
        pytest.param((slice(128, 256), ALL), 1.0, id="rows"),
        pytest.param((slice(3, 4), ALL), 1.0, id="one row"),
        pytest.param((ALL, slice(0, 300)), 2.0, id="narrow columns come with what lies between"),
        pytest.param((slice(10, 20), slice(5, 7)), 300.0, id="a corner"),
    ],
)
def test_a_part_is_read(step: Path, part: Part, most: float, num_bytes_read: list[int]) -> None:
    into = torch.zeros_like(WHOLE[part]).contiguous()
    read(step, "w", part, into)
    assert torch.equal(into, WHOLE[part])
    assert sum(num_bytes_read) <= most * into.nbytes + HEAD_BYTES


def test_wide_rows_are_read_one_by_one(tmp_path: Path, num_bytes_read: list[int]) -> None:
    wide = torch.arange(4 * 50_000, dtype=torch.float32).reshape(4, 50_000)
    dcp.save({"w": wide}, checkpoint_id=tmp_path / "wide", no_dist=True)
    into = torch.zeros(4, 20_000)
    read(tmp_path / "wide", "w", (ALL, slice(30_000, 50_000)), into)
    assert torch.equal(into, wide[:, 30_000:])
    to_the_end = 80_000 + _stored(tmp_path / "wide", "w")[2] - wide.nbytes - _bytes_in_front(wide)
    assert sorted(num_bytes_read) == [HEAD_BYTES, *[80_000] * 3, to_the_end]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.zeros(512, 600, dtype=torch.float64), id="another dtype"),
        pytest.param(lambda: torch.zeros(600, 512).t(), id="another order in memory"),
        pytest.param(lambda: torch.zeros(512, 1200)[:, ::2], id="gaps"),
    ],
)
def test_what_cannot_be_read_in_place_is_copied(step: Path, make: Callable[[], Tensor]) -> None:
    into = make()
    read(step, "w", (ALL, ALL), into)
    assert torch.equal(into, WHOLE.to(into.dtype))


def test_what_is_framed_in_another_way_is_left_to_torch(step: Path) -> None:
    into = torch.zeros(600, 512)
    read(step, "turned", (ALL, ALL), into)
    assert torch.equal(into, WHOLE.t())


def test_large_pieces_are_read_block_by_block(
    step: Path, monkeypatch: pytest.MonkeyPatch, num_bytes_read: list[int]
) -> None:
    monkeypatch.setattr("ray_ckpt.tensors.piece_reads.BLOCK_BYTES", 100_000)
    into = torch.zeros_like(WHOLE)
    read(step, "w", (ALL, ALL), into)
    assert torch.equal(into, WHOLE)
    _, _, length = _stored(step, "w")
    assert length <= sum(num_bytes_read) <= length + HEAD_BYTES, "its frame comes with it"
    assert max(num_bytes_read) < 100_000 + HEAD_BYTES
    assert chunks_module.BLOCK_BYTES == 8 << 20


def test_values_come_together(step: Path, num_bytes_read: list[int]) -> None:
    state: dict[str, Any] = dict.fromkeys(VALUES)
    load_into(state, DcpReader(LocalStore(str(step.parent)), step.name, digests=None))
    assert state == VALUES
    assert len(num_bytes_read) == 1


def test_what_is_framed_in_another_way_of_the_same_length_is_found_by_its_head(
    step: Path,
) -> None:
    """Nothing but the look of what stands before the elements tells it."""
    chunks = Chunks(LocalStore(str(step.parent)))
    file = next(step.glob("*.distcp"))
    _, begin, length = _stored(step, "w")
    data = bytearray(file.read_bytes())
    name = data.index(b"archive/", begin, begin + HEAD_BYTES)
    data[name : name + 7] = b"another"
    file.write_bytes(data)
    spec = TensorSpec(shape=tuple(WHOLE.shape), dtype=WHOLE.dtype)
    chunk = Chunk.of(f"{step.name}/{file.name}", begin, length, spec, is_plain=True)
    assert chunk.frame is not None
    into = torch.zeros(WHOLE.numel())
    chunks.read(chunk, 0, into)
    assert torch.equal(into.view_as(WHOLE), WHOLE)
