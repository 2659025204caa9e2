"""Export one checkpoint to a Hugging Face folder, on the cluster, after training or beside it.

ray job submit --working-dir . -- python -m jobs.export root=/runs/a to=hf://org/repo
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.command import parse, run_job
from ray_ckpt.cluster.perform import perform_on_cluster
from ray_ckpt.core import names
from ray_ckpt.core.config import MAX_SHARD_BYTES, Device, Dtype, ExportFormat
from ray_ckpt.core.errors import StepNotFoundError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.backends import open_root
from ray_ckpt.storage.listing import newest_step


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """One export."""

    root: str
    """Where the run keeps its checkpoints."""
    step: int | None = None
    """Which one; without it the newest, which after training is the last."""
    name: str = "hf-bf16"
    """Folder under `exports/`."""
    dtype: Dtype = "bfloat16"
    """What floating-point tensors are cast to."""
    flavors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Converter to what it is exported as: `flavors.lora=peft`."""
    format: ExportFormat = "safetensors"
    """Of the weights: safetensors files, or one file for `torch.load`."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Of each safetensors file."""
    device: Device = "cpu"
    """Where merges are computed."""
    logits_within: float | None = None
    """Compare the logits of the run's prompt with the recorded ones, as in 0.02."""
    license: str | None = None
    """For the model card, as in `apache-2.0`; else the base model's, if it is known."""
    allow_non_finite: bool = False
    """Also with NaN or Inf in the weights."""
    allow_zeros: bool = False
    """Also with a matrix that is nothing but zeros."""
    to: str | None = None
    """Also publish it there: `/path`, `s3://bucket/prefix` or `hf://org/repo`."""


def main() -> None:
    """Ask the run's manager, and wait."""
    config = parse(ExportConfig, __doc__)
    catalog = open_root(config.root)
    spec = ExportSpec(
        name=config.name,
        dtype=config.dtype,
        flavors=config.flavors,
        format=config.format,
        max_shard_bytes=config.max_shard_bytes,
        device=config.device,
        logits_within=config.logits_within,
        license=config.license,
        allow_non_finite=config.allow_non_finite,
        allow_zeros=config.allow_zeros,
    )
    step = newest_step(catalog.store) if config.step is None else config.step
    if step is None:
        raise StepNotFoundError("no checkpoint is here yet", catalog.uri)
    checkpoint = catalog.checkpoint(step)
    if config.to is None:
        action = export_action(checkpoint, spec)
    else:  # asked for at once: some destinations take files while others are made
        action = publish_action(checkpoint, spec, config.to)
    record = perform_on_cluster(catalog.uri, action, address="auto", told=print)
    print(f"{catalog.uri}/{names.export_dir(config.name, step)}")
    if config.to is not None:
        print(record.result["location"])


if __name__ == "__main__":
    run_job(main)
