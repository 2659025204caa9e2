"""A training whose state after each step anybody can compute, on however many ranks.

Every update is exact or a single rounding, element by element: a state that was mixed from two
steps, or loaded from the wrong one, never comes right again.
"""

import json
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig
from ray_ckpt import CheckpointManager, ModelWrapper, Run, SaveConfig, TrainingState
from ray_ckpt.core.events import SaveEvent

MODEL = DecoderConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, max_seq_len=64)
STEP_S = 3.0
"""Shortest time of a step, so that a second's trouble costs few of them."""


def train(root: str, journal: str, end: str) -> None:
    """Trains and saves after every step; the journal tells which steps were said committed.

    Ends, with a last step, once there is a file called `end`.
    """

    def note(event: SaveEvent) -> None:
        if event.kind == "committed":
            with Path(journal).open("a") as file:
                file.write(json.dumps({"step": event.step}) + "\n")

    model = first_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model.parameters())
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(model), optimizer=optimizer),
        config=SaveConfig(every_steps=1, when_busy="wait", timeout_s=30.0),
        assets=make_assets(MODEL),
        run=Run(owner="chaos", on_event=note),
    )
    step, is_last = manager.load().step, False
    while not is_last:
        step += 1
        began_at = time.monotonic()
        update(model, optimizer, step)
        is_last = _agreed(Path(end).exists())
        manager.save(step, last_step=is_last, metrics={"loss": 1.0 / step})
        time.sleep(max(0.0, STEP_S - (time.monotonic() - began_at)))
    manager.close()


def states() -> Iterator[dict[str, Tensor]]:
    """Weights by FQN after step 1, 2, 3, ...; each time the same tensors with other values."""
    model = first_model()
    optimizer = optimizer_of(model.parameters())
    step = 0
    while True:
        step += 1
        update(model, optimizer, step)
        yield {name: p.detach() for name, p in model.named_parameters()}


def first_model() -> Decoder:
    """All zeros: what it becomes is the gradients' doing alone."""
    model = Decoder(MODEL, VOCAB_SIZE)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Powers of two only: a product with one is exact, whether or not it is fused into a sum."""
    return torch.optim.SGD(parameters, lr=0.25, momentum=0.5)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One optimizer step, on gradients that only the step and the name decide."""
    for name, parameter in model.named_parameters():
        parameter.grad = _like(parameter, gradient(name, parameter.shape, step))
    optimizer.step()
    optimizer.zero_grad()


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Whole, on every rank the same."""
    seed = zlib.crc32(f"{name} {step}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _agreed(seen: bool) -> bool:
    """Whether any rank has seen it; the same on all of them."""
    flag = torch.tensor([int(seen)])
    dist.all_reduce(flag)
    return bool(flag.item())
