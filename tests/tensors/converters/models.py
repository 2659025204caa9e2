"""The tiny decoder under converters: built, sharded, trained, and its twin in transformers."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  what everybody calls it
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from jobs.decoder import Decoder, DecoderConfig, hf_config, init_weights
from ray_ckpt.tensors.adapters import StateDictAdapter, make_adapter
from ray_ckpt.tensors.converters import ModelConverter
from ray_ckpt.tensors.converters.ema import EMA

SIZES = DecoderConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, max_seq_len=32)
VOCAB_SIZE = 64
CONFIG = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=0)
ATTENTION = ["layers.*.attention.w[qkvo]"]


def make_model(
    converters: Sequence[ModelConverter] = (), *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Decoder:
    """Initialised and converted, not sharded."""
    torch.manual_seed(seed)
    model = Decoder(SIZES, VOCAB_SIZE).to(dtype)
    init_weights(model)
    for converter in converters:
        converter.convert(model)
    return model


def shard(model: Decoder) -> Decoder:
    """FSDP2 over all ranks, block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    model: nn.Module,
    steps: range,
    converters: Sequence[ModelConverter] = (),
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Loss of each step on this rank; plain SGD makes the model all the state there is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr=0.3)
    losses: list[float] = []
    for step in steps:
        ids = some_ids(step)
        logits = model(ids[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for converter in converters:
            if isinstance(converter, EMA):
                converter.update()
        losses.append(loss.item())
    return losses


def some_ids(seed: int, *, rank: int | None = None) -> Tensor:
    """[4, 9] token ids, another batch for each rank."""
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(0, VOCAB_SIZE, (4, 9), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    """The values, however the tensor is sharded; a copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def same_bits(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether names, dtypes and all values are equal."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(whole(left[k]), whole(right[k]))
        for k in left
    )


@functools.cache
def llama() -> StateDictAdapter:
    """The model family's adapter."""
    return make_adapter("llama", CONFIG)


def write_hf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] = CONFIG,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A folder that `from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", **(metadata or {})}
    save_file(contiguous, folder / "model.safetensors", metadata=header)
    return folder


@torch.no_grad()
def hf_logits(model: Any) -> Tensor:
    """What a model of transformers says."""
    return model.eval()(some_ids(0)).logits


@torch.no_grad()
def native_logits(model: nn.Module, *, rank: int | None = None) -> Tensor:
    """What the decoder says to the batch of a rank, this one's if not named."""
    return model(some_ids(0, rank=rank))
