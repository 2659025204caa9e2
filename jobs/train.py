"""Train a small Llama-like decoder on real text with FSDP2 on Ray Train, and keep its checkpoints.

    ray job submit --working-dir . -- python -m jobs.train --config jobs/configs/demo.toml

Killed at any moment and submitted again, it goes on from the newest committed step.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from jobs.assets import make_assets
from jobs.command import parse, run_job
from jobs.corpus import VOCAB_SIZE, Windows, standard_library_text
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt import (
    CheckpointManager,
    LifecyclePolicy,
    LoadConfig,
    ModelWrapper,
    Run,
    SaveConfig,
    TrainingState,
)
from ray_ckpt.cluster.connect import start_manager_job
from ray_ckpt.cluster.reach import connect_aloud
from ray_ckpt.cluster.train import NodeWatch, Reporter, run_owner, this_node
from ray_ckpt.core.config import at_least, build
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.names import run_name
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import TRAINER, Lease
from ray_ckpt.tensors.sources import Naming, open_source
from ray_ckpt.tensors.states import TrainState

log = logging.getLogger("jobs.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is learnt from."""

    max_bytes: int = 4_000_000
    """How much of the standard library's sources is used."""
    seq_len: int = 128
    """Tokens in one sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    root: str
    """Where its checkpoints go: a path all nodes see, or `s3://bucket/prefix`."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Samples in one optimizer step, of all workers together."""
    learning_rate: float = 1e-3
    """Of AdamW, after the warm-up."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises."""
    seed: int = 0
    """Of weights and data order."""
    num_workers: int = 2
    """Processes that train; one a GPU where there are some."""
    min_workers: int | None = None
    """Train with as few as this while nodes are missing; None waits for `num_workers`."""
    resize_every_s: float = 60.0
    """With `min_workers`: seconds between two looks for nodes that were added."""
    worker_resources: Mapping[str, float] | None = None
    """What Ray reserves for each worker; None is Ray Train's choice, one CPU or one GPU."""
    max_failures: int = 3
    """Worker deaths after which Ray Train gives up."""
    min_step_s: float = 0.0
    """Shortest time of a step; slows a run down so that a person can watch it."""
    report_every_steps: int = 10
    """Steps between two metrics reports to Ray Train, which tells then whether a node is about to
    be taken away; the manager hears of every step."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    lifecycle: LifecyclePolicy = field(default_factory=LifecyclePolicy)

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, num_workers=self.num_workers, min_workers=self.min_workers)
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ConfigError(
                f"min_workers is {self.min_workers}, more than num_workers, {self.num_workers}",
                "min_workers",
            )


def train_worker(values: dict[str, Any]) -> None:
    """What each worker runs; collective in every line that matters."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = build(TrainConfig, values, where="train config")
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    model = make_model(config, device, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / config.warmup_steps))
    text = standard_library_text(config.data.max_bytes)
    windows = Windows(text, seq_len=config.data.seq_len, seed=config.seed)
    progress = TrainState()

    run = run_name(open_catalog(config.root).uri)
    reporter = Reporter(config.root)
    checkpoints = CheckpointManager(
        config.root,
        TrainingState(
            model=ModelWrapper(model),
            optimizer=optimizer,
            lr_scheduler=warm_up,
            extra={"dataloader": windows, "train_state": progress},
        ),
        config=config.save,
        assets=make_assets(config.model),
        run=Run(
            owner=run_owner(),
            policy=config.lifecycle,
            on_event=reporter.saved,
            node=this_node(),
        ),
    )
    loaded = checkpoints.load(config=config.load)
    nodes = NodeWatch()
    pids = [None] * world_size
    dist.all_gather_object(pids, os.getpid(), group=dist.new_group(backend="gloo"))
    if rank == 0:
        reporter.progress(
            pids=pids,
            world_size=world_size,
            resumed_from=loaded.step,
            memory_bytes=loaded.memory_bytes,
            done=False,
        )

    for step in range(loaded.step + 1, config.steps + 1):
        started = time.perf_counter()
        batch = windows.next_batch(config.batch_size, rank=rank, world_size=world_size).to(device)
        loss = train_step(model, batch, optimizer)
        warm_up.step()
        progress.step, progress.num_samples = step, windows.num_samples
        is_last = step == config.steps
        checkpoints.save(step, last_step=is_last, metrics={"loss": loss})
        time.sleep(max(0.0, config.min_step_s - (time.perf_counter() - started)))
        if rank == 0:
            reporter.progress(step=step, loss=loss, step_s=time.perf_counter() - started)
            log.info("%s: step %d/%d loss %.6f", run, step, config.steps, loss)
        if is_last or step % config.report_every_steps == 0:
            ray.train.report({"step": step, "loss": loss})
            if config.save.listen and nodes.are_leaving():
                checkpoints.request_save()
        if checkpoints.stop_reason is not None:
            break
    checkpoints.close()
    if rank == 0:
        reporter.progress(done=True)


def make_model(config: TrainConfig, device: torch.device, world_size: int) -> Decoder:
    """The model, initialised from the seed alone and sharded over all ranks."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model, VOCAB_SIZE).to(device)
    init_weights(model)
    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_step(model: Decoder, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """The mean loss over all ranks, before the step that was made; batch is [samples, seq + 1]."""
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def make_trainer(
    config: TrainConfig, worker: Callable[[dict[str, Any]], None], *, name: str
) -> TorchTrainer:
    """What runs `worker` in every process; `name` is equal for all its restarts."""
    fewest = config.num_workers if config.min_workers is None else config.min_workers
    use_gpu = ray.cluster_resources().get("GPU", 0) >= fewest
    is_elastic = fewest < config.num_workers
    return TorchTrainer(
        worker,
        train_loop_config=asdict(config),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, config.num_workers) if is_elastic else config.num_workers,
            elastic_resize_monitor_interval_s=config.resize_every_s,
            resources_per_worker=dict(config.worker_resources) if config.worker_resources else None,
            use_gpu=use_gpu,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            # Ray Train's own notes; no checkpoint is ever given to it
            storage_path=tempfile.mkdtemp(prefix="ray_train-"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )


def main() -> None:
    """Start the run's manager, train, and say where the checkpoints are."""
    config = parse(TrainConfig, __doc__)
    catalog = open_catalog(config.root)
    name = f"{run_name(catalog.uri)}-{int(time.time())}"
    # found out before anything is started: whether the root can be written, is nobody else's, and
    # whether there is something to start from; Ray Train would start the workers over and over
    catalog.records.begin_run(run_name(catalog.uri), config.lifecycle)
    Lease(catalog.store, TRAINER, owner=name).wait_until_free()
    if not catalog.observe().readable():
        naming = Naming.of(make_assets(config.model), converters=())
        for source in config.load.start.sources:
            open_source(source, naming)
    connect_aloud("auto")
    start_manager_job(config.root)
    make_trainer(config, train_worker, name=name).fit()
    print(f"training is done; its checkpoints: ray-ckpt ls {catalog.uri}")


if __name__ == "__main__":
    run_job(main)
