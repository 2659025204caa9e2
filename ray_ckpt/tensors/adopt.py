"""A DCP checkpoint that somebody else wrote (TorchTitan, Ray Train, plain DCP) becomes ours.

Its `.metadata` is read with an unpickler that knows torch's metadata types only; every item it
names must be there, long enough, and as its own checksum says; then a manifest is written. No file
that was there is touched.
"""

import io
import uuid
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ray_ckpt.core import names
from ray_ckpt.core.errors import ForeignFolderError, IntegrityError, ObjectNotFoundError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest, ModelEntry
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, describe_object
from ray_ckpt.storage.listing import sizes_in
from ray_ckpt.tensors.index import NOT_THE_MODEL, model_keys, read_foreign_metadata
from ray_ckpt.tensors.step_index import StepIndex

_UNTOUCHED = "the folder is untouched; it stays foreign"
_ELSEWHERE = "restore these files from a copy, or resume from another step"


def foreign_steps(catalog: Catalog) -> list[int]:
    """Steps whose folder holds no manifest, oldest first."""
    views = catalog.observe().checkpoints
    return [view.step for view in views if view.state is CheckpointState.FOREIGN]


def adopt_step(
    catalog: Catalog,
    step: int,
    *,
    family: str | None = None,
    assets: Mapping[str, bytes] | None = None,
) -> Manifest:
    """The step is committed from now on; returns its manifest. Its bytes are as they were.

    Args:
        catalog: the root it lies in.
        step: whose folder it is.
        family: name of the adapter that knows the model's names; None if nobody will export it.
        assets: `config.json` and the tokenizer's files by name, put beside it for exports.

    Raises:
        ForeignFolderError: the folder is no DCP checkpoint.
        IntegrityError: a shard is missing, too short or damaged, or `.metadata` is damaged or
            hostile.
    """
    folder = names.step_dir(step)
    metadata = _read_metadata(catalog, step)
    _refuse_what_is_not_whole(catalog, step, metadata)
    for name, data in (assets or {}).items():
        catalog.store.write(f"{folder}/{names.ASSETS}/{name}", data)
    files = (n for n in sorted(sizes_in(catalog.store, folder)) if names.parse_pin(n) is None)
    keys = metadata.state_dict_metadata
    is_model_alone = all(
        isinstance(entry, TensorStorageMetadata) and key.partition(".")[0] not in NOT_THE_MODEL
        for key, entry in keys.items()
    )
    index = StepIndex.of(metadata)
    own = model_keys(metadata, NOT_THE_MODEL)
    manifest = Manifest(
        step=step,
        save_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=Lineage(run_id=catalog.observe().run_id, adopted=True),
        files=tuple(
            describe_object(
                catalog.store,
                f"{folder}/{name}",
                name=name,
                algorithm=STRONG_ALGORITHM if name == names.METADATA else SHARD_ALGORITHM,
            )
            for name in files
        ),
        tensors=index.entries(),
        tensor_bytes=index.tensor_bytes(own),
        model=ModelEntry(family=family, keys=own),
        holds="model" if is_model_alone else "everything",
    )
    catalog.adopt(manifest)
    return manifest


def _read_metadata(catalog: Catalog, step: int) -> Metadata:
    folder = names.step_dir(step)
    where = f"{catalog.uri}/{folder}"
    try:
        return read_foreign_metadata(catalog.store.read(f"{folder}/{names.METADATA}"), where)
    except ObjectNotFoundError as error:
        if not sizes_in(catalog.store, folder):
            raise step_errors.not_readable(catalog.uri, step, catalog.observe()) from error
        raise ForeignFolderError(
            f"step-{step} holds no {names.METADATA}: it is no finished DCP checkpoint",
            where,
            _UNTOUCHED,
            "leave a save that is being written or a Hugging Face folder alone; remove the remains "
            "of a dead save by hand",
        ) from error


def _refuse_what_is_not_whole(catalog: Catalog, step: int, metadata: Metadata) -> None:
    """Nothing, if every item of every shard is there and as its own checksum says."""
    folder = names.step_dir(step)
    sizes = sizes_in(catalog.store, folder)
    items: dict[str, list[Any]] = {}
    for item in metadata.storage_data.values():
        items.setdefault(item.relative_path, []).append(item)
    short = [
        file
        for file, parts in sorted(items.items())
        if sizes.get(file, -1) < max(part.offset + part.length for part in parts)
    ]
    if short:
        raise _not_whole(catalog, step, f"missing or too short: {', '.join(short)}")
    for file, parts in sorted(items.items()):
        with catalog.store.open_read(f"{folder}/{file}") as shard:
            damaged = [p for p in parts if _is_damaged(_Item(shard, p.offset, p.length))]
        if damaged:
            places = ", ".join(str(part.offset) for part in damaged[:3])
            what = f"{file} is damaged: {len(damaged)} of {len(parts)} items, first at {places}"
            raise _not_whole(catalog, step, what)


def _not_whole(catalog: Catalog, step: int, what: str) -> IntegrityError:
    where = f"{catalog.uri}/{names.step_dir(step)}"
    return IntegrityError(f"step-{step} is not whole: {what}", where, _UNTOUCHED, _ELSEWHERE)


def _is_damaged(item: "_Item") -> bool:
    """Whether an item that torch saved (a zip, with a CRC-32 of each record) is not as written.

    Records without one, as we and `torch.serialization.set_crc32_options(False)` write them, have
    nothing to be compared with.
    """
    if item.read(4) != b"PK\x03\x04":
        return False  # another format, which has no checksum of its own; or torch will refuse it
    try:
        with zipfile.ZipFile(item) as archive:
            for record in archive.infolist():
                if record.CRC:
                    archive.read(record)
            return False
    except Exception:  # noqa: BLE001  a damaged zip fails in many ways, and all mean the same
        return True


class _Item(io.RawIOBase):
    """One item of a shard as a file of its own."""

    def __init__(self, shard: BinaryIO, offset: int, length: int) -> None:
        self._shard, self._offset, self._length, self._at = shard, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("before the start")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), max(0, self._length - self._at))
        self._shard.seek(self._offset + self._at)
        data = self._shard.read(num_bytes)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
