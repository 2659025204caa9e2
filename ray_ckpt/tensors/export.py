"""A committed step becomes a Hugging Face folder, without the training code and without the model.

What is there already is returned, what was begun is gone on with, and an error that another attempt
cannot mend leaves nothing behind. How a shard is made: `exporting`, `shard_writer`.
"""

from collections.abc import Callable, Mapping, Sequence

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    ObjectExistsError,
    RayCkptError,
    StorageError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.failures import RETRIES, classify
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.room import expect_room_in
from ray_ckpt.tensors.exporting import Export, assets_of, begin_export, expect_the_same, recipe_of
from ray_ckpt.tensors.gate import expect_sound_assets
from ray_ckpt.tensors.output_shards import OutputShard

Crew = Callable[[Export, Sequence[OutputShard], Progress], None]
"""Makes these shards, and tells of the bytes as they are written."""


def alone(export: Export, shards: Sequence[OutputShard], progress: Progress) -> None:
    """In this process, one after the other."""
    for shard in shards:
        export.make(shard, progress=progress)


def export_step(
    catalog: Catalog,
    manifest: Manifest,
    spec: ExportSpec,
    *,
    progress: Progress = UNTOLD,
    crew: Crew = alone,
) -> Manifest:
    """The export is in `exports/<name>/step-<n>`, whole; returns its manifest.

    The caller has verified the step: shards are read once, for the export, not twice.

    A second run is harmless: an export of the same source and spec that is there is returned as it
    is, one that was not finished is gone on with, and two at once share what each has finished.

    Raises:
        UsageError, StateDictError, IntegrityError: as `begin_export`.
        ObjectExistsError: another export of the same name is in the way.
        StorageFullError: not enough room; nothing was written.
        StepNotFoundError: the step was taken away meanwhile; no export was made.
    """
    present = _present(catalog, manifest, spec)
    if present is not None:
        return present
    with reading(catalog.store, manifest.step, who=f"export {spec.name}"):
        expect_the_same(catalog, manifest)  # a purge may have come before the lease
        export = begin_export(catalog, manifest, spec)
        assets = assets_of(catalog, manifest)
        expect_sound_assets(assets, export.plan.config)
        export.expect_comparable(assets)
        try:
            return _made(export, progress, crew)
        except StorageError:
            present = _present(catalog, manifest, spec)  # somebody was faster, and has tidied up
            if present is None:
                raise
            return present


def _made(export: Export, progress: Progress, crew: Crew) -> Manifest:
    """What is finished stays for the next attempt, if another attempt may help."""
    try:
        shards = export.missing(progress=progress)
        missing_bytes = sum(shard.size_bytes for shard in shards)
        what = f"{export.spec.name} of step-{export.source.step}"
        expect_room_in(export.catalog.store, missing_bytes, what=what)
        progress.begin(f"exports {export.spec.name}", missing_bytes)
        crew(export, shards, progress)
        return export.finish()
    except RayCkptError as error:
        if classify(error) not in RETRIES:
            export.parts.drop()
        raise


def _present(catalog: Catalog, manifest: Manifest, spec: ExportSpec) -> Manifest | None:
    """The same export, if it is there already."""
    folder = names.export_dir(spec.name, manifest.step)
    found = manifest_in(catalog.store, folder)
    if found is None:
        return None
    same = found.lineage.source_id == manifest.content_id
    if same and found.lineage.recipe == recipe_of(manifest, spec):
        return found
    raise ObjectExistsError(
        f"another export is called {spec.name!r}: it was made from another save, or in another "
        f"way: {_sentence(found.lineage.recipe)}",
        f"{catalog.uri}/{folder}",
        "it is untouched",
        "choose another --name",
    )


def _sentence(recipe: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(recipe.items()) if key != "name")
