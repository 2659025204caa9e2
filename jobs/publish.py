"""Copy a finished export, or a checkpoint, to another root or to S3; an export also to the Hub.

ray job submit --working-dir . -- python -m jobs.publish root=/r step=500 name=hf to=hf://o/r
"""

from dataclasses import dataclass

from jobs.command import parse, run_job
from ray_ckpt.cluster.perform import perform_on_cluster
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.wanted import publish_action
from ray_ckpt.storage.backends import open_root


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishConfig:
    """One copy of one export, or of one checkpoint."""

    root: str
    """Where the run keeps its checkpoints."""
    step: int
    """Which one."""
    to: str
    """`/path`, `s3://bucket/prefix` or `hf://org/repo`."""
    name: str | None = None
    """Which export of it; without one the checkpoint itself is copied."""
    verify: Proof = "sizes"
    """With `digests` every file is read back from there, and compared."""


def main() -> None:
    """Ask the run's manager, and wait."""
    config = parse(PublishConfig, __doc__)
    catalog = open_root(config.root)
    spec = None
    if config.name is not None:
        recipe = catalog.export(config.name, config.step).manifest.lineage.recipe
        spec = ExportSpec.of_recipe(recipe)
    action = publish_action(catalog.checkpoint(config.step), spec, config.to)
    record = perform_on_cluster(
        catalog.uri, action, address="auto", verify=config.verify, told=print
    )
    print(record.result["location"])


if __name__ == "__main__":
    run_job(main)
