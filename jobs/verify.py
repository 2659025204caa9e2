"""Read every byte of a root's checkpoints and exports, each by a task of its own; change nothing.

ray job submit --working-dir . -- python -m jobs.verify root=s3://bucket/run

Ends with 1 if anything differs from its manifest.
"""

import sys
from dataclasses import dataclass

from jobs.command import parse, run_job
from ray_ckpt.cluster.checking import check_on_cluster
from ray_ckpt.cluster.reach import connect
from ray_ckpt.storage.backends import open_root


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """What is read."""

    root: str
    """Where the run keeps its checkpoints."""
    step: int | None = None
    """This one alone, with its exports; without it all."""


def main() -> None:
    """Tell what was found of each, and what to do where something is damaged."""
    config = parse(VerifyConfig, __doc__)
    catalog = open_root(config.root)
    connect("auto")
    damaged = 0
    for found in check_on_cluster(catalog, config.step):
        print(f"{found.result} {found.what} {'; '.join(found.damage)}".rstrip(), flush=True)
        damaged += found.result == "corrupt"
    if damaged:
        print(
            f"{damaged} damaged; nothing was changed. The newest good step: "
            f"ray-ckpt resume-plan {catalog.uri}",
            file=sys.stderr,
        )
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    run_job(main)
