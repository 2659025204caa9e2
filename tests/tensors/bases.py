"""Folders a run starts from, as others write them: transformers, PEFT, plain DCP."""

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from jobs.assets import make_assets
from jobs.corpus import EOS_ID, VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, hf_config
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.loading import FromSources, FromWeights, LoadConfig, Source
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.converters import CONVERTERS
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.ranks import expect_one_process
from ray_ckpt.tensors.run import HfAssets
from ray_ckpt.tensors.states import TrainingState, TrainState
from tests.tensors.tiny import SIZES, error_of, same_tensors

RANK, ALPHA = 2, 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA: dict[str, Any] = {
    "lora": {"rank": RANK, "alpha": ALPHA, "targets": ["layers.*.attention.w[qkvo]"]}
}
ADAPTER_SAVES: dict[str, Any] = {"lora": {**LORA["lora"], "saves": "adapter"}}


def hf_base(folder: Path, *, seed: int = 5, **how: Any) -> Any:
    """A Llama of the tiny decoder's sizes, saved by transformers; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # not in every rank's process

    dtype = how.pop("dtype", torch.float32)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, **how)
    return model


def peft_adapter(folder: Path, base: Any) -> Any:
    """A LoRA over `base` that changes what it says, saved by PEFT; returns both."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, to PEFT
        model = get_peft_model(base, config)
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def save_with_torch(values: Mapping[str, Tensor], folder: Path) -> Path:
    """A DCP folder that nobody but torch has written."""
    with warnings.catch_warnings():
        expect_one_process()
        dcp.save(dict(values), checkpoint_id=folder, no_dist=True)
    return folder


def foreign_dcp(folder: Path, seed: int = 8) -> dict[str, Tensor]:
    """Weights of the tiny decoder in such a folder; returns them."""
    torch.manual_seed(seed)
    model = Decoder(SIZES, VOCAB_SIZE)
    values = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    save_with_torch(values, folder)
    return values


def weights(path: Path | str, **how: Any) -> LoadConfig:
    """A run that starts from these weights."""
    return LoadConfig(start=FromWeights(path=str(path), **how))


def with_adapter(base: Path | str, adapter: Path | str, format: Any = "peft") -> LoadConfig:
    """A run that starts from a Hugging Face base and a LoRA adapter."""
    return LoadConfig(
        start=FromSources(
            sources=(
                Source(path=str(base), format="hf"),
                Source(path=str(adapter), format=format, owners=("lora",)),
            )
        )
    )


def decoder_of(
    state: Mapping[str, Tensor], converters: Mapping[str, Mapping[str, Any]] | None = None
) -> Decoder:
    """The decoder with the model's part of an outcome's state."""
    model = Decoder(SIZES, VOCAB_SIZE)
    for name, options in (converters or {}).items():
        CONVERTERS[name](**options).convert(model)
    model.load_state_dict({key: value for key, value in state.items() if ":" not in key})
    return model


@torch.no_grad()
def same_logits(model: nn.Module, other: Any) -> bool:
    """Whether the decoder says what a model of transformers or PEFT says."""
    ids = torch.arange(24).reshape(2, 12)
    return torch.allclose(model(ids), other.float().eval()(ids).logits, atol=1e-5)


def open_manager(
    root: Path | str,
    *,
    converters: dict[str, Any] | None = None,
    assets: HfAssets | None = None,
    sizes: DecoderConfig = SIZES,
) -> tuple[CheckpointManager, nn.Module]:
    """A manager of this one process, and its model."""
    model = Decoder(sizes, VOCAB_SIZE)
    made = [CONVERTERS[name](**options) for name, options in (converters or {}).items()]
    for converter in made:
        converter.convert(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainingState(
        model=ModelWrapper(model, converters=made),
        optimizer=torch.optim.AdamW(trained),
        extra={"train_state": TrainState()},
    )
    manager = CheckpointManager(
        str(root),
        state,
        config=SaveConfig(mode="sync", every_steps=1),
        assets=assets or make_assets(sizes),
    )
    return manager, model


def refused(root: Path | str, load: LoadConfig, **how: Any) -> RayCkptError:
    """The error of a load, after which the model is as it was, bit for bit."""
    manager, model = open_manager(root, **how)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = error_of(lambda: manager.load(config=load))
    manager.close()
    assert error is not None, "it was loaded"
    assert same_tensors(dict(model.state_dict()), before)
    assert error.safe, "every refusal says what became of the data"
    assert error.do, "every refusal says what to do next"
    assert error.where
    return error


def module_of(values: Mapping[str, Tensor]) -> nn.Module:
    """Nested modules whose parameters have these names and shapes, filled with another value."""
    whole = nn.Module()
    for key, value in values.items():
        *path, name = key.split(".")
        make = functools.partial(torch.full_like, fill_value=0.5, dtype=torch.float32)
        place = functools.reduce(_child, path, whole)
        place.register_parameter(name, nn.Parameter(make(value)))
    return whole


def _child(module: nn.Module, name: str) -> nn.Module:
    if not hasattr(module, name):
        module.add_module(name, nn.Module())
    return module.get_submodule(name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The folder's `config.json`."""
    (folder / "config.json").write_text(json.dumps(dict(config)))
