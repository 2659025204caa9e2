"""Show which checkpoints would go and why; with `apply=true` move them to the trash.

ray job submit --working-dir . -- python -m jobs.purge root=/runs/a keep.latest=2
"""

from dataclasses import dataclass

from jobs.command import parse, run_job
from ray_ckpt.cluster.purge import apply_purge, plan_purge
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.storage.backends import open_root


@dataclass(frozen=True, slots=True, kw_only=True)
class PurgeConfig:
    """One purge."""

    root: str
    """Where the run keeps its checkpoints."""
    keep: KeepConfig | None = None
    """What stays; without it the run's own policy decides."""
    apply: bool = False
    """Do it; without this nothing changes."""


def main() -> None:
    """Plan, and carry out if asked to."""
    config = parse(PurgeConfig, __doc__)
    catalog = open_root(config.root)
    if config.apply:
        planned = apply_purge(catalog, config.keep, told=print)
    else:
        planned = plan_purge(catalog, config.keep)
    for verdict in planned.verdicts:
        word = "keep " if verdict.keep else "purge"
        print(f"{word} step-{verdict.step}: {'; '.join(verdict.reasons) or verdict.why_not}")
    print(planned.summary(applied=config.apply, root=catalog.uri))


if __name__ == "__main__":
    run_job(main)
