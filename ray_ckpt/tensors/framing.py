"""Where in a zip file of `torch.save` the elements of a tensor lie: they lie there as they are.

    archive/data.pkl     dtype, strides, first element
    ...                  small entries, among them the byte order
    archive/data/0       the elements, stored, not compressed

Read are the local headers at the front, for one request tells it all. What is not framed exactly so
(strided, compressed, of another machine's byte order) is left to torch.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEAD_BYTES = 4096
"""So many bytes at the front hold every entry before the elements."""
_SIGNATURE = b"PK\x03\x04"
_STORED = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""What torch calls bytes of a type; the types that came later have no such name."""
_HEADER = struct.Struct("<4sHHHHHIIIHH")


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype | None
    """None for bytes of which the tensor knows the type."""
    key: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class _Framed:
    dtype: torch.dtype
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def elements_at(head: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """The byte, counted from the front, at which the elements of such a tensor begin in order.

    None if it must be read by `torch.load`.
    """
    entries = _entries(head)
    framed = _unpickled(head[entries["data.pkl"] :]) if "data.pkl" in entries else None
    if framed is None or "byteorder" not in entries or "data/0" not in entries:
        return None
    is_little = head.startswith(b"little", entries["byteorder"])
    is_plain = framed.storage.key == "0" and framed.storage.dtype in (dtype, None)
    in_order = (framed.shape, framed.dtype) == (shape, dtype) and framed.strides == _strides(shape)
    if not (is_little and is_plain and in_order):
        return None
    return entries["data/0"] + framed.first * dtype.itemsize


def _entries(head: bytes) -> dict[str, int]:
    """Where the content of each entry at the front begins, up to the elements, by its name."""
    found: dict[str, int] = {}
    at = 0
    while head.startswith(_SIGNATURE, at) and len(head) >= at + _HEADER.size:
        *_, method, _, _, _, _, _, name_bytes, extra_bytes = _HEADER.unpack_from(head, at)
        begin = at + _HEADER.size
        name = head[begin : begin + name_bytes].decode(errors="replace").partition("/")[2]
        content = begin + name_bytes + extra_bytes
        if method != 0 or content > len(head):
            break
        found[name] = content
        if name.startswith("data/"):
            break
        # sizes stand behind the content: what follows is found by how it begins
        at = head.find(_SIGNATURE, content)
    return found


def _unpickled(pickled: bytes) -> _Framed | None:
    try:
        value = _Unpickler(io.BytesIO(pickled)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError):
        return None
    return value if isinstance(value, _Framed) else None


class _Unpickler(pickle.Unpickler):
    """Knows a plain tensor and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a tensor, its storage, its dtype; never the thing itself."""
        made: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) in made:
            return made[module, name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return None
        dtype = _STORED.get(name) or getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by what the pickle says of it."""
        _, dtype, key, _, num_elements = pid
        return _Storage(dtype, key, num_elements)


def _tensor(storage: _Storage, first: int, shape: Any, strides: Any, *_: Any) -> _Framed:
    if storage.dtype is None:
        raise pickle.UnpicklingError("bytes without a type")
    return _Framed(storage.dtype, storage, first, tuple(shape), tuple(strides))


def _typed_tensor(storage: _Storage, first: int, shape: Any, strides: Any, *rest: Any) -> _Framed:
    _, _, dtype = rest[:3]
    return _Framed(dtype, storage, first, tuple(shape), tuple(strides))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of elements in order; those of a dimension of one do not count, and torch says as here."""
    return tuple(math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))
