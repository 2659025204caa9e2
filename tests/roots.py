"""A root with committed steps, made by the real CheckpointManager in this one process."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.logits import Reference
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import HfAssets, Run
from ray_ckpt.tensors.states import TrainingState

TINY = DecoderConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, max_seq_len=64)


def make_root(
    root: str,
    steps: Sequence[int],
    policy: LifecyclePolicy | None = None,
    *,
    sizes: DecoderConfig = TINY,
    files: Mapping[str, bytes] | None = None,
    reference: Callable[[Decoder], Reference] | None = None,
) -> Decoder:
    """Commits `steps` under `root`, the last one as the run's last; returns the model.

    `files` come beside those that every run of this model has.
    """
    torch.manual_seed(0)
    model = Decoder(sizes, VOCAB_SIZE)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(model), optimizer=optimizer),
        config=SaveConfig(every_steps=1, mode="sync"),
        assets=HfAssets(family="llama", files={**make_assets(sizes).files, **(files or {})}),
        run=Run(policy=policy, reference=partial(reference, model) if reference else None),
    )
    for step in steps:
        model(torch.randint(0, 256, (1, 8))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.save(step, last_step=step == steps[-1], metrics={"loss": 1.0 / step})
    manager.close()
    return model


def flip_byte(path: Path, offset: int = 3000) -> None:
    """One byte of the file is another one; its size stays."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def snapshot(root: str) -> dict[str, bytes]:
    """Every file below `root`, to show that nothing changed."""
    base = Path(root)
    return {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
