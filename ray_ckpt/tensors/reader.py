"""DCP's reader over any store: nothing is unpickled before its hash matched the manifest."""

import contextlib
import functools
import io
import os
import pickle
from collections.abc import Generator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.chunks import Chunks
from ray_ckpt.tensors.index import read_foreign_metadata
from ray_ckpt.tensors.load_plan import LoadPlan
from ray_ckpt.tensors.piece_reads import read_pieces, read_values
from ray_ckpt.tensors.proof import Proof
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.values import Values

_BUFFER_BYTES = 1 << 16
_READS_AT_ONCE = 2
"""At least: on a disk one of them is copied while the other waits."""


class DcpReader(FileSystemReader):
    """A DCP storage reader for one folder of a store.

    `digests` is what our manifest says of its files, by name; None for a foreign folder, of which
    nothing that is pickled is run. With a `proof`, every shard is digested while it is read.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        *,
        digests: Mapping[str, str] | None,
        proof: Proof | None = None,
    ) -> None:
        super().__init__(folder)
        self.uri = f"{store.uri}/{folder}"
        self.runs_pickles = digests is not None
        self.proof = proof
        self._store = store
        self._digests = digests
        self.fs = _StoreFileSystem(store)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """`.metadata`, unpickled only if it is the very file that was committed.

        Raises:
            IntegrityError: its SHA-256 is not the manifest's, or, in a foreign folder, it names
                anything but torch's own metadata types.
        """
        metadata = self._unpickled(self._store.read(f"{self.path}/{names.METADATA}"))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @property
    def index(self) -> StepIndex:
        """What the folder holds; read once."""
        return self._index

    @functools.cached_property
    def _index(self) -> StepIndex:
        if self._digests is None:
            return StepIndex.of(self.read_metadata())
        if names.INDEX in self._digests:
            data = self._store.read(f"{self.path}/{names.INDEX}")
            self._refuse_other(names.INDEX, data, self._digests[names.INDEX])
            index = StepIndex.from_bytes(data)
        else:
            index = StepIndex.of(self.read_metadata())
        unlisted = sorted(set(index.files) - self._digests.keys())
        if unlisted:
            raise IntegrityError(
                f"tensors lie in {unlisted[0]}, of which the manifest says nothing",
                self.uri,
                "nothing was read and nothing was changed",
            )
        return index

    @property
    def is_far(self) -> bool:
        """Whether a read is a request to somewhere else."""
        return self._store.reads_at_once > 1

    def read(
        self, plan: LoadPlan, state_dict: Mapping[str, Any], values: Values, progress: Progress
    ) -> None:
        """Tensors straight into place, values together; what is framed in another way by torch.

        Raises:
            IntegrityError: a file ends before its time.
        """
        reads = self._store if self.proof is None else self.proof.reads
        chunks = Chunks(reads)
        folder = str(self.path)
        pieces = [(r, self.index.chunk(folder, r.number, r.piece)) for r in plan.reads]
        num_threads = max(_READS_AT_ONCE, reads.reads_at_once)
        to_look_at = [(read.name, chunk) for read, chunk in pieces if chunk.frame is None]
        found = at_once(lambda at: chunks.elements_at(at[1]), to_look_at, num_threads=num_threads)
        odd = {n for (n, _), begin in zip(to_look_at, found, strict=True) if begin is None}
        plain = [(read, chunk) for read, chunk in pieces if read.name not in odd]
        read_pieces(chunks, plain, num_threads=num_threads, progress=progress)
        bare = [name for name in plan.values if not self.index.is_wrapped(name)]
        read_values(reads, folder, self.index, bare, values.arrived)
        odd.update(set(plan.values) - set(bare))
        if odd:
            self._read_by_torch({name: state_dict[name] for name in odd}, values, progress)

    def _read_by_torch(
        self, state_dict: dict[str, Any], values: Values, progress: Progress
    ) -> None:
        planner = _TorchPlanner(values, progress)
        metadata = self.read_metadata()
        planner.set_up_planner(state_dict, metadata, is_coordinator=False)
        self.set_up_storage_reader(metadata, is_coordinator=False)
        self.read_data(planner.create_local_plan(), planner).wait()

    def _unpickled(self, data: bytes) -> Metadata:
        if self._digests is None:
            return read_foreign_metadata(data, self.uri)
        self._refuse_other(names.METADATA, data, self._digests[names.METADATA])
        return cast(Metadata, pickle.loads(data))  # hash checked above

    def _refuse_other(self, name: str, data: bytes, digest: str) -> None:
        if digest_of(data) != digest:
            raise IntegrityError(
                f"{name} is {digest_of(data)}, the manifest says {digest}",
                self.uri,
                "nothing was unpickled and nothing was changed",
            )


def committed_reader(
    store: Store, folder: str, manifest: Manifest, *, proof: Proof | None = None
) -> DcpReader:
    """The reader of a folder that has our manifest.

    Of an adopted one it runs no pickle, and goes by what all tools go by.
    """
    digests = {entry.path: entry.digest for entry in manifest.files}
    is_ours = not manifest.lineage.adopted
    if not is_ours:
        digests.pop(names.INDEX, None)
    reader = DcpReader(store, folder, digests=digests, proof=proof)
    reader.runs_pickles = is_ours
    return reader


def proving_reader(store: Store, folder: str, manifest: Manifest) -> DcpReader:
    """The same, to be loaded from by all ranks together: each shard is digested as it is read."""
    return committed_reader(store, folder, manifest, proof=Proof(store, folder, manifest))


def step_reader(catalog: Catalog, manifest: Manifest) -> DcpReader:
    """The reader of one committed step."""
    return committed_reader(catalog.store, names.step_dir(manifest.step), manifest)


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


class _TorchPlanner(DefaultLoadPlanner):
    """Of a flat state dict; hands values on as they lie there."""

    def __init__(self, values: Values, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = values
        self._progress = progress

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """A piece has arrived."""
        self._progress.advance(tensor.nbytes)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """A value has arrived; its pickle is run later."""
        self._values.arrived(read_item.dest_index.fqn, value.getvalue())
