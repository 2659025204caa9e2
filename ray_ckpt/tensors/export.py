"""A committed step becomes a Hugging Face folder, without the training code and without the model.

    plan     names, shapes and dtypes alone: which tensors go into which output shard
    shard    reads what that shard is made of, writes one safetensors file; see `shard_writer`
    finish   index, config, tokenizer, model card, manifest; then the one commit

Works in a private folder; what is visible is whole.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from ray_ckpt.core import names
from ray_ckpt.core.actions import ExportSpec
from ray_ckpt.core.errors import ObjectExistsError, UsageError
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.room import expect_room
from ray_ckpt.tensors.export_files import described, write_companions
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.step_tensors import step_tensors


def export_step(
    catalog: Catalog, manifest: Manifest, spec: ExportSpec, *, progress: Progress = UNTOLD
) -> Manifest:
    """The export is in `exports/<name>/step-<n>`, whole; returns its manifest.

    The caller has verified the step: shards are read once, for the export, not twice.

    A second run is harmless: an export of the same source and spec that is there is returned as it
    is, and two at once work in folders of their own until one of them commits.

    Raises:
        UsageError: the checkpoint holds no model that can be exported in this form, or another
            export of the same name is in the way.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: the step holds NaN or Inf; or an asset or the index differs from the
            manifest.
        StorageFullError: not enough room; nothing was written.
        StepNotFoundError: the step was taken away meanwhile; no export was made.
    """
    present = _present(catalog, manifest, spec)
    if present is not None:
        return present
    with reading(catalog.store, manifest.step, who=f"export {spec.name}"):
        _expect_the_same(catalog, manifest)  # a purge may have come before the lease
        return _export(catalog, manifest, spec, progress)


def _export(catalog: Catalog, manifest: Manifest, spec: ExportSpec, progress: Progress) -> Manifest:
    """In a private folder, then committed."""
    plan = plan_export(catalog, manifest, spec)
    staging = catalog.commit.staging(f"export-{uuid.uuid4().hex}")
    try:
        expect_room(staging, plan.total_bytes, what=f"{spec.name} of step-{manifest.step}")
        progress.begin(f"exports {spec.name}", plan.total_bytes)
        tensors = step_tensors(catalog, manifest)
        written = [
            write_shard(staging / shard.file, plan, shard, tensors, progress=progress)
            for shard in plan.shards
        ]
        write_companions(_assets(catalog, manifest), plan, manifest, staging)
        export = _manifest(manifest, spec, [*written, *described(staging, except_for=written)])
        _expect_the_same(catalog, manifest)  # a trainer that rolls back asks no reader
        catalog.commit_export(staging, spec.name, export)
    except BaseException:
        catalog.commit.discard(staging)
        raise
    return export


def _expect_the_same(catalog: Catalog, manifest: Manifest) -> None:
    """Raises UsageError unless this very save is in place."""
    if catalog.manifest(manifest.step).content_id != manifest.content_id:
        raise UsageError(
            f"step-{manifest.step} was saved anew while it was exported",
            catalog.uri,
            "no export was made; both saves are as they were",
            "run the same command again to export the new one",
        )


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
        f"another export is called {spec.name!r}: it was made from another save, or in another "
        f"way: {_sentence(found.lineage.recipe)}",
        f"{catalog.uri}/{folder}",
        "it is untouched",
        "choose another --name",
    )


def _recipe(manifest: Manifest, spec: ExportSpec) -> dict[str, str]:
    family = manifest.model.family if manifest.model else None
    flavors = {f"flavor.{name}": flavor for name, flavor in spec.flavors.items()}
    return {"name": spec.name, "dtype": spec.dtype, "family": family or "", **flavors}


def _sentence(recipe: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(recipe.items()) if key != "name")


def _assets(catalog: Catalog, manifest: Manifest) -> dict[str, bytes]:
    """Every file of `hf_assets/`, by name."""
    prefix = f"{names.ASSETS}/"
    paths = [entry.path for entry in manifest.files if entry.path.startswith(prefix)]
    read = {path: read_asset(catalog, manifest, path.removeprefix(prefix)) for path in paths}
    return {path.removeprefix(prefix): data for path, data in read.items() if data is not None}


def _manifest(source: Manifest, spec: ExportSpec, files: Sequence[FileEntry]) -> Manifest:
    return Manifest(
        step=source.step,
        save_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=Lineage(
            run_id=source.lineage.run_id,
            resumed_from=source.lineage.resumed_from,
            started_from=source.lineage.started_from,
            source_id=source.content_id,
            recipe=_recipe(source, spec),
        ),
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        is_last_step=source.is_last_step,
        metrics=source.metrics,
        non_finite=source.non_finite,
        versions=source.versions,
    )
