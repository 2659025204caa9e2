"""The files of an export, as every way of making one writes them.

model-00001-of-00002.safetensors    tensors
model.safetensors.index.json        which file holds which tensor
config.json tokenizer.json ...      what the run gave with its steps
README.md                           the model card
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_file
from ray_ckpt.storage.disk.posix import write_synced
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.model_card import license_of, model_card
from ray_ckpt.tensors.run import CARD, CONFIG, INDEX, REFERENCE


def write_companions(
    assets: Mapping[str, bytes],
    plan: ExportPlan,
    source: Manifest,
    folder: Path,
    *,
    spec: ExportSpec | None = None,
) -> None:
    """Everything beside the tensors that `from_pretrained` and a reader look for.

    `spec` is what was asked for; None for what no later command can make again.
    """
    for name, data in assets.items():
        if name not in (CONFIG, INDEX, REFERENCE, CARD):
            write_synced(folder / name, data)
    write_synced(folder / plan.layout.config_file, _json(_config(plan)))
    if plan.index_file is not None:
        write_synced(folder / plan.index_file, _json(_index(plan)))
    card = model_card(source, plan, spec=spec, license=license_of(assets, spec))
    write_synced(folder / CARD, card.encode())


def described(folder: Path, *, except_for: Iterable[FileEntry]) -> list[FileEntry]:
    """A manifest's entries for the files of an export, but for those that have one already."""
    known = {entry.path for entry in except_for}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ((path, path.relative_to(folder).as_posix()) for path in paths)
    return [describe_file(p, name, STRONG_ALGORITHM) for p, name in named if name not in known]


def _config(plan: ExportPlan) -> dict[str, Any]:
    """The model's own config with the layout's entries; a format's own file has these alone.

    How the base was quantized on the Hub, which a run may have started from, is no longer true.
    """
    if plan.layout.config_file != CONFIG:
        return dict(plan.layout.config)
    own = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    # transformers 4 reads torch_dtype, transformers 5 reads dtype
    return {**own, **plan.layout.config, "torch_dtype": plan.dtype, "dtype": plan.dtype}


def _index(plan: ExportPlan) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in plan.shards for name in shard.outputs}
    return {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map}


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
