"""From the training loop to transformers: saved by two ranks, resumed by two others, exported."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import ConverterEntry
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.converters import entries_of, make_converters, transform_for_export
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import HfAssets
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.converters.examples import EXAMPLES
from tests.tensors.converters.models import (
    CONFIG,
    hf_logits,
    llama,
    make_model,
    native_logits,
    shard,
    train,
    whole,
    write_hf,
)
from tests.tensors.ranks import run

# PEFT asks transformers for an attribute that has a newer name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
STEP = 3


@dataclass(frozen=True)
class Trained:
    """What rank 0 knew when it saved step 3."""

    root: Path
    state: dict[str, Tensor]
    logits: Tensor
    """What the model in training says."""
    losses: list[float]
    """Of the steps after it."""

    def plain_logits(self, entries: Any, **flavors: str) -> Tensor:
        """What a plain decoder with the converters undone says."""
        model = make_model()
        model.load_state_dict(transform_for_export(self.state, make_converters(entries, flavors)))
        return native_logits(model)


@pytest.fixture(scope="module", params=["lora, ema", "qat", "float8", "qat, lora, ema"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("saved") / "run"
    state, logits, losses = run(_train_and_save, request.param, str(root))[0]
    return Trained(root, state, logits, losses)


def test_a_run_that_resumes_goes_on_with_the_same_losses(saved: Trained) -> None:
    assert run(_resume, str(saved.root))[0] == saved.losses


def test_the_manifest_makes_equal_converters(saved: Trained) -> None:
    entries = entries_in(saved)
    converters = make_converters(entries, {})
    assert entries_of(converters) == entries
    assert [entry.name for entry in entries] == [converter.name for converter in converters]


def test_the_export_is_the_model_without_converters(saved: Trained) -> None:
    hf = AutoModelForCausalLM.from_pretrained(export(saved))
    expected = saved.plain_logits(entries_in(saved))
    torch.testing.assert_close(hf_logits(hf), expected, atol=5e-6, rtol=1e-5)


def test_the_raw_flavor_is_the_model_in_training(saved: Trained) -> None:
    hf = AutoModelForCausalLM.from_pretrained(export(saved, ema="raw"))
    torch.testing.assert_close(hf_logits(hf), saved.logits, **_tolerance(saved))


def test_the_low_precision_flavor_is_loaded_with_torchao(saved: Trained) -> None:
    hf = AutoModelForCausalLM.from_pretrained(export(saved, ema="raw", qat="int4", float8="fp8"))
    plain = type(hf.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter
    assert plain == ({"qat", "float8"}.isdisjoint(names_in(saved)))
    torch.testing.assert_close(hf_logits(hf), saved.logits, atol=0.15, rtol=0.15)


def test_the_peft_flavor_on_the_base_is_the_merged_model(saved: Trained, tmp_path: Path) -> None:
    if "lora" not in names_in(saved):
        pytest.skip("no LoRA in this run")
    folder = export(saved, lora="peft")
    base = {key: saved.state[key] for key in make_model().state_dict()}
    hf = AutoModelForCausalLM.from_pretrained(write_hf(tmp_path / "base", llama().to_hf(base)))
    adapted = PeftModel.from_pretrained(hf, folder)
    expected = saved.plain_logits(entries_in(saved))
    torch.testing.assert_close(hf_logits(adapted), expected, atol=5e-6, rtol=1e-5)


def export(saved: Trained, **flavors: str) -> Path:
    """The folder, for the flavors of converters that this run has."""
    catalog = open_catalog(str(saved.root))
    own = {name: flavor for name, flavor in flavors.items() if name in names_in(saved)}
    name = "-".join(["hf", *own.values()])
    spec = ExportSpec(name=name, dtype="float32", flavors=own)
    export_step(catalog, catalog.manifest(STEP), spec)
    return saved.root / "exports" / name / f"step-{STEP}"


def entries_in(saved: Trained) -> tuple[ConverterEntry, ...]:
    model = open_catalog(str(saved.root)).manifest(STEP).model
    assert model is not None
    return model.converters


def names_in(saved: Trained) -> set[str]:
    return {entry.name for entry in entries_in(saved)}


def _tolerance(saved: Trained) -> dict[str, float]:
    """Plain weights do not round as those in training with fewer bits do."""
    exact = {"qat", "float8"}.isdisjoint(names_in(saved))
    return {"atol": 5e-6, "rtol": 1e-5} if exact else {"atol": 0.15, "rtol": 0.15}


def _train_and_save(example: str, root: str) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    entries = [ConverterEntry(name=n, options=o) for n, o in EXAMPLES[example].items()]
    converters = make_converters(entries, {})
    model = shard(make_model(converters))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapper = ModelWrapper(model, converters=converters)
    checkpoints = _checkpoints(root, wrapper, optimizer)
    checkpoints.load()
    for step in range(1, STEP + 1):
        train(model, range(step, step + 1), converters, optimizer=optimizer)
        checkpoints.save(step)
    checkpoints.close()
    state = {key: whole(value) for key, value in wrapper.state_dict().items()}
    logits = native_logits(model, rank=0)
    losses = train(model, range(STEP + 1, STEP + 3), converters, optimizer=optimizer)
    return state, logits, losses


def _resume(root: str) -> list[float]:
    model_entry = open_catalog(root).manifest(STEP).model
    assert model_entry is not None
    converters = make_converters(model_entry.converters, {})
    model = shard(make_model(converters, seed=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    checkpoints = _checkpoints(root, ModelWrapper(model, converters=converters), optimizer)
    assert checkpoints.load().step == STEP
    checkpoints.close()
    return train(model, range(STEP + 1, STEP + 3), converters, optimizer=optimizer)


def _checkpoints(
    root: str, wrapper: ModelWrapper, optimizer: torch.optim.Optimizer
) -> CheckpointManager:
    return CheckpointManager(
        root,
        TrainingState(model=wrapper, optimizer=optimizer),
        config=SaveConfig(every_steps=STEP, mode="sync"),
        assets=HfAssets(family="llama", files={"config.json": json.dumps(CONFIG).encode()}),
    )
