"""Any piece of any tensor of a DCP step is what torch itself would load, however it was saved."""

import io
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.tensors.chunks import rows_of
from ray_ckpt.tensors.framing import elements_at
from ray_ckpt.tensors.reader import DcpReader
from ray_ckpt.tensors.step_tensors import StepTensors
from tests.tensors.ranks import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = {"matrix": (8, 6), "stack": (4, 6, 4), "vector": (16,), "scalar": (), "deep": (2, 4, 2, 6)}
LAYOUTS: dict[str, tuple[Placement, ...]] = {
    "rows": (Shard(0), Shard(0)),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "last": (Shard(1), Shard(2)),
}


def _values(name: str) -> Tensor:
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1


def _save(folder: str, layout: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = LAYOUTS[layout]
    deepest = max(p.dim for p in placements if isinstance(p, Shard))
    state = {
        name: distribute_tensor(_values(name), mesh, placements)
        if len(shape) > deepest
        else _values(name)
        for name, shape in SHAPES.items()
    }
    dcp.save(state, checkpoint_id=folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_piece_is_read_from_however_many_ranks_saved_it(tmp_path: Path, layout: str) -> None:
    run(_save, str(tmp_path / "step"), layout, num_ranks=4)
    tensors = _open(tmp_path)
    choose = random.Random(0)
    for name in SHAPES:
        expected = _values(name)
        assert torch.equal(tensors.whole(name), expected)
        flat = expected.reshape(-1)
        for _ in range(40):
            begin = choose.randrange(flat.numel())
            end = choose.randint(begin, flat.numel())
            into = torch.full((end - begin,), -1.0)
            tensors.read(name, begin, into)
            assert torch.equal(into, flat[begin:end]), (name, begin, end)


STORED: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.arange(12.0).reshape(3, 4),
    "transposed": lambda: torch.arange(12.0).reshape(4, 3).t(),
    "bfloat16": lambda: torch.arange(12.0).reshape(3, 4).bfloat16(),
    "float8": lambda: torch.arange(12.0).reshape(3, 4).to(torch.float8_e4m3fn),
    "integers": lambda: torch.arange(12).reshape(3, 4),
    "booleans": lambda: torch.arange(12).reshape(3, 4) % 2 == 0,
    "unsigned": lambda: torch.arange(12).reshape(3, 4).to(torch.uint16),
    "empty": lambda: torch.empty(0, 4),
}


@pytest.mark.parametrize("make", STORED.values(), ids=STORED)
def test_what_torch_saves_in_another_way_is_left_to_torch(
    tmp_path: Path, make: Callable[[], Tensor]
) -> None:
    dcp.save({"a": make()}, checkpoint_id=tmp_path / "step", no_dist=True)
    tensors = _open(tmp_path)
    whole = tensors.whole("a")
    assert whole.dtype == make().dtype
    assert torch.equal(whole.view(torch.uint8), make().contiguous().view(torch.uint8))


def test_elements_are_found_where_the_zip_file_has_them() -> None:
    for tensor in (torch.arange(12.0).reshape(3, 4), torch.arange(12.0)[4:].bfloat16()):
        data = _saved(tensor)
        at = elements_at(data, tuple(tensor.shape), tensor.dtype)
        assert at is not None
        found = torch.frombuffer(bytearray(data[at:]), dtype=tensor.dtype, count=tensor.numel())
        assert torch.equal(found.reshape(tensor.shape), tensor)


def test_elements_of_a_slice_begin_where_the_slice_does() -> None:
    rows = torch.arange(12.0).reshape(3, 4)[1:]
    data = _saved(rows)
    at = elements_at(data, (2, 4), torch.float32)
    assert at is not None
    assert torch.frombuffer(bytearray(data[at:]), dtype=torch.float32, count=8).tolist() == list(
        range(4, 12)
    )


def _saved(value: object) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


def _compressed() -> bytes:
    made = io.BytesIO()
    plain = io.BytesIO(_saved(torch.arange(4.0)))
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return made.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_saved(torch.arange(4)), id="another dtype"),
        pytest.param(_saved(torch.arange(5.0)), id="another shape"),
        pytest.param(_saved(torch.arange(8.0)[::2]), id="strided"),
        pytest.param(_saved([torch.arange(4.0)]), id="a list"),
        pytest.param(_saved(torch.arange(4.0)).replace(b"little", b"bigger"), id="big-endian"),
        pytest.param(_saved(torch.arange(4.0))[:300], id="cut short"),
        pytest.param(_compressed(), id="compressed"),
        pytest.param(b"\x80\x02}q\x00.", id="no zip file"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_elements_are_found_in_no_other_file(data: bytes) -> None:
    assert elements_at(data, (4,), torch.float32) is None


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "harm"),)  # type: ignore[return-value]

    assert elements_at(_saved(Harm()), (4,), torch.float32) is None
    assert not (tmp_path / "harm").exists()


def test_rows_cover_a_chunk_once_and_in_order() -> None:
    size = (3, 4, 5)
    chunk = ChunkStorageMetadata(torch.Size((1, 2, 0)), torch.Size((2, 2, 3)))
    expected = torch.arange(60).reshape(size)[1:3, 2:4, 0:3].reshape(-1).tolist()
    found: list[int] = []
    for rows in rows_of(size, chunk, 2):
        assert rows.begin_in_part == len(found)
        for row in range(rows.count):
            begin = rows.begin + row * rows.apart
            found += range(begin, begin + rows.width)
    assert found == expected


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(IntegrityError, match="names no tensor b"):
        _open(tmp_path).whole("b")


def test_a_file_that_is_cut_short_is_no_tensor(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(4000)}, checkpoint_id=tmp_path / "step", no_dist=True)
    file = next((tmp_path / "step").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(IntegrityError, match="ends before byte"):
        _open(tmp_path).whole("a")


def test_another_tensor_than_the_index_says_is_refused(tmp_path: Path) -> None:
    """Of a shape that only torch can read, so that the index alone says what it should be."""
    dcp.save({"a": torch.zeros(4, 3).t()}, checkpoint_id=tmp_path / "step", no_dist=True)
    tensors = _open(tmp_path, lambda metadata: _reshaped(metadata, "a", (3, 3)))
    with pytest.raises(IntegrityError, match="is to hold"):
        tensors.whole("a")


def _reshaped(metadata: Metadata, key: str, shape: Sequence[int]) -> None:
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    metadata.state_dict_metadata[key] = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), size, [chunk]
    )
    stored = metadata.storage_data
    [index] = [index for index in stored if index.fqn == key]
    stored[MetadataIndex(key, chunk.offsets)] = stored[index]


def _open(folder: Path, change: Callable[[Metadata], None] = lambda _: None) -> StepTensors:
    class Changed(DcpReader):
        def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
            metadata = super().read_metadata(*args, **kwargs)
            change(metadata)
            return metadata

    store = LocalStore(str(folder))
    return StepTensors(store, Changed(store, "step", digests=None))
