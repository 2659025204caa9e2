"""A load reads what it needs of each chunk, straight into place, whatever is wanted of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.tensors import chunks as chunks_module
from ray_ckpt.tensors.chunks import Chunk, Chunks
from ray_ckpt.tensors.framing import HEAD_BYTES
from ray_ckpt.tensors.reader import DcpReader
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import around

WHOLE = torch.arange(512 * 600, dtype=torch.float32).reshape(512, 600)
VALUES = {"lr": 0.1, "betas": (0.9, 0.999), "names": ["a"], "none": None}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Part = tuple[slice, slice]
ALL = slice(None)


class Wanting(DefaultLoadPlanner):
    """Takes one part of one tensor into `into`."""

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self.into = into
        self.num_commits = 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.into

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        assert tensor is self.into or tensor.data_ptr() == self.into.data_ptr()
        self.num_commits += 1


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
    reader = DcpReader(LocalStore(str(step.parent)), step.name, digest=None)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    index = next(i for i in metadata.storage_data or {} if i.fqn == key)
    size = WHOLE.t().size() if key == "turned" else WHOLE.size()
    begins = [p.indices(n)[0] for p, n in zip(part, size, strict=True)]
    lengths = [len(range(*p.indices(n))) for p, n in zip(part, size, strict=True)]
    item = ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size((0, 0)),
        storage_index=index,
        storage_offsets=torch.Size(begins),
        lengths=torch.Size(lengths),
    )
    planner = Wanting(into)
    reader.read_data(LoadPlan([item]), planner).value()
    assert planner.num_commits == 1


def _stored_bytes(step: Path, key: str) -> int:
    """Of the tensor, with what frames it."""
    stored = DcpReader(LocalStore(str(step.parent)), step.name, digest=None).read_metadata()
    return next(at.length for i, at in (stored.storage_data or {}).items() if i.fqn == key)


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
    reader = DcpReader(LocalStore(str(tmp_path)), "wide", digest=None)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    item = ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex("w"),
        dest_offsets=torch.Size((0, 0)),
        storage_index=next(iter(metadata.storage_data or {})),
        storage_offsets=torch.Size((0, 30_000)),
        lengths=torch.Size((4, 20_000)),
    )
    reader.read_data(LoadPlan([item]), Wanting(into)).value()
    assert torch.equal(into, wide[:, 30_000:])
    to_the_end = (
        80_000 + _stored_bytes(tmp_path / "wide", "w") - wide.nbytes - _bytes_in_front(wide)
    )
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
    monkeypatch.setattr("ray_ckpt.tensors.item_reads.BLOCK_BYTES", 100_000)
    into = torch.zeros_like(WHOLE)
    read(step, "w", (ALL, ALL), into)
    assert torch.equal(into, WHOLE)
    length = _stored_bytes(step, "w")
    assert length <= sum(num_bytes_read) <= length + HEAD_BYTES, "its frame comes with it"
    assert max(num_bytes_read) < 100_000 + HEAD_BYTES
    assert chunks_module.BLOCK_BYTES == 8 << 20


def test_values_come_together(step: Path, num_bytes_read: list[int]) -> None:
    state = {key: None for key in VALUES}
    reader = DcpReader(LocalStore(str(step.parent)), step.name, digest=None)
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state == VALUES
    assert len(num_bytes_read) == 1


def test_what_is_framed_in_another_way_of_the_same_length_is_found_by_its_head(
    step: Path,
) -> None:
    """Nothing but the look of what stands before the elements tells it."""
    chunks = Chunks(LocalStore(str(step.parent)))
    file = next(step.glob("*.distcp"))
    stored = DcpReader(LocalStore(str(step.parent)), step.name, digest=None).read_metadata()
    at = next(at for i, at in (stored.storage_data or {}).items() if i.fqn == "w")
    data = bytearray(file.read_bytes())
    name = data.index(b"archive/", at.offset, at.offset + HEAD_BYTES)
    data[name : name + 7] = b"another"
    file.write_bytes(data)
    chunk = Chunk.of(step.name, at, WHOLE.shape, WHOLE.dtype)
    assert chunk.frame is not None
    into = torch.zeros(WHOLE.numel())
    chunks.read(chunk, 0, into)
    assert torch.equal(into.view_as(WHOLE), WHOLE)
