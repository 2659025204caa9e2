"""A committed step becomes a Hugging Face folder, without the training code and without the model.

    plan     names, shapes and dtypes alone: which tensors go into which output shard
    shard    reads what that shard is made of, writes one safetensors file; see `shard_writer`
    finish   index, config, tokenizer, model card, manifest; then the one commit

Shards are made by whoever the caller sends, in any order, and noted as they are finished: a killed
export goes on from them. What is visible is whole.
"""

import hashlib
import json
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from ray_ckpt.core import names
from ray_ckpt.core.actions import ExportSpec
from ray_ckpt.core.errors import (
    ConflictError,
    ObjectExistsError,
    OutOfMemoryError,
    RayCkptError,
    StorageError,
    UsageError,
)
from ray_ckpt.core.failures import RETRIES, classify
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.version import __version__
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.memory import free_memory_bytes
from ray_ckpt.storage.parts import ExportParts, Part
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.room import expect_room_in
from ray_ckpt.tensors.export_files import described, write_companions
from ray_ckpt.tensors.export_plan import ExportPlan, OutputShard, plan_export
from ray_ckpt.tensors.gate import expect_sound_assets, expect_sound_files
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.safetensors_file import specs_of
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.step_tensors import step_tensors


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export that is being made, as every process knows it that has a part in it."""

    catalog: Catalog
    source: Manifest
    spec: ExportSpec
    plan: ExportPlan
    parts: ExportParts

    def missing(self, *, progress: Progress = UNTOLD) -> list[OutputShard]:
        """Shards that nobody has finished yet; those that somebody has are read and compared."""
        finished = self.parts.intact(progress=progress)
        return [shard for shard in self.plan.shards if shard.file not in finished]

    def shard(self, file: str) -> OutputShard:
        """The one that is written to that file."""
        return next(shard for shard in self.plan.shards if shard.file == file)

    def make(self, shard: OutputShard, *, progress: Progress = UNTOLD) -> None:
        """The shard is finished. Twice is harmless.

        Raises:
            OutOfMemoryError: this host has not enough; nothing was written.
        """
        self._expect_memory()
        key, blocks = self.parts.begin(shard.file, shard.size_bytes)
        tensors = step_tensors(self.catalog, self.source)
        entry = write_shard(blocks, self.plan, shard, tensors, progress=progress)
        self.parts.end(entry, key)

    def finish(self) -> Manifest:
        """The export is there, whole; every shard was finished before.

        Raises:
            ConflictError: somebody has removed one, or replaced it.
        """
        parts = self.parts.finished()
        lacking = [shard.file for shard in self.plan.shards if shard.file not in parts]
        if lacking:
            raise ConflictError(
                f"{len(lacking)} files of {self.spec.name} are gone or were replaced, first "
                f"{lacking[0]}: another export of this name was made meanwhile",
                self.catalog.uri,
                "the checkpoint is untouched, and no reader sees a part of the export",
                "nothing, they are made again; give exports that differ different names",
            )
        staging = self.catalog.commit.staging(f"export-{uuid.uuid4().hex}")
        try:
            expected = {
                shard.file: {name: self.plan.recording.outputs[name].spec for name in shard.outputs}
                for shard in self.plan.shards
            }
            expect_sound_files(self._held(parts), expected)
            self.parts.take(staging, parts)
            write_companions(_assets(self.catalog, self.source), self.plan, self.source, staging)
            written = [part.entry for part in parts.values()]
            files = [*written, *described(staging, except_for=written)]
            export = _manifest(self.source, self.spec, files)
            _expect_the_same(self.catalog, self.source)  # a trainer that rolls back asks no reader
            present = self.catalog.commit_export(staging, self.spec.name, export)
        except BaseException:
            self.catalog.commit.discard(staging)
            raise
        self.parts.drop()
        return present

    def _held(self, parts: Mapping[str, Part]) -> dict[str, dict[str, TensorSpec]]:
        """By file and by name what lies there, read back."""
        store = self.catalog.store
        found: dict[str, dict[str, TensorSpec]] = {}
        for file, part in parts.items():
            length = bytearray(8)
            store.read_into(part.key, 0, memoryview(length))
            text = bytearray(int.from_bytes(length, "little"))
            store.read_into(part.key, 8, memoryview(text))
            found[file] = specs_of(bytes(text))
        return found

    def _expect_memory(self) -> None:
        needed, free = self.plan.memory_bytes, free_memory_bytes()
        if free is not None and free < needed:
            raise OutOfMemoryError(
                f"a shard of {self.spec.name} is made in {needed / 1e9:.2f} GB of memory, "
                f"{free / 1e9:.2f} GB are free on {socket.gethostname()}",
                self.catalog.uri,
                "nothing was written; the checkpoint is untouched",
                "give tasks a node with more memory (custom resource ckpt_io)",
            )


Crew = Callable[[Export, Sequence[OutputShard], Progress], None]
"""Makes these shards, and tells of the bytes as they are written."""


def alone(export: Export, shards: Sequence[OutputShard], progress: Progress) -> None:
    """In this process, one after the other."""
    for shard in shards:
        export.make(shard, progress=progress)


def begin_export(catalog: Catalog, manifest: Manifest, spec: ExportSpec) -> Export:
    """The export, planned: the same for every process that asks. Writes nothing.

    Raises:
        UsageError: the checkpoint holds no model that can be exported in this form.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: the step holds NaN or Inf; or an asset or the index differs from the
            manifest.
    """
    plan = plan_export(catalog, manifest, spec)
    export_id = _id(manifest, spec, plan)
    parts = catalog.export_parts(export_id, spec.name, manifest.step)
    return Export(catalog=catalog, source=manifest, spec=spec, plan=plan, parts=parts)


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
        _expect_the_same(catalog, manifest)  # a purge may have come before the lease
        export = begin_export(catalog, manifest, spec)
        expect_sound_assets(_assets(catalog, manifest), export.plan.config)
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


def _id(manifest: Manifest, spec: ExportSpec, plan: ExportPlan) -> str:
    """Stands for everything that shapes a byte of the shards, or says which shard holds what."""
    shapes = {
        "source": manifest.content_id,
        "recipe": _recipe(manifest, spec),
        "shards": {shard.file: shard.outputs for shard in plan.shards},
        "made by": f"ray_ckpt {__version__}, torch {torch.__version__}",
    }
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


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
    return {**spec.recipe, "family": family or ""}


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
