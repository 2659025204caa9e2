"""DCP's reader over any store: nothing is unpickled before its hash matched the manifest."""

import contextlib
import io
import os
import pickle
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.tensors.ranks import causes, expect_one_process, ours, sentence

_BUFFER_BYTES = 1 << 16


class StepReader(FileSystemReader):
    """A DCP storage reader for one committed step."""

    def __init__(self, catalog: Catalog, manifest: Manifest) -> None:
        super().__init__(names.step_dir(manifest.step))
        self._catalog = catalog
        self._manifest = manifest
        self.fs = _StoreFileSystem(catalog.store)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """`.metadata`, unpickled only if it is the very file that was committed.

        Raises:
            IntegrityError: its SHA-256 is not the manifest's.
        """
        key = f"{names.step_dir(self._manifest.step)}/{names.METADATA}"
        data = self._catalog.store.read(key)
        expected = {entry.path: entry.digest for entry in self._manifest.files}[names.METADATA]
        if digest_of(data) != expected:
            damage = f"{names.METADATA} is {digest_of(data)}, the manifest says {expected}"
            raise self._catalog.corrupt(self._manifest.step, [damage])
        metadata: Metadata = pickle.loads(data)  # hash checked above
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_tensors(catalog: Catalog, manifest: Manifest, keys: Sequence[str]) -> dict[str, Tensor]:
    """These tensors, whole and on the CPU, in this process alone."""
    entries = {entry.name: entry for entry in manifest.tensors}
    state_dict = {
        key: torch.empty(entries[key].shape, dtype=getattr(torch, entries[key].dtype))
        for key in keys
    }
    load_into(state_dict, StepReader(catalog, manifest), process_group=None)
    return state_dict


def load_into(
    state_dict: dict[str, Any], reader: StepReader, *, process_group: dist.ProcessGroup | None
) -> None:
    """Every tensor of `state_dict` filled in place, every other entry replaced.

    Raises:
        StateDictError: a tensor has another shape on storage; no tensor was read.
        IntegrityError: it cannot be read.
    """
    if process_group is None:
        expect_one_process()
    try:
        dcp.load(
            state_dict,
            storage_reader=reader,
            process_group=process_group,
            no_dist=process_group is None,
        )
    except CheckpointException as error:
        raise _cause(error, str(reader.path)) from error


def _cause(error: CheckpointException, step: str) -> RayCkptError:
    """The error that was meant: torch's derives from BaseException and passes every handler."""
    meant = ours(error)
    if meant is not None:
        return meant
    text = sentence(error)
    if all(isinstance(cause, ValueError) for cause in causes(error).values()):
        return StateDictError(
            f"{step} does not fit the model: {text}",
            safe="no tensor was read, the model is as it was",
            do="load it with the model and optimizer it was saved from",
        )
    return IntegrityError(f"{step} cannot be read: {text}", step, "storage was not changed")


def read_asset(catalog: Catalog, manifest: Manifest, name: str) -> bytes | None:
    """One file of `hf_assets/`, its digest checked; None if the step has no such file.

    Raises:
        IntegrityError: its digest is not the manifest's.
    """
    path = f"{names.ASSETS}/{name}"
    expected: Mapping[str, str] = {entry.path: entry.digest for entry in manifest.files}
    if path not in expected:
        return None
    data = catalog.store.read(f"{names.step_dir(manifest.step)}/{path}")
    if digest_of(data) != expected[path]:
        raise IntegrityError(
            f"{path} of step-{manifest.step} differs from its manifest", catalog.uri
        )
    return data


class _StoreFileSystem(FileSystem):
    """Opens objects of a store for reading."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        """A seekable stream, buffered: torch reads zip headers in small pieces."""
        assert mode == "rb", "a committed step is never written"
        with self._store.open_read(os.fspath(path)) as raw:
            yield cast(io.IOBase, io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER_BYTES))
