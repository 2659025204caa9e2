"""How the tensors of an export are cut into files, and how these are called.

as the base model's index says, where there is one that names every tensor
else in order, up to so many bytes
one file, where nothing else is looked for: an adapter's, a torch file
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_ckpt.core.errors import IntegrityError, UsageError
from ray_ckpt.tensors.converters import WHOLE_MODEL, ExportLayout
from ray_ckpt.tensors.recording import Recording
from ray_ckpt.tensors.run import INDEX

_UNTOUCHED = "the checkpoint is untouched and can be resumed"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_TORCH_FILES = {WHOLE_MODEL.weights: "pytorch_model.bin"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One file of weights."""

    file: str
    sources: tuple[str, ...]
    """Native tensors it is made of."""
    outputs: tuple[str, ...]
    """HF tensors it holds."""
    size_bytes: int


def cut_into_shards(
    recording: Recording, layout: ExportLayout, *, max_shard_bytes: int, index: bytes | None
) -> tuple[OutputShard, ...]:
    """Every output in one file each; the files in order of their names.

    Raises:
        IntegrityError: the base model's index cannot be used.
    """
    weight_map = _weight_map(index)
    order = sorted(recording.outputs, key=_natural)  # the same from whichever order of inputs
    sizes = {name: recording.outputs[name].spec.size_bytes for name in order}
    if is_sharded(layout) and weight_map.keys() >= sizes.keys():
        files = _grouped(sizes, weight_map)
    else:
        groups = _split(sizes, max_shard_bytes) if is_sharded(layout) else [list(sizes)]
        files = {_file_name(layout, n, len(groups)): group for n, group in enumerate(groups)}
    sources = {
        file: [source for name in group for source in recording.outputs[name].sources]
        for file, group in files.items()
    }
    return tuple(
        OutputShard(
            file=file,
            sources=tuple(dict.fromkeys(sources[file])),
            outputs=tuple(group),
            size_bytes=sum(sizes[name] for name in group),
        )
        for file, group in files.items()
    )


def in_one_torch_file(
    shards: Sequence[OutputShard], layout: ExportLayout
) -> tuple[OutputShard, ...]:
    """The same tensors in one file, under the name that transformers and peft look for.

    Raises:
        UsageError: it is the headers of safetensors files that describe the tensors.
    """
    if layout.metadata:
        raise UsageError(
            "what describes these tensors stands in the headers of safetensors files; a torch file "
            "has no place for it",
            "export",
            _UNTOUCHED,
            "leave the format as it is, or export plain tensors",
        )
    whole = OutputShard(
        file=_TORCH_FILES.get(layout.weights, f"{layout.weights}.bin"),
        sources=tuple(dict.fromkeys(key for shard in shards for key in shard.sources)),
        outputs=tuple(name for shard in shards for name in shard.outputs),
        size_bytes=sum(shard.size_bytes for shard in shards),
    )
    return (whole,)


def is_sharded(layout: ExportLayout) -> bool:
    """Several files and their index are looked for under this one stem alone."""
    return layout.weights == WHOLE_MODEL.weights


def _weight_map(index: bytes | None) -> Mapping[str, str]:
    """Tensor to file, as a base model's index says."""
    try:
        weight_map = {} if index is None else dict(json.loads(index)["weight_map"])
        strange = {str(file) for file in weight_map.values() if not _SHARD.fullmatch(str(file))}
    except (ValueError, KeyError, TypeError) as error:
        weight_map, strange = {}, {repr(error)}
    if strange:
        raise IntegrityError(
            f"{INDEX} is no index of safetensors files: {min(strange)}",
            "hf_assets",
            _UNTOUCHED,
            "say how large files may be instead: --max-shard-size 4.9GB",
        )
    return weight_map


def _grouped(names: Iterable[str], weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """File to names, as the base model has them."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(weight_map[name], []).append(name)
    return dict(sorted(files.items()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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


def _file_name(layout: ExportLayout, index: int, count: int) -> str:
    if not is_sharded(layout):
        return f"{layout.weights}.safetensors"
    return f"{layout.weights}-{index + 1:05d}-of-{count:05d}.safetensors"
