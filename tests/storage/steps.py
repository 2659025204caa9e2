"""A small committed step or export, made by the same calls as a real save."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, describe_file
from ray_ckpt.storage.trash import Trash

CREATED_AT = "2030-01-02T03:04:05+00:00"
TORCH_SHARD = "__0_0.distcp"
FILES: Mapping[str, bytes] = {
    ".metadata": b"index",
    "__0_0.distcp": b"weights of rank 0",
    "hf_assets/config.json": b"{}",
}


def shard_name(catalog: Catalog, save_id: str) -> str:
    """How the writer of a real save names the one shard: on an object store after the save."""
    prefix = names.shard_prefix(0, save_id) if catalog.commit.names_shards_by_save else "__0_"
    return f"{prefix}0.distcp"


def _named(catalog: Catalog, files: Mapping[str, bytes], save_id: str) -> dict[str, bytes]:
    shard = shard_name(catalog, save_id)
    return {shard if name == TORCH_SHARD else name: data for name, data in files.items()}


def stage(catalog: Catalog, step: int, *, files: Mapping[str, bytes], save_id: str) -> Path:
    """The staging folder of the attempt, with `files` written to it."""
    staging = catalog.commit.staging(f"save-{save_id}")
    for name, data in files.items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return staging


def describe(staging: Path, step: int, *, files: Mapping[str, bytes], save_id: str) -> Manifest:
    """The manifest of what `stage` wrote."""
    return Manifest(
        step=step,
        save_id=save_id,
        created_at=CREATED_AT,
        lineage=Lineage(run_id="run"),
        files=tuple(_entry(staging / name, name) for name in files),
        metrics={"loss": 1.0 / step},
    )


def save_step(
    catalog: Catalog,
    step: int,
    *,
    files: Mapping[str, bytes] = FILES,
    save_id: str = "",
    created_at: str = CREATED_AT,
) -> Manifest:
    """The step is committed; raises as `commit_step` does."""
    save_id = save_id or f"save{step}"
    catalog.refuse_existing(step)
    catalog.commit.clear(names.step_dir(step))
    files = _named(catalog, files, save_id)
    staging = stage(catalog, step, files=files, save_id=save_id)
    manifest = describe(staging, step, files=files, save_id=save_id)
    manifest = replace(manifest, created_at=created_at)
    catalog.commit_step(staging, manifest)
    return manifest


def save_export(
    catalog: Catalog, name: str, step: int, *, files: Mapping[str, bytes], save_id: str
) -> Manifest:
    """The export is there; raises as `commit_export` does."""
    staging = stage(catalog, step, files=files, save_id=save_id)
    manifest = describe(staging, step, files=files, save_id=save_id)
    catalog.commit_export(staging, name, manifest)
    return manifest


def content_of(catalog: Catalog, step: int) -> dict[str, bytes]:
    """Every file of a committed step, read back through its manifest; shards by torch's name."""
    folder = names.step_dir(step)
    return {
        TORCH_SHARD if names.save_of_shard(entry.path) else entry.path: catalog.store.read(
            f"{folder}/{entry.path}"
        )
        for entry in catalog.manifest(step).files
    }


def _entry(path: Path, name: str) -> FileEntry:
    is_shard = name.endswith(".distcp")
    return describe_file(path, name, SHARD_ALGORITHM if is_shard else STRONG_ALGORITHM)


def empty_trash(catalog: Catalog, *, older_than_s: float, now: float) -> dict[int, int]:
    """Bytes freed by step, of all that was trashed more than `older_than_s` ago, as gc does it."""
    trash = Trash(catalog.store, catalog.commit, catalog.records)
    expired = trash.expired(older_than_s=older_than_s, now=now)
    return {trashed.step: trash.erase(trashed) for trashed in expired}
