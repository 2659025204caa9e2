"""A training that is as real as any, in miniature: FSDP2, AdamW, a schedule, data, checkpoints."""

import hashlib
import logging
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  what everybody calls it
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE, Windows
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.converters import CONVERTERS, ModelConverter
from ray_ckpt.tensors.converters.ema import EMA
from ray_ckpt.tensors.loading import LoadReport
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import Run
from ray_ckpt.tensors.states import TrainingState

SIZES = DecoderConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24, max_seq_len=32)
BATCH_SIZE = 4
SEQ_LEN = 8
TEXT = random.Random(0).randbytes(4000)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a training differs from the plainest one; the same in every process."""

    dropout: float = 0.0
    """Behind every block; its draws come from each rank's own generator."""
    converters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name to options, in order of conversion."""
    load: LoadConfig = field(default_factory=LoadConfig)
    device: str = "cpu"

    def make_converters(self) -> list[ModelConverter]:
        return [CONVERTERS[name](**options) for name, options in self.converters.items()]


PLAIN = Setup()


class Counted(Windows):
    """Remembers every sample that was handed out."""

    def __init__(self) -> None:
        super().__init__(TEXT, seq_len=SEQ_LEN, seed=0)
        self.handed_out: list[int] = []

    def _window(self, index: int) -> Tensor:
        self.handed_out.append(index)
        return super()._window(index)


@dataclass(kw_only=True)
class Trainer:
    """What a training script holds in its main function."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    windows: Counted
    checkpoints: CheckpointManager
    converters: list[ModelConverter]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank knows when training has ended."""

    report: LoadReport
    losses: dict[int, float]
    draws: dict[int, tuple[float, float]]
    """After each step the next random number of torch and of Python."""
    samples: dict[int, list[int]]
    """For each step the samples that this rank was given."""
    loaded: dict[str, Tensor]
    """`state` as it was right after loading."""
    state: dict[str, Tensor]
    num_samples: int
    committed: list[int]
    """Steps that `on_commit` was called with, in this order."""
    log: list[str]


def train(
    root: str,
    last_step: int,
    save: SaveConfig,
    seed: int = 0,
    sizes: DecoderConfig = SIZES,
    setup: Setup = PLAIN,
) -> Outcome:
    """Loads, trains until `last_step`, saves on the way; `seed` is of everything but the data."""
    told = record_log()
    torch.manual_seed(seed)
    committed: list[int] = []
    trainer = make_trainer(root, save, sizes=sizes, setup=setup, on_commit=committed.append)
    random.seed(1000 * seed + dist.get_rank())
    torch.manual_seed(1000 * seed + dist.get_rank())
    report = trainer.checkpoints.load(config=setup.load)
    loaded = full_state(trainer)
    losses: dict[int, float] = {}
    draws: dict[int, tuple[float, float]] = {}
    samples: dict[int, list[int]] = {}
    for step in range(report.step + 1, last_step + 1):
        losses[step] = train_step(trainer)
        samples[step], trainer.windows.handed_out = trainer.windows.handed_out, []
        draws[step] = (torch.rand(()).item(), random.random())
        trainer.checkpoints.save(
            step, last_step=step == last_step, metrics={"loss": losses[step], "step": float(step)}
        )
    trainer.checkpoints.close()
    return Outcome(
        report=report,
        losses=losses,
        draws=draws,
        samples=samples,
        loaded=loaded,
        state=full_state(trainer),
        num_samples=trainer.windows.num_samples,
        committed=committed,
        log=told,
    )


def make_trainer(
    root: str,
    save: SaveConfig,
    *,
    sizes: DecoderConfig = SIZES,
    setup: Setup = PLAIN,
    on_commit: Callable[[int], None] | None = None,
) -> Trainer:
    """Built as in any script; nothing is loaded yet. Collective."""
    model = Decoder(sizes, VOCAB_SIZE)
    init_weights(model)
    converters = setup.make_converters()
    for converter in converters:
        converter.convert(model)
    if setup.dropout:
        _drop(model, setup.dropout)
    model.to(setup.device)
    mesh = init_device_mesh(setup.device, (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.99**step)
    windows = Counted()
    checkpoints = CheckpointManager(
        root,
        TrainingState(
            model=ModelWrapper(model, converters=converters),
            optimizer=optimizer,
            lr_scheduler=schedule,
            extra={"dataloader": windows},
        ),
        config=save,
        assets=make_assets(sizes),
        run=Run(on_event=committed_steps(on_commit)),
    )
    return Trainer(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        windows=windows,
        checkpoints=checkpoints,
        converters=converters,
    )


def _drop(model: Decoder, probability: float) -> None:
    """Every block's output loses some of its elements."""
    for block in model.layers.values():
        block.register_forward_hook(lambda _, args, out: F.dropout(out, probability))


def committed_steps(tell: Callable[[int], None] | None) -> Callable[[SaveEvent], None] | None:
    """An `on_event` that tells the steps that were committed."""
    if tell is None:
        return None
    return lambda event: tell(event.step) if event.kind == "committed" else None


def train_step(trainer: Trainer) -> float:
    """The loss of one optimizer step, the mean over all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = next(trainer.model.parameters()).device
    batch = trainer.windows.next_batch(BATCH_SIZE, rank=rank, world_size=world_size).to(device)
    logits = trainer.model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    trainer.optimizer.step()
    for converter in trainer.converters:
        if isinstance(converter, EMA):
            converter.update()
    trainer.schedule.step()
    trainer.optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / world_size


def full_state(trainer: Trainer) -> dict[str, Tensor]:
    """The model's tensors and optimizer moments by name, whole. Collective."""
    state = {key: _whole(value) for key, value in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            state[f"{name}:{key}"] = _whole(value)
    return state


def record_log() -> list[str]:
    """Filled with every line that ray_ckpt logs in this process from now on."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logger = logging.getLogger("ray_ckpt")
    logger.setLevel(logging.INFO)
    logger.addHandler(Recorder())
    return lines


def error_of(function: Callable[[], Any]) -> RayCkptError | None:
    """What the call raised, if it is one of ours."""
    try:
        function()
    except RayCkptError as error:
        return error
    return None


def files_in(folder: Path | str) -> dict[str, str]:
    """Every file below `folder` and its digest; not what comes and goes, or others write."""
    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(_kept(folders))
        for path in (Path(parent, name) for name in sorted(_kept(files))):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _kept(listed: list[str]) -> set[str]:
    return {*listed} - {"lease", "readers", "events"}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether names and all bits are equal."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().cpu()
