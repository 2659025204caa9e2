"""A DCP checkpoint that somebody else wrote (TorchTitan, Ray Train, plain DCP) becomes ours.

Its `.metadata` is read with an unpickler that knows torch's metadata types only, every file it
names must be there and long enough, and then a manifest is written. No other file is touched.
"""

import uuid
from datetime import UTC, datetime

from ray_ckpt.core import names
from ray_ckpt.core.errors import ForeignFolderError, IntegrityError, ObjectNotFoundError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, describe_object
from ray_ckpt.storage.listing import sizes_in
from ray_ckpt.tensors.index import read_foreign_metadata, tensor_index

_UNTOUCHED = "the folder is untouched; it stays foreign"


def foreign_steps(catalog: Catalog) -> list[int]:
    """Steps whose folder holds no manifest, oldest first."""
    views = catalog.observe().checkpoints
    return [view.step for view in views if view.state is CheckpointState.FOREIGN]


def adopt_step(catalog: Catalog, step: int) -> Manifest:
    """The step is committed from now on; returns its manifest. Its bytes are as they were.

    Raises:
        ForeignFolderError: the folder is no DCP checkpoint.
        IntegrityError: a shard is missing or too short, or `.metadata` is damaged or hostile.
    """
    folder = names.step_dir(step)
    where = f"{catalog.uri}/{folder}"
    try:
        data = catalog.store.read(f"{folder}/{names.METADATA}")
    except ObjectNotFoundError as error:
        raise ForeignFolderError(
            f"step-{step} holds no {names.METADATA}: it is no finished DCP checkpoint",
            where,
            _UNTOUCHED,
            "remove the folder by hand if it is the remains of a dead save",
        ) from error
    tensors = tensor_index(read_foreign_metadata(data, where))
    sizes = {n: s for n, s in sizes_in(catalog.store, folder).items() if names.parse_pin(n) is None}
    ends: dict[str, int] = {}
    for chunk in (chunk for entry in tensors for chunk in entry.chunks):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset_bytes + chunk.length_bytes)
    short = sorted(name for name, end in ends.items() if sizes.get(name, -1) < end)
    if short:
        raise IntegrityError(
            f"step-{step} is not whole: missing or too short: {', '.join(short)}",
            where,
            _UNTOUCHED,
            "restore these files from a copy, or resume from another step",
        )
    manifest = Manifest(
        step=step,
        save_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=Lineage(run_id=catalog.observe().run_id),
        files=tuple(
            describe_object(
                catalog.store,
                f"{folder}/{name}",
                name=name,
                algorithm=STRONG_ALGORITHM if name == names.METADATA else SHARD_ALGORITHM,
            )
            for name in sorted(sizes)
        ),
        tensors=tensors,
    )
    catalog.adopt(manifest)
    return manifest
