"""Adopt, verify, export and publish every old checkpoint that lies in a root, the oldest first.

ray job submit --working-dir . -- python -m jobs.backfill root=/old/run dtype=bfloat16 to=hf://o/r

The root holds step-N folders of TorchTitan, Ray Train or plain DCP; folders='checkpoint_*' takes
others too. Submitted again after a kill it goes on. Ends with 1 if a step could not be done.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.command import parse, run_job
from ray_ckpt.cluster.backfill import Backfill, Hands, backfill, take_on_cluster
from ray_ckpt.cluster.perform import perform_on_cluster
from ray_ckpt.cluster.reach import connect
from ray_ckpt.core.actions import Action
from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.tensors.run import HfAssets


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillConfig:
    """Which checkpoints, and what becomes of them."""

    root: str
    """Where the old checkpoints lie."""
    folders: str | None = None
    """Folders with other names that are steps too, as in `checkpoint_*`."""
    again: bool = False
    """Of these also the ones that were taken before and whose step was purged since."""
    family: str | None = None
    """The model's family, for exports: `torchtitan_llama3`, `qwen3`."""
    hf_assets: str | None = None
    """Folder with config.json and the tokenizer, as the job sees it."""
    dtype: Dtype | None = None
    """Of an export of every step; without it they are adopted and verified alone."""
    name: str = "hf"
    """Of the exports: their folder under `exports/`."""
    every_steps: int = 1
    """Multiples of it alone are exported."""
    to: str | None = None
    """Also publish them there."""
    rate_bytes_per_s: float | None = None
    """Of checkpoints, at most, on average."""

    def __post_init__(self) -> None:
        """What cannot be is refused before anything is read."""
        if self.to is not None and self.dtype is None:
            raise ConfigError("'to' wants an export to publish", do="add dtype=bfloat16")
        if self.hf_assets is not None and not Path(self.hf_assets).is_dir():
            raise ConfigError(f"there is no folder {self.hf_assets}", "hf_assets")


def main() -> None:
    """One step after the other; each is told."""
    config = parse(BackfillConfig, __doc__)
    catalog = open_root(config.root)
    assets = HfAssets.of_folder("", config.hf_assets).files if config.hf_assets else {}
    asked = Backfill(
        folders=config.folders,
        again=config.again,
        family=config.family,
        assets=assets,
        export=ExportSpec(name=config.name, dtype=config.dtype) if config.dtype else None,
        destination=config.to,
        every_steps=config.every_steps,
        bytes_per_s=config.rate_bytes_per_s,
    )
    connect("auto")
    failed = 0
    for filled in backfill(catalog, asked, Hands(take=take_on_cluster, perform=_perform)):
        print(filled, flush=True)
        failed += filled.error is not None
    sys.exit(1 if failed else 0)


def _perform(catalog: Catalog, action: Action) -> None:
    perform_on_cluster(catalog.uri, action, address="auto", told=partial(print, flush=True))


if __name__ == "__main__":
    run_job(main)
