"""From a committed step to a Hugging Face folder: ours, what others do today, and a bare copy.

For Linux. Every way runs in a new process, reads a step that is not in the page cache, and ends
when what it wrote is on the disk. The peers get names, permutations and merges from our transforms,
which they run on the whole model in memory.
"""

import json
import mmap
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from jobs.bench.models import STEP, commit_model, forget_model
from jobs.bench.timing import in_turn
from ray_ckpt.core import names
from ray_ckpt.core.config import Dtype
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.storage.disk.posix import sync_file
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.converters import make_converters
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.transforms import TORCH_DTYPES, StateDictTransforms

MAX_SHARD_BYTES = 500_000_000
_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
_FORGET_PEAK = "5"
"""To /proc/self/clear_refs: the peak of memory counts from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One way to export one kind of model to one type."""

    kind: str
    what: str
    dtype: Dtype
    min_s: float
    median_s: float
    max_s: float
    cpu_s: float
    """The median, of all threads."""
    ratio: float
    """Of the median to that of the bare copy."""
    peak_mb: float
    """The most memory that the process held, mapped files included, beyond its imports."""
    written_mb: float
    """All that was written on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    wall_s: float
    cpu_s: float
    peak_mb: float
    written_mb: float


def measure_exports(
    folder: Path, kinds: Sequence[str], *, size_mb: int, repeats: int
) -> list[Exported]:
    """Rows of each way, for each kind of model to each type; it has `size_mb` MB in float32."""
    root = str(folder / "run")
    rows: list[Exported] = []
    for kind in kinds:
        commit_model(root, size_mb, kind=kind)
        for dtype in _DTYPES:
            runs = _measured(root, folder / "out", dtype, repeats=repeats)
            rows += _rows(runs, kind, dtype)
        shutil.rmtree(root)
    return rows


def _rows(runs: Mapping[str, Sequence[_Run]], kind: str, dtype: Dtype) -> list[Exported]:
    limit_s = statistics.median(run.wall_s for run in runs[LIMIT])
    return [
        Exported(
            kind=kind,
            what=what,
            dtype=dtype,
            min_s=min(run.wall_s for run in taken),
            median_s=statistics.median(run.wall_s for run in taken),
            max_s=max(run.wall_s for run in taken),
            cpu_s=statistics.median(run.cpu_s for run in taken),
            ratio=statistics.median(run.wall_s for run in taken) / limit_s,
            peak_mb=statistics.median(run.peak_mb for run in taken),
            written_mb=statistics.median(run.written_mb for run in taken),
        )
        for what, taken in runs.items()
    ]


def _measured(root: str, out: Path, dtype: Dtype, *, repeats: int) -> dict[str, list[_Run]]:
    """All ways to one type, in turn."""
    ways = {
        what: partial(_alone, partial(way, root, str(out), dtype), root, str(out))
        for what, way in WAYS.items()
    }
    return in_turn(ways, repeats)


def _alone(way: Callable[[], None], root: str, out: str) -> _Run:
    """In a new process, with nothing of the step in the page cache; its output is removed."""
    forget_model(root)
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        run = process.submit(_timed, way).result()
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(Path(root) / "exports", ignore_errors=True)
    return run


def _timed(way: Callable[[], None]) -> _Run:
    Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)
    held_kb = _status_kb("VmRSS")
    wall, cpu, written = time.perf_counter(), time.process_time(), _written_bytes()
    way()
    return _Run(
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        peak_mb=(_status_kb("VmHWM") - held_kb) / 1000,
        written_mb=(_written_bytes() - written) / 1e6,
    )


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def _written_bytes() -> int:
    """What this process has handed to disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def _ours(root: str, out: str, dtype: Dtype) -> None:
    catalog = open_catalog(root)
    spec = ExportSpec(name="hf", dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
    export_step(catalog, catalog.manifest(STEP), spec)


def _bare_copy(root: str, out: str, dtype: Dtype) -> None:
    """As many bytes are read, and as many written, by a thread each; nothing is done to them.

    To float32 what is merged away is written as well: 0.3 % of a model with LoRA.
    """
    every = torch.float32.itemsize // TORCH_DTYPES[dtype].itemsize
    file = new_file(Path(out) / "copy")
    free = [mmap.mmap(-1, file.block_bytes) for _ in range(2)]
    written: Future[None] | None = None
    count = size_bytes = 0
    with ThreadPoolExecutor(1) as writer:
        for path in Path(root, names.step_dir(STEP)).glob("*.distcp"):
            with path.open("rb", buffering=0) as source:
                while num_bytes := source.readinto(free[0]):
                    count += 1
                    if count % every:
                        continue
                    if written is not None:
                        written.result()
                    block = memoryview(free[0])
                    written = writer.submit(file.put, count // every - 1, block, num_bytes)
                    size_bytes += num_bytes
                    free.reverse()
    file.finish(size_bytes)


def _load_all_then_save(root: str, out: str, dtype: Dtype) -> None:
    """DCP to one torch file, that file into memory, then safetensors: what torch documents."""
    Path(out).mkdir()
    whole = Path(out) / "whole.pt"
    dcp_to_torch_save(str(Path(root, names.step_dir(STEP))), str(whole))
    loaded = torch.load(whole, mmap=True, weights_only=False)
    tensors = {key: loaded[key] for key in _specs(root)}
    for number, shard in enumerate(_shards(_converted(root, tensors, dtype))):
        path = Path(out) / f"model-{number:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, path)
        sync_file(path)


def _load_then_write_with_dcp(root: str, out: str, dtype: Dtype) -> None:
    """TorchTitan's `convert_to_hf`: the model in memory, DCP's writer, consolidation."""
    tensors = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in _specs(root).items()}
    dcp.load(tensors, checkpoint_id=str(Path(root, names.step_dir(STEP))), no_dist=True)
    converted = _converted(root, tensors, dtype)
    shards = enumerate(_shards(converted), start=1)
    index = {key: number for number, shard in shards for key in shard}
    writer = dcp.HuggingFaceStorageWriter(
        path=out,
        save_distributed=True,
        fqn_to_index_mapping=index,
        enable_consolidation=True,
        thread_count_consolidation=5,
    )
    dcp.save(converted, storage_writer=writer, no_dist=True)
    for path in Path(out).rglob("*.safetensors"):
        sync_file(path)


def _specs(root: str) -> dict[str, TensorSpec]:
    """Of the model's tensors."""
    manifest = open_catalog(root).manifest(STEP)
    assert manifest.model is not None, "it holds a model"
    found = {entry.name: entry for entry in manifest.tensors}
    return {
        key: TensorSpec(shape=found[key].shape, dtype=getattr(torch, found[key].dtype))
        for key in manifest.model.keys
    }


def _converted(root: str, tensors: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """The whole model as an export holds it: merged, cast, permuted and renamed."""
    catalog = open_catalog(root)
    manifest = catalog.manifest(STEP)
    config, model = read_asset(catalog, manifest, "config.json"), manifest.model
    assert config is not None and model is not None and model.family is not None, "as it was saved"
    transforms = StateDictTransforms(
        adapter=make_adapter(model.family, json.loads(config)),
        dtype=dtype,
        converters=make_converters(model.converters, {}),
    )
    return transforms.whole_to_hf(tensors)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """In order, of at most the bytes that ours has too."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


LIMIT = "bare copy"
WAYS: Mapping[str, Callable[[str, str, Dtype], None]] = {
    LIMIT: _bare_copy,
    "ray_ckpt export": _ours,
    "dcp_to_torch_save, save_file": _load_all_then_save,
    "dcp.load, HuggingFaceStorageWriter": _load_then_write_with_dcp,
}
