"""What an export of a step will hold, known before a byte of a tensor is read or written.

    manifest  ->  refusals  ->  transforms  ->  recording  ->  output shards

Reads the step's `config.json` and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_ckpt.core.config import MAX_SHARD_BYTES, Device, Dtype, ExportFormat
from ray_ckpt.core.errors import IntegrityError, StateDictError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest, ModelEntry
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.converters import (
    WHOLE_MODEL,
    ExportLayout,
    ModelConverter,
    make_converters,
)
from ray_ckpt.tensors.gate import expect_sound_plan
from ray_ckpt.tensors.output_shards import (
    OutputShard,
    cut_into_shards,
    in_one_torch_file,
    is_sharded,
)
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.recording import Recording, TensorSpec, record
from ray_ckpt.tensors.run import CONFIG, INDEX
from ray_ckpt.tensors.transforms import StateDictTransforms

_UNTOUCHED = "the checkpoint is untouched and can be resumed"
_NAMES_TOLD = 3
_BLOCKS_BYTES = 64_000_000
"""Read ahead, filled, digested and written at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that is written, known before a byte is."""

    recording: Recording
    """From the step's own tensors to those of the export."""
    dtype: Dtype
    layout: ExportLayout
    config: Mapping[str, Any]
    """The model's `config.json`, as it was saved."""
    shards: tuple[OutputShard, ...]
    format: ExportFormat = "safetensors"
    device: Device = "cpu"
    """Where outputs that are no views are computed."""
    allow_non_finite: bool = False
    allow_zeros: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def memory_bytes(self) -> int:
        """The most that one shard is made in, about: blocks of it, and what it computes at once.

        A tensor that is no view of its source is made of all its sources, and of as much again on
        the way.
        """
        inputs, outputs = self.recording.inputs, self.recording.outputs
        computed = [
            sum(inputs[key].size_bytes for key in output.sources) + 2 * output.spec.size_bytes
            for output in outputs.values()
            if output.view is None
        ]
        return _BLOCKS_BYTES + max(computed, default=0)

    @property
    def file_metadata(self) -> dict[str, str]:
        """What every safetensors file says of itself."""
        return {"format": "pt", **self.layout.metadata}

    @property
    def index_file(self) -> str | None:
        """Says which shard holds which tensor; None where there can be one file only."""
        if self.format == "torch" or not is_sharded(self.layout):
            return None
        return f"{self.layout.weights}.safetensors.index.json"


def plan_export(catalog: Catalog, manifest: Manifest, spec: ExportSpec) -> ExportPlan:
    """Which tensors go where; reads the assets and no tensor.

    Raises:
        UsageError: the step holds no model that can be exported in this form.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: the step holds NaN or Inf, or an asset differs from the manifest.
    """
    if not spec.allow_non_finite:
        _refuse_non_finite(catalog, manifest)
    model, family = _model(catalog, manifest)
    config = _config(catalog, manifest)
    transforms = StateDictTransforms(
        adapter=make_adapter(family, config),
        dtype=spec.dtype,
        converters=make_converters(model.converters, spec.flavors),
    )
    _refuse_without_base(catalog, manifest, transforms)
    inputs = _inputs(manifest, model)
    is_cut_as_asked = spec.max_shard_bytes != MAX_SHARD_BYTES
    index = None if is_cut_as_asked else read_asset(catalog, manifest, INDEX)
    plan = plan_model(transforms, inputs, config, max_shard_bytes=spec.max_shard_bytes, index=index)
    if spec.format == "torch":
        whole = in_one_torch_file(plan.shards, plan.layout)
        plan = replace(plan, format=spec.format, shards=whole)
    return replace(
        plan,
        device=spec.device,
        allow_non_finite=spec.allow_non_finite,
        allow_zeros=plan.allow_zeros or spec.allow_zeros,
    )


def plan_model(
    transforms: StateDictTransforms,
    inputs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    index: bytes | None = None,
) -> ExportPlan:
    """Which tensors go where, for a whole model of these tensors.

    Args:
        transforms: from native tensors to those of the export.
        inputs: the native tensors.
        config: the model's `config.json`.
        max_shard_bytes: of each file, unless an index says more.
        index: the base model's; files are cut as there, if it names every tensor.

    Raises:
        UsageError: two converters ask for a format of their own.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: the outputs are not the model that the config describes.
    """
    recording = record(transforms.whole_to_hf, inputs)
    expect_sound_plan(recording, transforms, config)
    layout = _layout(transforms.converters, recording)
    return ExportPlan(
        recording=recording,
        dtype=transforms.dtype,
        layout=layout,
        config=config,
        shards=cut_into_shards(recording, layout, max_shard_bytes=max_shard_bytes, index=index),
        allow_zeros=not is_sharded(layout),  # an adapter begins with them
    )


def _refuse_non_finite(catalog: Catalog, manifest: Manifest) -> None:
    if manifest.non_finite:
        raise IntegrityError(
            f"{len(manifest.non_finite)} tensors of step-{manifest.step} hold NaN or Inf: "
            + ", ".join(manifest.non_finite[:_NAMES_TOLD])
            + (", ..." if len(manifest.non_finite) > _NAMES_TOLD else ""),
            catalog.uri,
            "the step itself is untouched, and is as it was trained",
            "export an older step; or, if you want this one, add --allow-non-finite",
        )


def _model(catalog: Catalog, manifest: Manifest) -> tuple[ModelEntry, str]:
    model = manifest.model
    if model is None or model.family is None:
        raise UsageError(
            f"step-{manifest.step} does not say what model it holds",
            catalog.uri,
            _UNTOUCHED,
            "save with CheckpointManager(..., assets=HfAssets(family=..., files=...))",
        )
    return model, model.family


def _config(catalog: Catalog, manifest: Manifest) -> dict[str, Any]:
    config = read_asset(catalog, manifest, CONFIG)
    if config is None:
        raise UsageError(
            f"step-{manifest.step} was saved without {CONFIG}, which an export needs",
            catalog.uri,
            _UNTOUCHED,
            f"put {CONFIG} into HfAssets.files",
        )
    return json.loads(config)


def _refuse_without_base(
    catalog: Catalog, manifest: Manifest, transforms: StateDictTransforms
) -> None:
    """A step that holds a converter's keys alone can be exported in that converter's own format."""
    is_whole_model = transforms.names() is transforms.adapter
    if manifest.needs and is_whole_model:
        needed = ", ".join(f"{source.name} ({source.format})" for source in manifest.needs)
        raise UsageError(
            f"step-{manifest.step} holds a part of its model; the rest is in {needed}",
            catalog.uri,
            _UNTOUCHED,
            "export the part it holds: --as lora=peft; to merge it, load both and save everything",
        )


def _inputs(manifest: Manifest, model: ModelEntry) -> dict[str, TensorSpec]:
    entries = {entry.name: entry for entry in manifest.tensors}
    lacking = [key for key in model.keys if key not in entries]
    if lacking:
        raise StateDictError(
            f"the manifest of step-{manifest.step} names tensors of the model that it does not "
            f"hold: {', '.join(lacking)}",
            safe="nothing was written",
        )
    return {
        key: TensorSpec(shape=entries[key].shape, dtype=getattr(torch, entries[key].dtype))
        for key in model.keys
    }


def _layout(converters: tuple[ModelConverter, ...], recording: Recording) -> ExportLayout:
    """How files are called and described: as the one converter says that changes it."""
    outputs = {name: output.spec for name, output in recording.outputs.items()}
    asked = {c.name: c.layout(outputs) for c in converters}
    changed = {name: layout for name, layout in asked.items() if layout != WHOLE_MODEL}
    if len(changed) > 1:
        raise UsageError(
            f"{' and '.join(changed)} each write an export in their own way",
            "export",
            _UNTOUCHED,
            f"export one of them in another form: --as {next(iter(changed))}=...",
        )
    return next(iter(changed.values()), WHOLE_MODEL)
