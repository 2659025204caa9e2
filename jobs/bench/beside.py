"""What a training step takes while exports run on the same machine, as tasks do it and otherwise.

Training uses every core, so whatever runs beside it takes time from it, unless the kernel knows
that it comes last.
"""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import torch.nn.functional as F

from jobs.bench.models import STEP, commit_model
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt.cluster.priority import give_way
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step

NUM_STEPS = 5
"""Training steps in one measurement."""
TRAINED = DecoderConfig(
    dim=256, num_layers=4, num_heads=8, num_kv_heads=4, ffn_dim=704, max_seq_len=128
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Training steps beside one kind of neighbour."""

    what: str
    min_s: float
    median_s: float
    """Seconds a step."""
    max_s: float
    ratio: float
    """Of the median to the one without a neighbour."""
    num_exports: int
    """Finished meanwhile."""


def measure_beside(folder: Path, *, size_mb: int, repeats: int) -> list[Beside]:
    """One row a neighbour, measured in turn; the exports are of a model of `size_mb` megabytes."""
    root = str(folder / "run")
    commit_model(root, size_mb, kind="permute")
    step = _training()
    step()
    neighbours: Mapping[str, Callable[[], None] | None] = {
        "alone": None,
        "beside exports, as tasks run them": give_way,
        "beside exports that do not give way": _insist,
    }
    seconds: dict[str, list[float]] = {what: [] for what in neighbours}
    exports = dict.fromkeys(neighbours, 0)
    for _ in range(repeats):
        for what, manners in neighbours.items():
            with _neighbour(root, manners) as count:
                seconds[what] += _timed(step)
                exports[what] += count()
    alone = statistics.median(seconds["alone"])
    return [
        Beside(
            what=what,
            min_s=min(taken),
            median_s=statistics.median(taken),
            max_s=max(taken),
            ratio=statistics.median(taken) / alone,
            num_exports=exports[what],
        )
        for what, taken in seconds.items()
    ]


def _timed(step: Callable[[], None]) -> list[float]:
    taken: list[float] = []
    for _ in range(NUM_STEPS):
        began_at = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began_at)
    return taken


def _training() -> Callable[[], None]:
    """One optimizer step of a small decoder, on every core."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = Decoder(TRAINED, VOCAB_SIZE)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, VOCAB_SIZE, (8, TRAINED.max_seq_len))

    def step() -> None:
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def _neighbour(root: str, manners: Callable[[], None] | None) -> Iterator[Callable[[], int]]:
    """Another process exports again and again inside the block; gives how often it has finished."""
    if manners is None:
        yield lambda: 0
        return
    context = multiprocessing.get_context("spawn")
    ready, count = context.Event(), context.Value("i", 0)
    process = context.Process(target=_export_on, args=(root, manners, ready, count))
    process.start()
    ready.wait()
    begun = count.value
    try:
        yield lambda: count.value - begun
    finally:
        process.kill()
        process.join()


def _export_on(
    root: str, manners: Callable[[], None], ready: Event, count: "Synchronized[int]"
) -> None:
    manners()
    torch.set_num_threads(1)  # as Ray sets it for a task that asks for no CPU
    catalog = open_catalog(root)
    manifest = catalog.manifest(STEP)
    while True:
        export_step(catalog, manifest, ExportSpec(name="hf"))
        shutil.rmtree(Path(root) / "exports")
        count.value += 1
        ready.set()


def _insist() -> None:
    """What a process does that was started without a thought."""
