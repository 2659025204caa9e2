"""The file that `torch.save` writes of a state dict, made without the state dict in memory.

Torch itself writes it with its tensors left out (`torch.serialization.skip_data`): a sparse file of
the final size, of which everything but the tensors is taken. `torch.load` reads the result, also
with `mmap=True` and `weights_only=True`; so does whatever unpacks zip files.
"""

import functools
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ray_ckpt.tensors.recording import TensorSpec

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip entry: the lengths of its name and of what is added to it, which follow."""
_DIRECTORY_ENTRY = struct.Struct("<4s12xI8xHHH12x")
"""Signature, CRC-32, lengths of name, of what is added and of the comment, which follow."""
_CRC_AT = 16


class TorchFrame:
    """Everything of such a file but its tensors, in the order of `specs`."""

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        del metadata  # the format has no place for it
        self.specs = specs
        self._crc_of: dict[str, int] = {}
        self._crc = 0
        with FakeTensorMode():
            tensors = {n: torch.empty(spec.shape, dtype=spec.dtype) for n, spec in specs.items()}
        with _without_data(tensors) as path, path.open("rb") as file:
            places = _places(path, file, len(specs))
            self.front = _read(file, 0, places[0] if places else path.stat().st_size)
            ends = [at + spec.size_bytes for at, spec in zip(places, specs.values(), strict=True)]
            nexts = [*places[1:], path.stat().st_size]
            pieces = [_read(file, end, until) for end, until in zip(ends, nexts, strict=True)]
            self._behind = dict(zip(specs, pieces, strict=True))
            with zipfile.ZipFile(path) as archive:
                self._directory = archive.start_dir - (ends[-1] if ends else 0)

    def look(self, block: memoryview) -> None:
        """Its CRC-32 is the zip directory's way to tell whether an entry is whole."""
        self._crc = zlib.crc32(block, self._crc)

    def behind(self, name: str) -> bytes:
        """The next entry's own header; after the last one the directory."""
        self._crc_of[name], self._crc = self._crc, 0
        return self._behind[name] if len(self._crc_of) < len(self.specs) else self._end(name)

    def _end(self, name: str) -> bytes:
        """The directory, with what the tensors' CRC-32 have turned out to be."""
        end = bytearray(self._behind[name])
        crcs = iter(self._crc_of[name] for name in self.specs)
        at = self._directory
        while end[at : at + 4] == b"PK\x01\x02":
            lengths = _DIRECTORY_ENTRY.unpack_from(end, at)[2:]
            called = bytes(end[at + 46 : at + 46 + lengths[0]])
            if b"/data/" in called:
                struct.pack_into("<I", end, at + _CRC_AT, next(crcs))
            at += _DIRECTORY_ENTRY.size + sum(lengths)
        return bytes(end)


def specs_in_torch_file(file: BinaryIO) -> dict[str, TensorSpec]:
    """By name, what such a file holds; reads names and places alone."""
    with FakeTensorMode():
        held = torch.load(file, weights_only=True)
    return {
        name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in held.items()
    }


@functools.lru_cache(maxsize=1024)
def around(spec: TensorSpec) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and behind the elements of one contiguous tensor.

    Their CRC-32 is left out, as by `torch.serialization.set_crc32_options(False)`.
    """
    # no page of it is ever touched; a fake tensor would bring torch's compiler into the trainer
    tensor: Any = torch.empty(0, dtype=spec.dtype)
    tensor.set_(torch.UntypedStorage(spec.size_bytes), 0, spec.shape)
    with _without_data(tensor) as path, path.open("rb") as file:
        [begin] = _places(path, file, 1)
        end = begin + spec.size_bytes
        return _read(file, 0, begin), _read(file, end, path.stat().st_size)


@contextmanager
def _without_data(value: Any) -> Generator[Path]:
    """The file as it will be, with nothing where the tensors in `value` will stand."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as folder:
        path = Path(folder) / "archive"
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(value, path)
        yield path


def _places(path: Path, file: BinaryIO, count: int) -> list[int]:
    """Where each tensor begins, in the order in which they were saved."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    assert len(entries) == count, "each tensor has a storage of its own"
    places: list[int] = []
    for entry in entries:
        header = _read(file, entry.header_offset, entry.header_offset + _LOCAL_HEADER.size)
        places.append(entry.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)))
    return places


def _read(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
