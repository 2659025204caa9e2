"""DCP's reader over any store: nothing is unpickled before its hash matched the manifest."""

import contextlib
import functools
import io
import logging
import os
import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    StorageReader,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Ranges, Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.tensors.chunks import Chunk, Chunks, is_bare
from ray_ckpt.tensors.index import read_foreign_metadata
from ray_ckpt.tensors.item_reads import read_items, read_values
from ray_ckpt.tensors.load_planner import ValueLoadPlanner
from ray_ckpt.tensors.proof import DamageFoundError, Proof
from ray_ckpt.tensors.ranks import Ranks, ours, sentence
from ray_ckpt.tensors.replicas import Replicas

T = TypeVar("T")
log = logging.getLogger("ray_ckpt")
_BUFFER_BYTES = 1 << 16
_READS_AT_ONCE = 2
"""At least: on a disk one of them is copied while the other waits."""


class DcpReader(FileSystemReader):
    """A DCP storage reader for one folder of a store.

    `digest` is what our manifest says of `.metadata`; None for a foreign folder, of which nothing
    that is pickled is run. With a `proof`, every shard is digested while it is read.
    """

    def __init__(
        self, store: Store, folder: str, *, digest: str | None, proof: Proof | None = None
    ) -> None:
        super().__init__(folder)
        self.uri = f"{store.uri}/{folder}"
        self.runs_pickles = digest is not None
        self.proof = proof
        self._store = store
        self._digest = digest
        self.fs = _StoreFileSystem(store)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """`.metadata`, unpickled only if it is the very file that was committed.

        Raises:
            IntegrityError: its SHA-256 is not the manifest's, or, in a foreign folder, it names
                anything but torch's own metadata types.
        """
        metadata = self._metadata
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @functools.cached_property
    def _metadata(self) -> Metadata:
        return self._unpickled(self._store.read(f"{self.path}/{names.METADATA}"))

    @property
    def is_far(self) -> bool:
        """Whether a read is a request to somewhere else."""
        return self._store.reads_at_once > 1

    @property
    def _reads(self) -> Ranges:
        return self._store if self.proof is None else self.proof.reads

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The index that the plan is made from."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._index = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Tensors straight into place, values together; what is framed in another way by torch."""
        tensors = [
            (item, chunk) for item in plan.items if (chunk := self._chunk_of(item)) is not None
        ]
        # by where they lie: a disk reads ahead
        tensors.sort(key=lambda read: (read[1].key, read[1].begin))
        chunks = Chunks(self._reads)
        num_threads = max(_READS_AT_ONCE, self._reads.reads_at_once)
        of_each = at_once(chunks.is_in_order, [c for _, c in tensors], num_threads=num_threads)
        plain = [read for read, it_is in zip(tensors, of_each, strict=True) if it_is]
        read_items(chunks, plain, planner, num_threads=num_threads)
        values = [
            (item, stored)
            for item in plan.items
            if item.type is LoadItemType.BYTE_IO
            and is_bare(stored := self.storage_data[item.storage_index])
        ]
        read_values(self._reads, str(self.path), values, planner)
        done = {id(item) for item, _ in (*plain, *values)}
        others = [item for item in plan.items if id(item) not in done]
        return super().read_data(replace(plan, items=others), planner)

    def _chunk_of(self, item: ReadItem) -> Chunk | None:
        """What the item is read from; None for what is no tensor."""
        entry = self._index[item.storage_index.fqn]
        if item.type is LoadItemType.BYTE_IO or not isinstance(entry, TensorStorageMetadata):
            return None
        stored = self.storage_data[item.storage_index]
        offsets = item.storage_index.offset
        sizes = next(c.sizes for c in entry.chunks if offsets is None or c.offsets == offsets)
        return Chunk.of(str(self.path), stored, sizes, entry.properties.dtype)

    def _unpickled(self, data: bytes) -> Metadata:
        if self._digest is None:
            return read_foreign_metadata(data, self.uri)
        if digest_of(data) != self._digest:
            raise IntegrityError(
                f"{names.METADATA} is {digest_of(data)}, the manifest says {self._digest}",
                self.uri,
                "nothing was unpickled and nothing was changed",
            )
        return cast(Metadata, pickle.loads(data))  # hash checked above


def committed_reader(
    store: Store, folder: str, manifest: Manifest, *, proof: Proof | None = None
) -> DcpReader:
    """The reader of a folder that has our manifest; of an adopted one it runs no pickle either."""
    digests = {entry.path: entry.digest for entry in manifest.files}
    reader = DcpReader(store, folder, digest=digests[names.METADATA], proof=proof)
    reader.runs_pickles = not manifest.lineage.adopted
    return reader


def proving_reader(store: Store, folder: str, manifest: Manifest) -> DcpReader:
    """The same, to be loaded from by all ranks together: each shard is digested as it is read."""
    return committed_reader(store, folder, manifest, proof=Proof(store, folder, manifest))


def step_reader(catalog: Catalog, manifest: Manifest) -> DcpReader:
    """The reader of one committed step."""
    return committed_reader(catalog.store, names.step_dir(manifest.step), manifest)


def read_tensors(
    catalog: Catalog, manifest: Manifest, keys: Sequence[str], *, progress: Progress = UNTOLD
) -> dict[str, Tensor]:
    """These tensors, whole and on the CPU, in this process alone."""
    entries = {entry.name: entry for entry in manifest.tensors}
    state_dict = {
        key: torch.empty(entries[key].shape, dtype=getattr(torch, entries[key].dtype))
        for key in keys
    }
    reader = step_reader(catalog, manifest)
    load_into(state_dict, reader, progress=progress)
    return state_dict


def load_into(
    state_dict: dict[str, Any],
    reader: StorageReader,
    *,
    ranks: Ranks | None = None,
    progress: Progress = UNTOLD,
) -> None:
    """Every tensor of `state_dict` filled in place, every other entry replaced.

    Each rank plans by itself, since no plan depends on another's; then all know that all could.
    Collective, unless this process loads alone.

    Raises:
        StateDictError: a tensor has another shape on storage; no tensor was read.
        DamageFoundError: what was read is not what was committed; no pickle of it was run.
        IntegrityError: it cannot be read.
    """
    planner = ValueLoadPlanner(reader, progress)
    is_coordinator = ranks is None or ranks.is_coordinator

    def plan() -> LoadPlan:
        metadata = reader.read_metadata()
        planner.set_up_planner(state_dict, metadata, is_coordinator)
        reader.set_up_storage_reader(metadata, is_coordinator)
        return planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))

    step = str(getattr(reader, "uri", reader))
    whole_plan = _agreed(plan, ranks, step)
    replicas = Replicas(planner.state_dict, is_far=getattr(reader, "is_far", False))
    own = [item for item in whole_plan.items if replicas.reads(item.dest_index.fqn)]
    own_plan = replace(whole_plan, items=own)
    proof: Proof | None = getattr(reader, "proof", None)

    _read_proven(
        lambda: _agreed(lambda: reader.read_data(own_plan, planner).wait(), ranks, step),
        proof,
        ranks,
    )
    _agreed(replicas.give, ranks, step)
    _agreed(planner.put_values, ranks, step)


def _read_proven(read: Callable[[], None], proof: Proof | None, ranks: Ranks | None) -> None:
    """What was read is as it was committed; if it is not so in memory, storage is read."""
    try:
        with _damage_comes_first(proof, ranks):
            read()
    except DamageFoundError as error:
        assert proof is not None and ranks is not None, "damage is found by who looks for it"
        if not ranks.any(proof.memory.num_bytes > 0):
            raise
        log.warning("a copy in memory is not as committed, all is read again: %s", error.what)
        proof.begin_without_memory()
        with _damage_comes_first(proof, ranks):
            read()


@contextlib.contextmanager
def _damage_comes_first(proof: Proof | None, ranks: Ranks | None) -> Generator[None]:
    """What the block has read is as it was committed; if it is not, no other error matters."""
    if proof is None:
        yield
        return
    assert ranks is not None, "who loads alone has nobody to share the proof with"
    try:
        yield
    except RayCkptError:  # every rank has the same one
        proof.refuse_damage(ranks)
        raise
    proof.refuse_damage(ranks)


def _agreed(act: Callable[[], T], ranks: Ranks | None, step: str) -> T:
    """What it returned here, if it raised nowhere."""
    results: list[T] = []
    own: Exception | None = None
    try:
        results.append(act())
    except Exception as error:  # noqa: BLE001  every rank must hear of it, then it is raised
        own = error
    everywhere = [own] if ranks is None else ranks.gather(own)
    raised = {rank: error for rank, error in enumerate(everywhere) if error is not None}
    if raised:
        raise _meant(raised, step) from (own or next(iter(raised.values())))
    return results[0]


def _meant(raised: Mapping[int, Exception], step: str) -> RayCkptError:
    meant = ours(raised)
    if meant is not None:
        return meant
    text = sentence(raised)
    if all(isinstance(cause, ValueError) for cause in raised.values()):
        return StateDictError(
            f"{step} does not fit the model: {text}",
            safe="no tensor was read, the model is as it was",
            do="load it with the model and optimizer it was saved from",
        )
    return IntegrityError(
        f"{step} cannot be read: {text}",
        step,
        "storage was not changed; what it was read into may hold some of its values",
        "do not train on: start again from another step or source, or once it can be read",
    )


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
    algorithm = expected[path].partition(":")[0]  # adopted steps have another for assets
    if digest_of(data, algorithm) != expected[path]:
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
