"""Two small runs on a Ray of their own, for a Prometheus to scrape: a program.

    python -m tests.infra.small_run LOCAL_ROOT S3_ROOT COPIES

Prints where Ray says what is to be scraped, and lives until its input ends. The run on disk saves,
exports, copies and purges; one of its steps is damaged. The one on S3 has one step, exported, which
somebody may ask to be copied.
"""

import os
import sys
from pathlib import Path

import torch

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt.cluster.connect import start_manager
from ray_ckpt.cluster.local import embedded_ray
from ray_ckpt.cluster.train import Reporter
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import HfAssets, Run
from ray_ckpt.tensors.states import TrainingState
from tests.roots import TINY, flip_byte

DAMAGED = 3
SMALL = DecoderConfig(dim=128, num_layers=2, ffn_dim=344)
BEATS_EVERY_SECOND = Limits(hung_after_s=24.0)


def policy(*copies: str) -> LifecyclePolicy:
    return LifecyclePolicy(
        export=(
            ExportPolicy(
                name="hf",
                steps=(1, 4),
                last_step=False,
                dtype="float32",
                max_shard_bytes=250_000,  # many files, so that a copy counts bytes on its way
            ),
        ),
        publish=tuple(PublishPolicy(export="hf", to=place) for place in copies),
        keep=KeepConfig(latest=2),
        limits=BEATS_EVERY_SECOND,
    )


def save(root: str, steps: int, sizes: DecoderConfig, *copies: str) -> None:
    """As a trainer does it, without an end: another save is due."""
    torch.manual_seed(0)
    model = Decoder(sizes, VOCAB_SIZE)
    init_weights(model)
    manager = CheckpointManager(
        root,
        TrainingState(
            model=ModelWrapper(model), optimizer=torch.optim.SGD(model.parameters(), lr=0.01)
        ),
        config=SaveConfig(every_steps=1),
        assets=HfAssets(family="llama", files=make_assets(sizes).files),
        run=Run(policy=policy(*copies), on_event=Reporter(root).saved),
    )
    for step in range(1, steps + 1):
        manager.save(step)
        manager.wait()
        if step == DAMAGED:
            flip_byte(Path(root) / f"step-{step}" / "__0_0.distcp")
    manager.close()


def main() -> None:
    local_root, s3_root, copies = sys.argv[1:]
    with embedded_ray("small run", {}, on_poll=lambda: None):
        targets = Path(os.environ["RAY_TMPDIR"], "ray", "prom_metrics_service_discovery.json")
        start_manager(local_root, interval_s=0.2)
        start_manager(s3_root, interval_s=0.2)
        save(local_root, 6, TINY, copies)
        sys.stdout.write(f"{targets}\n")
        sys.stdout.flush()
        save(s3_root, 1, SMALL)
        sys.stdin.read()


if __name__ == "__main__":
    main()
