"""DCP's writer with a commit at its end: one collective protocol from plan to visible step.

    every rank     writes its shards into the staging folder, digests computed as the bytes go by
    coordinator    gathers sizes and digests (DCP gathers the write results anyway), writes
                   `.metadata`, assets and the manifest, and commits

An error on any rank reaches all of them through DCP, and nothing becomes visible.
"""

import contextlib
import io
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import Buffer

from ray_ckpt.core import names
from ray_ckpt.core.manifest import FileEntry, Manifest, ModelEntry
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, describe_file, new_digest
from ray_ckpt.storage.local import write_synced
from ray_ckpt.tensors.index import model_keys, tensor_index


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """One save, as every rank knows it."""

    catalog: Catalog
    draft: Manifest
    """The manifest so far: everything but files, tensors and the model's keys."""
    family: str | None
    """The model's adapter family; None if no export is to be possible."""
    assets: Mapping[str, bytes]
    """Files that go to `hf_assets/`, by name; only the coordinator's are written."""
    reserved: frozenset[str]
    """First segments of keys that are not the model's: `optimizer`, `rng`, ..."""
    check_lease: Callable[[], None]
    """Raises if another writer has taken over; called right before the commit."""

    @property
    def attempt(self) -> str:
        """Name of the staging folder, the same on every rank."""
        return f"save-{self.draft.save_id}"


@dataclass(frozen=True)
class _DescribedResult(WriteResult):
    """A write result that carries its file's manifest entry to the coordinator."""

    file: FileEntry | None = None


class CommittingWriter(FileSystemWriter):
    """A DCP storage writer for exactly one save."""

    def __init__(self, job: SaveJob) -> None:
        super().__init__(job.attempt, single_file_per_rank=True, sync_files=True)
        self._job = job
        self._staging: Path | None = None
        self.fs = _DigestingFileSystem()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the staging folder; here, where DCP carries a rank's error to all of them."""
        self._staging = self._job.catalog.commit.staging(self._job.attempt)
        self.path = self._staging
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuses a step that is there already, before a byte is written."""
        self._job.catalog.refuse_existing(self._job.draft.step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Shards written, synced and handed over; each result knows its file's digest."""
        results = super().write_data(plan, planner).value()
        files = cast(_DigestingFileSystem, self.fs).described
        self._job.catalog.commit.contribute(self._folder_of_attempt, self._folder)
        described: Future[list[WriteResult]] = Future()
        described.set_result([_describe(result, files) for result in results])
        return described

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after every rank has written: the step is committed."""
        described = [cast(_DescribedResult, result) for rank in results for result in rank]
        plain = [[_plain(cast(_DescribedResult, r)) for r in rank] for rank in results]
        super().finish(metadata, plain)
        shards = {result.file.path: result.file for result in described if result.file}
        extra = [self._describe_metadata(), *self._write_assets()]
        manifest = replace(
            self._job.draft,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted([*shards.values(), *extra], key=lambda entry: entry.path)),
            tensors=tensor_index(metadata),
            model=self._model_entry(metadata),
        )
        self._job.check_lease()
        self._job.catalog.commit_step(self._folder_of_attempt, manifest)

    def storage_meta(self) -> StorageMeta:
        """The step's name instead of a path of this machine; equal for equal content."""
        return StorageMeta(checkpoint_id=self._folder)

    def discard(self) -> None:
        """Nothing of this attempt is left."""
        if self._staging is not None:
            self._job.catalog.commit.discard(self._staging)

    @property
    def _folder_of_attempt(self) -> Path:
        assert self._staging is not None, "DCP plans before it writes"
        return self._staging

    @property
    def _folder(self) -> str:
        return names.step_dir(self._job.draft.step)

    def _describe_metadata(self) -> FileEntry:
        return describe_file(
            self._folder_of_attempt / names.METADATA, names.METADATA, STRONG_ALGORITHM
        )

    def _write_assets(self) -> list[FileEntry]:
        folder = self._folder_of_attempt / names.ASSETS
        for name, data in self._job.assets.items():
            folder.mkdir(exist_ok=True)
            write_synced(folder / name, data)
        return [
            describe_file(folder / name, f"{names.ASSETS}/{name}", STRONG_ALGORITHM)
            for name in self._job.assets
        ]

    def _model_entry(self, metadata: Metadata) -> ModelEntry | None:
        if self._job.family is None:
            return None
        keys = model_keys(metadata, self._job.reserved)
        return ModelEntry(family=self._job.family, keys=keys)


class _DigestingFileSystem(FileSystem):
    """DCP's own file system, with a digest of every file written."""

    def __init__(self) -> None:
        self.described: dict[str, FileEntry] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        """A stream that computes the digest in the pass that writes."""
        with super().create_stream(path, mode) as raw:
            if mode != "wb" or Path(path).suffix == ".tmp":
                yield raw
                return
            stream = _DigestingStream(raw)
            yield stream
            name = Path(path).name
            self.described[name] = FileEntry(
                path=name, size_bytes=stream.size_bytes, digest=stream.digest.text()
            )


class _DigestingStream(io.RawIOBase):
    """Passes writes on and digests them; sequential only, which is how DCP writes."""

    def __init__(self, raw: io.IOBase) -> None:
        self._raw: Any = raw
        self.digest = new_digest(SHARD_ALGORITHM)
        self.size_bytes = 0

    def write(self, data: Buffer) -> int:
        """All of `data`, always."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size_bytes += len(view)
        self._raw.write(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Also the wrapped stream."""
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        """Of the wrapped file, flushed, so that DCP can sync it."""
        self._raw.flush()
        return int(self._raw.fileno())

    def close(self) -> None:
        """The wrapped stream stays open: whoever opened it closes it."""
        self.flush()
        super().close()


def _describe(result: WriteResult, files: Mapping[str, FileEntry]) -> _DescribedResult:
    return _DescribedResult(
        index=result.index,
        size_in_bytes=result.size_in_bytes,
        storage_data=result.storage_data,
        file=files[result.storage_data.relative_path],
    )


def _plain(result: _DescribedResult) -> WriteResult:
    return WriteResult(
        index=result.index, size_in_bytes=result.size_in_bytes, storage_data=result.storage_data
    )
