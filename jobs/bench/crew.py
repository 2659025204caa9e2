"""One export, made by one task of a cluster alone and by several together: what it gains.

A cluster on this machine shares its cores and its disk, where the gain ends sooner than elsewhere.
"""

import contextlib
import shutil
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jobs.bench.models import STEP, commit_model, forget_model
from jobs.bench.nodes import Used, nodes_with_slots, used_by_workers, used_since
from jobs.bench.timing import in_turn
from ray_ckpt.cluster import priority
from ray_ckpt.cluster.crew import together
from ray_ckpt.cluster.nodes import IO_RESOURCE
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.exporting import begin_export

NUM_SHARDS = 8
"""At least: tensors are not cut."""
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """One export by so many tasks."""

    num_tasks: int
    """That may have a part: its own, and one for each free slot."""
    num_nodes: int
    """That made shards, the fewest of all runs."""
    num_shards: int
    min_s: float
    median_s: float
    max_s: float
    """Of the export's own task, from its plan to its commit."""
    cpu_s: float
    """The median, of all tasks together, and of what Ray starts for them on the nodes."""
    ratio: float
    """Of the median to the first row's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    wall_s: float
    used: Sequence[Used]
    """By each node."""

    @property
    def cpu_s(self) -> float:
        return sum(node.cpu_s for node in self.used)


def measure_crews(
    folder: Path, numbers_of_tasks: Sequence[int], *, size_mb: int, repeats: int
) -> list[Shared]:
    """A row for each number of tasks, in turn; the model has `size_mb` megabytes in float32."""
    root = str(folder / "run")
    commit_model(root, size_mb, kind="permute")
    bytes_of_bfloat16 = size_mb * 1_000_000 // 2
    spec = ExportSpec(name="hf", max_shard_bytes=bytes_of_bfloat16 // NUM_SHARDS)
    catalog = open_catalog(root)
    shards = begin_export(catalog, catalog.manifest(STEP), spec).plan.shards
    with nodes_with_slots(max(numbers_of_tasks)) as raylets:
        ways = {number: partial(_run, root, spec, raylets, number) for number in numbers_of_tasks}
        runs = in_turn(ways, repeats)
    return _rows(runs, [shard.size_bytes for shard in shards])


def _rows(runs: Mapping[int, Sequence[_Run]], shard_sizes_bytes: Sequence[int]) -> list[Shared]:
    """A node has made shards if it has written at least as much as the smallest of them."""
    least_bytes = min(shard_sizes_bytes)
    medians_s = {number: statistics.median(r.wall_s for r in runs[number]) for number in runs}
    return [
        Shared(
            num_tasks=number,
            num_nodes=min(sum(n.written_bytes >= least_bytes for n in run.used) for run in taken),
            num_shards=len(shard_sizes_bytes),
            min_s=min(run.wall_s for run in taken),
            median_s=medians_s[number],
            max_s=max(run.wall_s for run in taken),
            cpu_s=statistics.median(run.cpu_s for run in taken),
            ratio=medians_s[number] / next(iter(medians_s.values())),
        )
        for number, taken in runs.items()
    ]


def _run(root: str, spec: ExportSpec, raylets: Sequence[int], num_tasks: int) -> _Run:
    """The step is not in the page cache; the export is removed."""
    forget_model(root)
    num_free = num_tasks - 1
    with _slots_taken(len(raylets) - num_free, num_free=num_free) as taken:
        task = ray.remote(_export).options(
            num_cpus=0,
            max_retries=0,
            resources={IO_RESOURCE: 1.0},
            scheduling_strategy=PlacementGroupSchedulingStrategy(taken, 0),
        )
        before = [used_by_workers(raylet) for raylet in raylets]
        wall_s = ray.get(task.remote(root, spec))
        after = [used_by_workers(raylet) for raylet in raylets]
    shutil.rmtree(Path(root) / "exports")
    used = [used_since(*node) for node in zip(before, after, strict=True)]
    return _Run(wall_s=wall_s, used=used)


def _export(root: str, spec: ExportSpec) -> float:
    """Seconds that it took, done as the task of an export does it."""
    catalog = open_catalog(root)
    crew = together(f"export step-{STEP} {spec.name}")
    began_at = time.perf_counter()
    priority.giving_way(lambda: export_step(catalog, catalog.manifest(STEP), spec, crew=crew))
    return time.perf_counter() - began_at


@contextlib.contextmanager
def _slots_taken(count: int, *, num_free: int) -> Generator[PlacementGroup]:
    """So many nodes have no slot for others inside the block, and Ray says that the rest have."""
    taken = ray.util.placement_group([{IO_RESOURCE: 1.0}] * count, strategy="STRICT_SPREAD")
    try:
        ray.get(taken.ready())
        while ray.available_resources().get(IO_RESOURCE, 0.0) != num_free:
            time.sleep(_LOOK_EVERY_S)
        yield taken
    finally:
        ray.util.remove_placement_group(taken)
