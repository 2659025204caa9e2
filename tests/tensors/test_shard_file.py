"""What a rank writes of a step is what `torch.save` would have written, but for a checksum."""

import io
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import describe_file, digest_of
from ray_ckpt.storage.disk.file_blocks import FileBlocks, new_file
from ray_ckpt.tensors.framing import elements_at
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.shard_file import digest_of_item, is_plain, new_shard
from ray_ckpt.tensors.torch_file import around
from tests.processes import run_python
from tests.roots import make_root
from tests.tensors.plain import save_steps

DENSE = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.arange(12).bfloat16(),
    "float8": torch.arange(8.0).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "complex64": torch.tensor([1 + 2j, 3j]),
    "int64 scalar": torch.tensor(7),
    "no elements": torch.zeros(0, 3),
    "more than a block": torch.arange(3_000_000, dtype=torch.float32),
}
ADDS_AN_ITEM = """
import sys
import torch
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import around
before = set(sys.modules)
around(TensorSpec(shape=(3,), dtype=torch.float32))
print([name for name in set(sys.modules) - before if "dynamo" in name])
"""
OTHERS = {
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "conjugate": torch.tensor([1 + 2j]).conj(),
}


def test_every_item_is_what_was_given(tmp_path: Path) -> None:
    values = {**DENSE, **OTHERS}
    path = tmp_path / "__0_0.distcp"
    with new_shard(new_file(path), path.name) as shard:
        places = {name: shard.add(tensor) for name, tensor in values.items()}
        places["value"] = shard.add(io.BytesIO(b"a pickle"))
        entry = shard.close()
    data = path.read_bytes()
    assert entry == describe_file(path, path.name, "crc64nvme")
    assert sum(length for _, length in places.values()) == len(data) == entry.size_bytes
    begin, length = places.pop("value")
    assert data[begin : begin + length] == b"a pickle"
    for name, (begin, length) in places.items():
        found: Tensor = torch.load(io.BytesIO(data[begin : begin + length]), weights_only=True)
        assert found.dtype == values[name].dtype and found.stride() == values[name].stride(), name
        assert torch.equal(_comparable(found), _comparable(values[name])), name


def test_the_digest_of_every_item_is_known_without_another_read(tmp_path: Path) -> None:
    """Also of those that end where a block does, and of more than a block."""
    items = [io.BytesIO(bytes(FileBlocks.block_bytes)), *DENSE.values(), *OTHERS.values()]
    items += [io.BytesIO(), io.BytesIO(b"at the end")]
    path = tmp_path / "__0_0.distcp"
    with new_shard(new_file(path), path.name) as shard:
        places = [shard.add(item) for item in items]
        shard.close()
    data = path.read_bytes()
    digests = [digest_of(data[at : at + length], "crc64nvme") for at, length in places]
    assert list(shard.digests()) == digests
    assert [digest_of_item(t) for t in DENSE.values()] == digests[1 : len(DENSE) + 1]


def test_a_file_without_items_has_no_digests(tmp_path: Path) -> None:
    with new_shard(new_file(tmp_path / "shard"), "shard") as shard:
        shard.close()
    assert list(shard.digests()) == []


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@pytest.mark.parametrize("name", list(DENSE))
def test_an_item_is_torchs_own_without_checksum(tmp_path: Path, name: str) -> None:
    with new_shard(new_file(tmp_path / "shard"), "shard") as shard:
        shard.add(DENSE[name])
        shard.close()
    made, saved = (tmp_path / "shard").read_bytes(), _saved(DENSE[name])
    # the CRC-32 of the elements, and an id that torch makes of it
    other = [at for at, (a, b) in enumerate(zip(made, saved, strict=True)) if a != b]
    assert len(other) <= 4 * 4 + 40
    elements = DENSE[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert made.count(elements) >= 1 and made[:4] == b"PK\x03\x04"


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_an_item_of_more_than_4_gib_is_read(tmp_path: Path) -> None:
    """With nothing but its last element on the disk."""
    spec = TensorSpec(shape=(1_200_000_000,), dtype=torch.float32)
    front, behind = around(spec)
    assert elements_at(front + bytes(4096 - len(front)), spec.shape, spec.dtype) == len(front)
    with (tmp_path / "item").open("wb") as file:
        file.write(front)
        file.seek(spec.size_bytes - 4, os.SEEK_CUR)
        file.write(struct.pack("<f", 7.0) + behind)
    found = torch.load(tmp_path / "item", weights_only=True, mmap=True)
    assert (found.shape, found.dtype, found[-1].item()) == (spec.shape, spec.dtype, 7.0)


def test_the_trainer_is_spared_torchs_compiler() -> None:
    done = run_python("-c", ADDS_AN_ITEM, environment={})
    assert done.stdout.strip() == "[]"


def test_only_dense_tensors_are_framed_here() -> None:
    assert all(map(is_plain, DENSE.values()))
    assert not any(map(is_plain, OTHERS.values()))


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        new_shard(new_file(tmp_path / "shard"), "shard") as shard,
    ):
        shard.add(DENSE["more than a block"])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_reads_a_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    state = {"weight": torch.zeros(8, 4), "bias": torch.zeros(4)}
    dcp.load(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    assert state["weight"].eq(3).all() and state["bias"].eq(3).all()


def test_a_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with new_shard(new_file(tmp_path / "shard"), "shard") as shard:
        shard.add(DENSE["float32"])
        shard.close()
    assert synced[0].startswith(".tmp-") and synced[-1] == tmp_path.name


@pytest.mark.s3
def test_on_its_way_to_s3_a_shard_lies_on_no_disk(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file is made")

    monkeypatch.setattr(FileBlocks, "__init__", refuse)
    make_root(s3_root, (10,))
    catalog = open_catalog(s3_root)
    manifest = catalog.manifest(10)
    assert any(entry.path.endswith(".distcp") for entry in manifest.files)
    assert catalog.damage(10) == []
    assert not list(catalog.store.list_unfinished(""))
