"""The last save as a Hugging Face folder, written by the ranks that train; no checkpoint beside it.

    plan      the export's own, recorded on the shapes of the live model: the same on every rank
    files     on a file system that all ranks see each writes its own rows (`shared_files`);
              for an object store file i is made by rank i modulo the world size, to which the
              others bring what they hold, one tensor after the other
    finish    rank 0 writes the rest and commits the folder, as an export from storage does

Training waits for it: it is the last thing a run does. Its tensors are bit for bit what an export
of a step saved at the same moment holds.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError, IntegrityError, StateDictError
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.core.saving import HuggingFace
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.export_files import described, write_companions
from ray_ckpt.tensors.export_plan import ExportPlan, plan_model
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.ranks import Ranks, raise_first
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.run import INDEX, HfAssets
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.shared_files import write_together
from ray_ckpt.tensors.transforms import StateDictTransforms


@dataclass(frozen=True, kw_only=True)
class HfSave:
    """One such save, as every rank knows it."""

    catalog: Catalog
    draft: Manifest
    """The manifest so far: everything but the files."""
    what: HuggingFace
    assets: HfAssets


def hf_assets(assets: HfAssets | None) -> HfAssets:
    """The run's assets, which this kind of save cannot do without.

    Raises:
        ConfigError: there are none, or no `config.json` among them.
    """
    if assets is None or assets.config() is None:
        raise ConfigError(
            "the last save is to be a Hugging Face folder, and the run gives no config.json",
            "save.last",
            "nothing was saved",
            "give CheckpointManager(..., assets=HfAssets(family=..., files={'config.json': ...}))",
        )
    return assets


def pending_hf(
    save: HfSave,
    model: ModelWrapper,
    ranks: Ranks,
    *,
    ended: Callable[[PendingSave], None],
) -> PendingSave:
    """The save, not begun yet; its `run` is collective."""
    return PendingSave(
        save.draft.step,
        lambda: save_hf(save, model, ranks),
        missing=lambda: "a rank is dead or hangs",
        ended=ended,
    )


def save_hf(save: HfSave, model: ModelWrapper, ranks: Ranks) -> None:
    """`exports/<name>/step-<n>` is there, whole. Collective.

    Raises:
        ObjectExistsError: an export of this name and step is there; it is untouched.
        StateDictError: a tensor that no rule speaks for, or a model in pipeline stages.
        IntegrityError: a weight is NaN or Inf; nothing was written.
    """
    tensors = model.state_dict()
    _refuse_stages(tensors, ranks)
    _refuse_non_finite(tensors, ranks)
    plan = _plan(save, model, tensors)
    attempt = f"export-{save.draft.save_id}"
    staging = ranks.together(lambda: save.catalog.commit.staging(attempt))
    folder = names.export_dir(save.what.name, save.draft.step)
    try:
        is_shared = save.catalog.commit.is_staging_shared
        write = write_together if is_shared else _write_shards
        written = write(plan, tensors, ranks, folder=staging)
        ranks.together(lambda: save.catalog.commit.contribute(staging, folder))
        ranks.on_coordinator(lambda: _commit(save, plan, written, staging))
    except BaseException:
        save.catalog.commit.discard(staging)
        raise
    save.catalog.commit.leave(staging)


def _plan(save: HfSave, model: ModelWrapper, tensors: Mapping[str, Tensor]) -> ExportPlan:
    config = save.assets.config()
    assert config is not None, "looked at by hf_assets"
    transforms = StateDictTransforms(
        adapter=make_adapter(save.assets.family, config),
        dtype=save.what.dtype,
        converters=model.converters,
    )
    specs = {k: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for k, t in tensors.items()}
    return plan_model(transforms, specs, config, index=save.assets.files.get(INDEX))


def _write_shards(
    plan: ExportPlan, tensors: Mapping[str, Tensor], ranks: Ranks, *, folder: Path
) -> list[FileEntry]:
    """Every shard's entry, on every rank. An error here or there is raised at the end, by all."""
    own: list[FileEntry] = []
    errors: list[Exception] = []
    for index, shard in enumerate(plan.shards):
        is_mine = index % ranks.size == ranks.rank
        whole = _gather(shard, tensors, keep=is_mine)
        if not is_mine or errors:
            continue
        try:
            own.append(write_shard(new_file(folder / shard.file), plan, shard, _Held(whole)))
        except Exception as error:  # noqa: BLE001  the other ranks still need this one's pieces
            errors.append(error)
    ranks.together(lambda: raise_first(errors))
    return [entry for entries in ranks.gather(own) for entry in entries]


class _Held:
    """Tensors in memory."""

    reads_at_once = 1

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str, begin: int, into: Tensor) -> None:
        into.copy_(self._tensors[key].reshape(-1)[begin : begin + into.numel()])

    def whole(self, key: str) -> Tensor:
        return self._tensors[key].contiguous()


def _gather(shard: OutputShard, tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The shard's sources, whole and on the CPU where they are kept; each rank brings its part."""
    whole: dict[str, Tensor] = {}
    for key in shard.sources:
        tensor = tensors[key].detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[key] = full.cpu()
    return whole


def _commit(save: HfSave, plan: ExportPlan, written: list[FileEntry], staging: Path) -> None:
    """On rank 0, after every shard: the other files, then the manifest that names all."""
    write_companions(save.assets.files, plan, save.draft, staging)
    others = described(staging, except_for=written)
    recipe = {"name": save.what.name, "dtype": save.what.dtype, "family": save.assets.family}
    manifest = replace(
        save.draft,
        save_id=uuid.uuid4().hex[:16],
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=replace(save.draft.lineage, recipe=recipe),
        files=tuple(sorted([*written, *others], key=lambda entry: entry.path)),
        model=None,
    )
    save.catalog.commit_export(staging, save.what.name, manifest)


def _refuse_stages(tensors: Mapping[str, Any], ranks: Ranks) -> None:
    """Every rank must hold a piece of every tensor: a file may be made of any of them."""
    keys = ranks.gather(sorted(tensors))
    if any(other != keys[0] for other in keys):
        raise StateDictError(
            "the ranks hold different tensors (pipeline stages), which no rank can bring together",
            "save.last",
            "nothing was written",
            "save everything, last = {kind = 'everything'}, and export the step from storage",
        )


def _refuse_non_finite(tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    own = [key for key, tensor in tensors.items() if not is_finite(_local(tensor))]
    broken = sorted({key for keys in ranks.gather(own) for key in keys})
    if broken:
        raise IntegrityError(
            f"{len(broken)} weights are NaN or Inf, first {broken[0]}: they are not exported",
            "save.last",
            "nothing was written; the steps that were saved before are untouched",
            "export one of them: ray-ckpt export ROOT --step N",
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
