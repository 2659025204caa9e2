"""A Hugging Face folder as a checkpoint under native names, resharded as it is read.

Each rank reads the tensors that its own shards need, makes the native ones of them and copies its
part; memory is bounded by the largest native tensor and what it is made of.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError, UsageError
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.listing import sizes_in
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.chunks import bytes_of
from ray_ckpt.tensors.fqn import told
from ray_ckpt.tensors.load_plan import LoadPlan, Read, narrowed
from ray_ckpt.tensors.recording import Recording, TensorSpec, record
from ray_ckpt.tensors.safetensors_file import DTYPES
from ray_ckpt.tensors.source_files import SourceFiles
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.values import Values

_SUFFIX = ".safetensors"
_AGAIN = "download or export the folder again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor of a safetensors file lies."""

    key: str
    """Of the file in the store."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int


class HfFolder:
    """The tensors of one folder of safetensors files; headers are read once, at construction.

    Read are the files that the index names; without one `<stem>.safetensors`, or else all there
    are: some folders hold the same weights once more under other names.

    Raises:
        UsageError: the folder holds no safetensors file.
        IntegrityError: a header cannot be read, or the index names what no file holds.
    """

    def __init__(self, store: Store, folder: str, *, stem: str = "model") -> None:
        self.uri = f"{store.uri}/{folder}"
        self._store = store
        self._folder = folder
        self._index = f"{stem}{_SUFFIX}.index.json"
        self.tensors: dict[str, StoredTensor] = {}
        present = {
            name: size_bytes
            for name, size_bytes in sizes_in(store, folder).items()
            if name.endswith(_SUFFIX) and "/" not in name
        }
        if not present:
            raise UsageError(
                "the folder is not there, or holds no safetensors file",
                self.uri,
                "nothing was loaded",
                "check the path: it names a Hugging Face folder on a disk or on S3, no model id; "
                "convert pytorch_model.bin with transformers' save_pretrained",
            )
        listed = self._listed()
        whole = f"{stem}{_SUFFIX}"
        files = sorted({*listed.values()} or ({whole} & present.keys()) or present)
        self._refuse_lacking("files", sorted({*files} - present.keys()))
        for name in files:
            header = self._header(name, present[name])
            self._enter(name, header, present[name])
        lacking = sorted(listed.keys() - self.tensors.keys())
        self._refuse_lacking("tensors", [f"{name} in {listed[name]}" for name in lacking])
        self.source_files = SourceFiles(store=store, folder=folder, files=tuple(files))

    def config(self, name: str, *, otherwise: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """A JSON file of the folder, or what is given otherwise.

        Raises:
            UsageError: it is not there, and nothing is given.
        """
        try:
            return json.loads(self._store.read(f"{self._folder}/{name}"))
        except ObjectNotFoundError as error:
            if otherwise is not None:
                return otherwise
            raise UsageError(
                f"the folder holds no {name}",
                self.uri,
                "nothing was loaded",
                f"copy {name} of the same model there: it says how the tensors are to be read",
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        stored = self.tensors[name]
        data = bytearray(stored.end - stored.begin)
        with self._store.open_read(stored.key) as stream:
            stream.seek(stored.begin)
            _read_into(stream, memoryview(data), f"{self.uri}: {name}")
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return flat.view(stored.dtype).reshape(stored.shape)

    def read_into(self, name: str, begin: int, into: Tensor) -> None:
        """The elements from number `begin` on, as many as `into` has, which is flat."""
        stored = self.tensors[name]
        at = stored.begin + begin * stored.dtype.itemsize
        self._store.read_into(stored.key, at, bytes_of(into))

    @property
    def reads_at_once(self) -> int:
        """So many reads side by side are faster than one after the other."""
        return self._store.reads_at_once

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {
            name: TensorSpec(shape=stored.shape, dtype=stored.dtype)
            for name, stored in self.tensors.items()
        }

    def _header(self, name: str, size_bytes: int) -> bytes:
        with self._store.open_read(f"{self._folder}/{name}") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if length > size_bytes - 8:
                raise IntegrityError(
                    f"{name} is cut short or no safetensors file",
                    self.uri,
                    "nothing was loaded",
                    _AGAIN,
                )
            data = bytearray(length)
            _read_into(stream, memoryview(data), f"{self.uri}: header of {name}")
        return bytes(data)

    def _enter(self, file: str, header: bytes, size_bytes: int) -> None:
        try:
            entries: dict[str, Any] = json.loads(header)
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                self.tensors[name] = StoredTensor(
                    key=f"{self._folder}/{file}",
                    dtype=DTYPES[entry["dtype"]],
                    shape=tuple(entry["shape"]),
                    begin=8 + len(header) + begin,
                    end=8 + len(header) + end,
                )
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"the header of {file} cannot be read: {error!r}",
                self.uri,
                "nothing was loaded",
                _AGAIN,
            ) from error
        short = [n for n in entries if self.tensors[n].end > size_bytes]
        if short:
            raise IntegrityError(
                f"{file} is cut short: it has {size_bytes} bytes, and {len(short)} tensors are not "
                f"whole, first {short[0]}",
                self.uri,
                "nothing was loaded",
                _AGAIN,
            )

    def _listed(self) -> Mapping[str, str]:
        """Tensor to file, as the index says; nothing if there is none."""
        try:
            return self.config(self._index)["weight_map"]
        except UsageError:
            return {}

    def _refuse_lacking(self, kind: str, lacking: Sequence[str]) -> None:
        if lacking:
            raise IntegrityError(
                f"{self._index} names {len(lacking)} {kind} that are not there: {told(lacking)}",
                self.uri,
                "nothing was loaded",
                _AGAIN,
            )


class HfReader:
    """Reads tensors that are made from a Hugging Face folder's.

    `to_native` is a pure `sd -> sd`, recorded once; it names what nothing speaks for in its errors.
    """

    runs_pickles = False
    proof = None
    is_far = False
    """Each replica makes what it holds by itself."""

    def __init__(
        self, folder: HfFolder, to_native: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> None:
        self.uri = folder.uri
        self._folder = folder
        self._recording: Recording = record(to_native, folder.specs())
        self.index = StepIndex.of_specs(
            {name: output.spec for name, output in self._recording.outputs.items()}
        )

    def tensor(self, name: str) -> Tensor:
        """One native tensor, whole, on the CPU."""
        return self._recording.run([name], self._folder.read)[name]

    def read(
        self, plan: LoadPlan, state_dict: Mapping[str, Any], values: Values, progress: Progress
    ) -> None:
        """One native tensor after the other; each rank copies the part it holds."""
        del state_dict, values  # a Hugging Face folder holds tensors alone
        of_tensor: dict[str, list[Read]] = {}
        for read in plan.reads:
            of_tensor.setdefault(read.name, []).append(read)
        for name, reads in of_tensor.items():
            tensor = self.tensor(name)
            for read in reads:
                read.target.copy_(narrowed(tensor, read.offsets, read.sizes))
                progress.advance(read.target.nbytes)


def _read_into(stream: Any, view: memoryview, what: str) -> None:
    """All of `view` filled, whatever a single read gives."""
    at = 0
    while at < len(view):
        piece = stream.read(len(view) - at)
        if not piece:
            raise IntegrityError(f"{what} ends after {at} of {len(view)} bytes")
        view[at : at + len(piece)] = piece
        at += len(piece)
