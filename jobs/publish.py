"""Copy a finished export to another root, to S3 or to the Hugging Face Hub.

ray job submit --working-dir . -- python -m jobs.publish root=/r step=500 name=hf to=hf://o/r
"""

from dataclasses import dataclass

from jobs.command import parse, run_job
from ray_ckpt.cluster.perform import perform_on_cluster
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.wanted import publish_action
from ray_ckpt.storage.backends import open_catalog


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishConfig:
    """One copy of one export."""

    root: str
    """Where the run keeps its checkpoints."""
    step: int
    """Which one."""
    name: str
    """Which export of it."""
    to: str
    """`/path`, `s3://bucket/prefix` or `hf://org/repo`."""


def main() -> None:
    """Ask the run's manager, and wait."""
    config = parse(PublishConfig, __doc__)
    catalog = open_catalog(config.root)
    recipe = catalog.export(config.name, config.step).manifest.lineage.recipe
    spec = ExportSpec.of_recipe(recipe)
    action = publish_action(catalog.checkpoint(config.step), spec, config.to)
    record = perform_on_cluster(catalog.uri, action, address="auto", told=print)
    print(record.result["location"])


if __name__ == "__main__":
    run_job(main)
