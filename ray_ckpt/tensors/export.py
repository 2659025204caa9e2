"""A committed step becomes a Hugging Face folder, without the training code and without the model.

    plan     names, shapes and dtypes alone: which tensors go into which output shard
    shard    reads that shard's sources, applies the transforms, writes one safetensors file
    finish   index, config, tokenizer, model card, manifest; then the one commit

Works in a private folder; what is visible is whole. Memory is bounded by one output shard.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ray_ckpt.core import names
from ray_ckpt.core.actions import ExportSpec
from ray_ckpt.core.errors import ObjectExistsError, StateDictError, StorageFullError, UsageError
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest, TensorEntry
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_file
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.local import sync_file, write_synced
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.model_card import model_card
from ray_ckpt.tensors.reader import read_asset, read_tensors
from ray_ckpt.tensors.transforms import TORCH_DTYPES, StateDictTransforms

MAX_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
Progress = Callable[[int, int], None]
"""Called with shards done and shards in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One safetensors file of an export."""

    file: str
    sources: tuple[str, ...]
    """Native tensors it is made of."""
    outputs: tuple[str, ...]
    """HF tensors it holds."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that is written, known before a byte is."""

    transforms: StateDictTransforms
    config: Mapping[str, Any]
    shards: tuple[OutputShard, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size_bytes for shard in self.shards)


def export_step(
    catalog: Catalog, manifest: Manifest, spec: ExportSpec, *, progress: Progress = lambda *_: None
) -> Manifest:
    """The export is in `exports/<name>/step-<n>`, whole; returns its manifest.

    The caller has verified the step: shards are read once, for the export, not twice.

    A second run is harmless: an export of the same source and spec that is there is returned as it
    is, and two at once work in folders of their own until one of them commits.

    Raises:
        UsageError: the checkpoint holds no model that can be exported, or another export of the
            same name is in the way.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: an asset or the index differs from the manifest.
        StorageFullError: not enough room; nothing was written.
    """
    present = _present(catalog, manifest, spec)
    if present is not None:
        return present
    plan = plan_export(catalog, manifest, spec)
    staging = catalog.commit.staging(f"export-{uuid.uuid4().hex}")
    try:
        _refuse_without_room(staging, plan.total_bytes)
        for done, shard in enumerate(plan.shards):
            progress(done, len(plan.shards))
            write_shard(catalog, manifest, plan, shard, folder=staging)
        _write_companions(catalog, manifest, plan, staging)
        export = _manifest(manifest, spec, staging)
        catalog.commit_export(staging, spec.name, export)
    except BaseException:
        catalog.commit.discard(staging)
        raise
    progress(len(plan.shards), len(plan.shards))
    return export


def plan_export(
    catalog: Catalog,
    manifest: Manifest,
    spec: ExportSpec,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportPlan:
    """Which tensors go where; reads the assets and no tensor."""
    if manifest.model is None:
        raise UsageError(
            f"step-{manifest.step} does not say what model it holds",
            catalog.uri,
            "the checkpoint is untouched and can be resumed",
            "save with CheckpointManager(..., assets=HfAssets(family=..., files=...))",
        )
    config = read_asset(catalog, manifest, CONFIG)
    if config is None:
        raise UsageError(
            f"step-{manifest.step} was saved without {CONFIG}, which an export needs",
            catalog.uri,
            "the checkpoint is untouched and can be resumed",
            f"put {CONFIG} into HfAssets.files",
        )
    parsed: dict[str, Any] = json.loads(config)
    transforms = StateDictTransforms(
        adapter=make_adapter(manifest.model.family, parsed), dtype=spec.dtype
    )
    sources = transforms.adapter.sources(manifest.model.keys)
    entries = {entry.name: entry for entry in manifest.tensors}
    sizes = {hf: sum(_out_bytes(entries[k], spec) for k in keys) for hf, keys in sources.items()}
    groups = _split(sizes, max_shard_bytes)
    shards = tuple(
        OutputShard(
            file=_shard_name(index, len(groups)),
            sources=tuple(key for hf in group for key in sources[hf]),
            outputs=tuple(group),
            size_bytes=sum(sizes[hf] for hf in group),
        )
        for index, group in enumerate(groups)
    )
    return ExportPlan(transforms=transforms, config=parsed, shards=shards)


def write_shard(
    catalog: Catalog, manifest: Manifest, plan: ExportPlan, shard: OutputShard, *, folder: Path
) -> None:
    """One output file, written and synced."""
    tensors = plan.transforms.to_hf(read_tensors(catalog, manifest, shard.sources))
    lacking = sorted(set(shard.outputs) ^ set(tensors))
    if lacking:
        raise StateDictError(f"{shard.file} would not hold what was planned: {', '.join(lacking)}")
    contiguous = {name: tensors[name].contiguous() for name in shard.outputs}
    save_file(contiguous, folder / shard.file, metadata={"format": "pt"})
    sync_file(folder / shard.file)


def _present(catalog: Catalog, manifest: Manifest, spec: ExportSpec) -> Manifest | None:
    """The same export, if it is there already."""
    folder = names.export_dir(spec.name, manifest.step)
    found = manifest_in(catalog.store, folder)
    if found is None:
        return None
    same = found.lineage.source_id == manifest.content_id
    if same and found.lineage.recipe == _recipe(manifest, spec):
        return found
    raise ObjectExistsError(
        f"another export is called {spec.name!r}: it was made from another save, or as "
        f"{found.lineage.recipe.get('dtype', 'unknown')}",
        f"{catalog.uri}/{folder}",
        "it is untouched",
        "choose another --name",
    )


def _recipe(manifest: Manifest, spec: ExportSpec) -> dict[str, str]:
    family = manifest.model.family if manifest.model else ""
    return {"name": spec.name, "dtype": spec.dtype, "family": family}


def _out_bytes(entry: TensorEntry, spec: ExportSpec) -> int:
    import torch

    dtype = getattr(torch, entry.dtype)
    out = TORCH_DTYPES[spec.dtype] if dtype.is_floating_point else dtype
    count = 1
    for length in entry.shape:
        count *= length
    return count * out.itemsize


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next one would make a shard too large; never none."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _refuse_without_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageFullError(
            f"the export needs {needed_bytes} bytes, {free} are free",
            str(folder),
            "nothing was written",
            "free space, then run the same command again",
        )


def _write_companions(catalog: Catalog, manifest: Manifest, plan: ExportPlan, folder: Path) -> None:
    """Everything beside the tensors that `from_pretrained` and a reader look for."""
    prefix = f"{names.ASSETS}/"
    for entry in manifest.files:
        if entry.path.startswith(prefix) and entry.path != f"{prefix}{CONFIG}":
            name = entry.path.removeprefix(prefix)
            data = read_asset(catalog, manifest, name)
            assert data is not None, "the manifest lists it"
            write_synced(folder / name, data)
    # transformers 4 reads torch_dtype, transformers 5 reads dtype
    dtype = plan.transforms.dtype
    write_synced(folder / CONFIG, _json({**plan.config, "torch_dtype": dtype, "dtype": dtype}))
    weight_map = {name: shard.file for shard in plan.shards for name in shard.outputs}
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map}
    write_synced(folder / INDEX, _json(index))
    write_synced(folder / "README.md", model_card(manifest, dtype).encode())


def _manifest(source: Manifest, spec: ExportSpec, folder: Path) -> Manifest:
    files: list[FileEntry] = [
        describe_file(path, path.relative_to(folder).as_posix(), STRONG_ALGORITHM)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return Manifest(
        step=source.step,
        save_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=Lineage(
            run_id=source.lineage.run_id,
            resumed_from=source.lineage.resumed_from,
            source_id=source.content_id,
            recipe=_recipe(source, spec),
        ),
        files=tuple(files),
        is_last_step=source.is_last_step,
        metrics=source.metrics,
        versions=source.versions,
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
