"""The models whose checkpoints several benchmarks work on: one decoder, saved in several ways."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt import CheckpointManager, HfAssets, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.core import names
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.converters import ModelConverter
from ray_ckpt.tensors.converters.lora import LoRA

STEP = 1
_DECODERS_OWN = "llama"
"""The family under whose names the decoder trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How the decoder is saved, and so what its export has to do."""

    family: str
    """Under whose native names."""
    converters: tuple[ModelConverter, ...] = ()


KINDS: Mapping[str, Kind] = {
    # every tensor stays as it is, or is cast
    "plain": Kind(family="identity"),
    # the rows of q and k are exchanged
    "permute": Kind(family="torchtitan_llama3"),
    # the same, and q and v are merged with two low-rank layers each
    "lora": Kind(
        family=_DECODERS_OWN,
        converters=(LoRA(rank=8, alpha=16, targets=("layers.*.attention.w[qv]",)),),
    ),
}


def config_of(size_mb: int) -> DecoderConfig:
    """A model of about so many megabytes in float32."""
    return DecoderConfig(
        dim=1024, num_layers=max(1, size_mb // 50), num_heads=16, num_kv_heads=16, ffn_dim=2816
    )


def commit_model(root: str, size_mb: int, *, kind: str) -> None:
    """Step 1 holds such a model, saved as `KINDS` says, and no optimizer."""
    config, converters = config_of(size_mb), KINDS[kind].converters
    assets = replace(make_assets(config), family=KINDS[kind].family)
    model = Decoder(config, VOCAB_SIZE)
    for converter in converters:
        converter.convert(model)
    init_weights(model)  # low-rank layers too: none is zero
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(_renamed(model, assets), converters=converters)),
        config=SaveConfig(mode="sync"),
        assets=assets,
    )
    manager.save(STEP, last_step=True)
    manager.close()


def forget_model(root: str) -> None:
    """Nothing of the step's tensors is in the page cache; for Linux."""
    for path in Path(root, names.step_dir(STEP)).glob("*.distcp"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _renamed(model: Decoder, assets: HfAssets) -> nn.Module:
    """The same weights under the native names of the assets' family."""
    if assets.family == _DECODERS_OWN:
        return model
    config = json.loads(assets.files["config.json"])
    hf = make_adapter(_DECODERS_OWN, config).to_hf(model.state_dict())
    return _module_of(make_adapter(assets.family, config).from_hf(hf))


def _module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that does nothing and has parameters of these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, parameter = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(parameter, nn.Parameter(tensor.contiguous()))
    return root
