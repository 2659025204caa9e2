"""The last save of a run as a Hugging Face folder, by two ranks that train: ours and TorchTitan's.

Both end when every byte is on the disk. TorchTitan writes each rank's shards and then all of them
once more, into whole files; the names and permutations it gets from our adapter.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)

from jobs.assets import make_assets
from jobs.bench.models import config_of
from jobs.bench.ranks import NUM_RANKS, on_ranks, sharded_decoder, write_raw
from jobs.bench.timing import Timing, interleaved
from jobs.decoder import DecoderConfig
from ray_ckpt import CheckpointManager, HuggingFace, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.core.config import Dtype
from ray_ckpt.storage.disk.posix import sync_file
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.transforms import TORCH_DTYPES, cast_floating

NUM_FILES = 4


def measure_last_saves(folder: Path, *, size_mb: int, repeats: int) -> list[Timing]:
    """Rank 0's times; the model has `size_mb` megabytes in float32."""
    return on_ranks(partial(_measured, size_mb, repeats), below=folder)


def _measured(size_mb: int, repeats: int, folder: Path) -> list[Timing]:
    config = config_of(size_mb)
    model = sharded_decoder(config)
    out = folder / "out"
    ways: dict[str, Callable[[], object]] = {}
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        ways |= {
            f"{dtype}: raw write": partial(_raw, model, out, dtype),
            f"{dtype}: ray_ckpt": partial(_ours, model, config, out, dtype),
            f"{dtype}: TorchTitan": partial(_theirs, model, config, out, dtype),
        }
    return interleaved(ways, repeats, prepare=partial(_clear, out))


def _clear(out: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
    dist.barrier()


def _raw(model: nn.Module, out: Path, dtype: Dtype) -> None:
    """Each rank writes as many bytes as it holds, past the page cache."""
    num_bytes = sum(p.numel() for p in model.parameters()) * TORCH_DTYPES[dtype].itemsize
    write_raw(out, num_bytes // NUM_RANKS)


def _ours(model: nn.Module, config: DecoderConfig, out: Path, dtype: Dtype) -> None:
    manager = CheckpointManager(
        str(out),
        TrainingState(model=ModelWrapper(model)),
        config=SaveConfig(mode="sync", listen=False, last=HuggingFace(name="final", dtype=dtype)),
        assets=make_assets(config),
    )
    manager.save(1, last_step=True)
    manager.close()
    if dist.get_rank() == 0:
        assert (out / "exports/final/step-1").is_dir()


def _theirs(model: nn.Module, config: DecoderConfig, out: Path, dtype: Dtype) -> None:
    """`last_save_in_hf`: DCP's Hugging Face writer, then consolidation, file i on rank i."""
    document = json.loads(make_assets(config).files["config.json"])
    adapter: Any = make_adapter("llama", document)
    tensors = adapter.to_hf(cast_floating(model.state_dict(), TORCH_DTYPES[dtype]))
    index = {name: 1 + number % NUM_FILES for number, name in enumerate(sorted(tensors))}
    sharded = out / "sharded"
    writer = dcp.HuggingFaceStorageWriter(
        path=str(sharded), save_distributed=True, fqn_to_index_mapping=index
    )
    dcp.save(tensors, storage_writer=writer)
    consolidate_safetensors_files_on_every_rank(
        input_dir=str(sharded), output_dir=str(out), fqn_to_index_mapping=index, num_threads=5
    )
    dist.barrier()
    for number, path in enumerate(sorted(out.glob("*.safetensors"))):
        if number % NUM_RANKS == dist.get_rank():
            sync_file(path)
    dist.barrier()
