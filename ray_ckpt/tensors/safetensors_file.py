"""The front of a safetensors file: names, dtypes, shapes and where each tensor's bytes lie.

8 bytes       length of the header, little-endian
header        JSON, filled up with blanks
tensors       one after the other, no byte between them
"""

import json
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch

from ray_ckpt.tensors.recording import TensorSpec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 4096
"""Of the first tensor in the file: large pages and direct reads like it."""


def in_file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Wider elements first, so that each tensor begins at a multiple of its elements' size."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


class SafetensorsFrame:
    """Everything of such a file but its tensors."""

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.specs = in_file_order(specs)
        self.front = header(self.specs, metadata)

    def look(self, block: memoryview) -> None:
        """No byte of a tensor shapes the rest of the file."""

    def behind(self, name: str) -> bytes:
        """Nothing."""
        return b""


def specs_in_safetensors(file: BinaryIO) -> dict[str, TensorSpec]:
    """By name, what such a file says that it holds."""
    (length,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(length))
    return {
        name: TensorSpec(shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """All that comes before the tensors, which follow in the order of `specs`."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, spec in specs.items():
        end = begin + spec.size_bytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    return struct.pack("<Q", len(padded)) + padded
