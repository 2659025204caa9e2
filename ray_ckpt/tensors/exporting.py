"""One export that is being made, as every process knows it that has a part in it.

    plan     names, shapes and dtypes alone: which tensors go into which output shard
    shard    reads what that shard is made of, writes one file; see `shard_writer`
    finish   index, config, tokenizer, model card, manifest; then the one commit

Shards are made by whoever the caller sends, in any order, and noted as they are finished: a killed
export goes on from them. What is visible is whole.
"""

import hashlib
import json
import logging
import socket
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    ConflictError,
    OutOfMemoryError,
    UsageError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.version import __version__
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.memory import free_memory_bytes
from ray_ckpt.storage.parts import ExportParts, Part
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.tensors.converters import WHOLE_MODEL
from ray_ckpt.tensors.export_files import described, write_companions
from ray_ckpt.tensors.export_plan import ExportPlan, plan_export
from ray_ckpt.tensors.frames import SPECS_IN
from ray_ckpt.tensors.gate import expect_sound_files
from ray_ckpt.tensors.logits import Reference, expect_logits
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.run import REFERENCE
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.step_tensors import step_tensors

log = logging.getLogger("ray_ckpt")


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

    def expect_comparable(self, assets: Mapping[str, bytes]) -> None:
        """Nothing, if logits can be compared here at the end, or nobody asked for that.

        Raises:
            UsageError: the step was saved without any, or it is no whole model that is exported.
            OutOfMemoryError: this host cannot hold the model.
        """
        if self.spec.logits_within is None:
            return
        if REFERENCE not in assets:
            raise UsageError(
                f"step-{self.source.step} was saved without the logits of a prompt",
                self.catalog.uri,
                "nothing was written; the checkpoint is untouched",
                "train with Run(reference=...), or leave --logits-within out",
            )
        if self.plan.layout.weights != WHOLE_MODEL.weights:
            raise UsageError(
                f"{self.spec.name} is an adapter: its logits need the base model",
                self.catalog.uri,
                "nothing was written; the checkpoint is untouched",
                "compare an export of the merged model, and leave --logits-within out here",
            )
        self._expect_memory(self.plan.total_bytes, f"the logits of {self.spec.name} are compared")

    def shard(self, file: str) -> OutputShard:
        """The one that is written to that file."""
        return next(shard for shard in self.plan.shards if shard.file == file)

    def make(self, shard: OutputShard, *, progress: Progress = UNTOLD) -> None:
        """The shard is finished. Twice is harmless.

        Raises:
            OutOfMemoryError: this host has not enough; nothing was written.
        """
        self._expect_memory(self.plan.memory_bytes, f"a shard of {self.spec.name} is made")
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
            assets = assets_of(self.catalog, self.source)
            write_companions(assets, self.plan, self.source, staging, spec=self.spec)
            self._expect_logits(assets, parts, staging)
            written = [part.entry for part in parts.values()]
            files = [*written, *described(staging, except_for=written)]
            export = _manifest(self.source, self.spec, files)
            expect_the_same(self.catalog, self.source)  # a trainer that rolls back asks no reader
            present = self.catalog.commit_export(staging, self.spec.name, export)
        except BaseException:
            self.catalog.commit.discard(staging)
            raise
        self.parts.drop()
        return present

    def _expect_logits(
        self, assets: Mapping[str, bytes], parts: Mapping[str, Part], staging: Path
    ) -> None:
        """As the spec asks; where the folder is an object store's, its files are fetched."""
        within = self.spec.logits_within
        if within is None:
            return
        with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as scratch:
            folder = Path(scratch)
            for path in staging.iterdir():
                (folder / path.name).symlink_to(path)
            for file, part in parts.items():
                if not (folder / file).exists():
                    self.catalog.store.download(part.key, folder / file)
            reference = Reference.from_bytes(assets[REFERENCE])
            worst = expect_logits(folder, reference, within=within)
        log.info(
            "%s of step-%d answers as trained apart=%.3g", self.spec.name, self.source.step, worst
        )

    def _held(self, parts: Mapping[str, Part]) -> dict[str, dict[str, TensorSpec]]:
        """By file and by name what lies there, read back."""
        found: dict[str, dict[str, TensorSpec]] = {}
        for file, part in parts.items():
            with self.catalog.store.open_read(part.key) as stream:
                found[file] = SPECS_IN[self.plan.format](stream)
        return found

    def _expect_memory(self, needed_bytes: int, what: str) -> None:
        free_bytes = free_memory_bytes()
        if free_bytes is not None and free_bytes < needed_bytes:
            raise OutOfMemoryError(
                f"{what} in {needed_bytes / 1e9:.2f} GB of memory, {free_bytes / 1e9:.2f} GB are "
                f"free on {socket.gethostname()}",
                self.catalog.uri,
                "nothing was written; the checkpoint is untouched",
                "give tasks a node with more memory (custom resource ckpt_io)",
            )


def begin_export(catalog: Catalog, manifest: Manifest, spec: ExportSpec) -> Export:
    """The export, planned: the same for every process that asks. Writes nothing.

    Raises:
        UsageError: the checkpoint holds no model that can be exported in this form.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: the step holds NaN or Inf; or an asset or the index differs from the
            manifest.
    """
    _expect_device(spec)
    plan = plan_export(catalog, manifest, spec)
    export_id = _id(manifest, spec, plan)
    parts = catalog.export_parts(export_id, spec.name, manifest.step)
    return Export(catalog=catalog, source=manifest, spec=spec, plan=plan, parts=parts)


def assets_of(catalog: Catalog, manifest: Manifest) -> dict[str, bytes]:
    """Every file of `hf_assets/`, by name."""
    prefix = f"{names.ASSETS}/"
    paths = [entry.path for entry in manifest.files if entry.path.startswith(prefix)]
    read = {path: read_asset(catalog, manifest, path.removeprefix(prefix)) for path in paths}
    return {path.removeprefix(prefix): data for path, data in read.items() if data is not None}


def recipe_of(manifest: Manifest, spec: ExportSpec) -> dict[str, str]:
    """What the manifest of such an export says of how it was made."""
    family = manifest.model.family if manifest.model else None
    return {**spec.recipe, "family": family or ""}


def expect_the_same(catalog: Catalog, manifest: Manifest) -> None:
    """Raises UsageError unless this very save is in place."""
    if catalog.manifest(manifest.step).content_id != manifest.content_id:
        raise UsageError(
            f"step-{manifest.step} was saved anew while it was exported",
            catalog.uri,
            "no export was made; both saves are as they were",
            "run the same command again to export the new one",
        )


def _expect_device(spec: ExportSpec) -> None:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{spec.name} is to be made on a GPU, and torch sees none on {socket.gethostname()}",
            "export",
            "nothing was written; the checkpoint is untouched",
            "export with device cpu, or on a node with a GPU and a torch for CUDA",
        )


def _id(manifest: Manifest, spec: ExportSpec, plan: ExportPlan) -> str:
    """Stands for everything that shapes a byte of the shards, or says which shard holds what."""
    shapes = {
        "source": manifest.content_id,
        "recipe": recipe_of(manifest, spec),
        "shards": {shard.file: shard.outputs for shard in plan.shards},
        "made by": f"ray_ckpt {__version__}, torch {torch.__version__}",
    }
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


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
            recipe=recipe_of(source, spec),
        ),
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        is_last_step=source.is_last_step,
        metrics=source.metrics,
        non_finite=source.non_finite,
        versions=source.versions,
    )
