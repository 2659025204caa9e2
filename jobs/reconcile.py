"""Finish a root's queue: verify, export, publish, purge, until nothing is left. No training code.

ray job submit --working-dir . -- python -m jobs.reconcile root=s3://bucket/run timeout_s=7200

For clusters that go away with the job that trains: the last job, or the first on the next cluster.
"""

import sys
from dataclasses import dataclass

from jobs.command import parse, run_job
from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import RayTasks
from ray_ckpt.cluster.reach import connect_aloud
from ray_ckpt.core.config import at_least
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.storage.backends import open_root


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileConfig:
    """One queue."""

    root: str
    """Where the run keeps its checkpoints."""
    timeout_s: float | None = None
    """Seconds after which the job gives up; what is left stays asked for."""

    def __post_init__(self) -> None:
        at_least(0, timeout_s=self.timeout_s)


def main() -> None:
    """Work, tell, and say what has failed for good."""
    config = parse(ReconcileConfig, __doc__)
    catalog = open_root(config.root)
    connect_aloud("auto")
    observed = drain(catalog, RayTasks(), timeout_s=config.timeout_s, told=print)
    dead = [r for r in observed.records.values() if r.state is ActionState.DEAD]
    for record in dead:
        print(f"{record.action.title} failed for good: {record.error}", file=sys.stderr)
    print(f"nothing is left to do: ray-ckpt ls {catalog.uri}")
    sys.exit(1 if dead else 0)


if __name__ == "__main__":
    run_job(main)
