"""LoRA on the real decoder: what is added and trained, and both exports against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.converters.lora import LoRA, init_lora_weights
from ray_ckpt.tensors.converters.peft import PeftAdapter
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import split, transpose
from tests.tensors.converters.models import (
    ATTENTION,
    hf_logits,
    llama,
    make_model,
    native_logits,
    same_bits,
    shard,
    train,
    whole,
    write_hf,
)
from tests.tensors.ranks import run

# PEFT asks transformers for an attribute that has a newer name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def lora(**options: Any) -> LoRA:
    return LoRA(**{"rank": 4, "alpha": 8, "targets": ATTENTION, **options})


def trained(converter: LoRA, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model after some steps, and its whole state dict."""
    model = make_model([converter], **options)
    train(model, range(5))
    return model, ModelWrapper(model, converters=[converter]).state_dict()


def peft_folder(folder: Path, converter: LoRA, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    adapter = converter.state_dict_adapter(llama())
    assert adapter is not None
    tensors = adapter.to_hf(converter.state_dict_transform(state))
    specs = {n: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()}
    layout = converter.layout(specs)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / f"{layout.weights}.safetensors", metadata={"format": "pt"})
    (folder / layout.config_file).write_text(json.dumps(dict(layout.config)))
    return folder


def test_names_are_torchtitans_and_the_base_keeps_its_own() -> None:
    base = set(make_model().state_dict())
    model = make_model([lora(targets=["layers.0.attention.wq"])])
    assert set(model.state_dict()) - base == {
        "layers.0.attention.wq.lora_a.weight",
        "layers.0.attention.wq.lora_b.weight",
    }
    assert base < set(model.state_dict())


def test_only_the_low_rank_layers_are_trained_and_nothing_is_computed_otherwise_at_first() -> None:
    model = make_model([lora()])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 * 2
    assert all(".lora_a." in name or ".lora_b." in name for name in trainable)
    assert torch.equal(native_logits(model), native_logits(make_model()))


def test_training_changes_the_low_rank_layers_and_leaves_the_base() -> None:
    _, state = trained(lora())
    base = make_model().state_dict()
    assert same_bits(base, {key: state[key] for key in base})
    assert all(state[key].abs().max() > 0 for key in state if key.endswith("lora_b.weight"))


def test_a_bias_stays_where_it_is() -> None:
    model = nn.ModuleDict({"w": nn.Linear(3, 2)})
    lora(targets=["w"]).convert(model)
    assert {"w.weight", "w.bias"} < set(model.state_dict())
    merged = lora(targets=["w"]).state_dict_transform(model.state_dict())
    assert set(merged) == {"w.weight", "w.bias"}


def test_the_merged_model_says_in_transformers_what_the_native_one_says(tmp_path: Path) -> None:
    converter = lora()
    model, state = trained(converter)
    merged = converter.state_dict_transform(state)
    assert set(merged) == set(make_model().state_dict())
    hf = AutoModelForCausalLM.from_pretrained(write_hf(tmp_path / "hf", llama().to_hf(merged)))
    torch.testing.assert_close(hf_logits(hf), native_logits(model), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(native_logits(model), native_logits(make_model()), atol=1e-3)


@pytest.mark.parametrize("targets", [ATTENTION, ["*w[qk]", "*.w2", "output"], ["layers.1.*"]])
def test_peft_loads_the_adapter_and_says_what_the_native_model_says(
    tmp_path: Path, targets: list[str]
) -> None:
    converter = lora(flavor="peft", alpha=6, targets=targets)
    model, state = trained(converter)
    base = write_hf(tmp_path / "base", llama().to_hf(make_model().state_dict()))
    folder = peft_folder(tmp_path / "adapter", converter, state)
    hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(hf_logits(hf), native_logits(model), atol=2e-6, rtol=1e-5)


def test_what_peft_saves_again_is_what_it_was_given_and_comes_back_bit_for_bit(
    tmp_path: Path,
) -> None:
    converter = lora(flavor="peft")
    _, state = trained(converter)
    base = write_hf(tmp_path / "base", llama().to_hf(make_model().state_dict()))
    folder = peft_folder(tmp_path / "adapter", converter, state)
    hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    hf.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same_bits(again, load_file(folder / "adapter_model.safetensors"))
    adapter = PeftAdapter(llama())
    adapter.expect_whole_hf(again)
    native = adapter.from_hf(again)
    adapter.expect_whole(native)
    assert same_bits(native, {key: state[key] for key in native})
    assert set(native) == {key for key in state if converter.key_filter(key)}


def test_a_fused_module_is_split_and_joined_again() -> None:
    base = RuleAdapter("fused", [split("w13.weight", ["gate.weight", "up.weight"], rows=[3, 5])])
    adapter = PeftAdapter(base)
    native = {"w13.lora_a.weight": torch.randn(2, 4), "w13.lora_b.weight": torch.randn(8, 2)}
    hf = adapter.to_hf(native)
    assert {name: tuple(t.shape) for name, t in hf.items()} == {
        "base_model.model.gate.lora_A.weight": (2, 4),
        "base_model.model.gate.lora_B.weight": (3, 2),
        "base_model.model.up.lora_A.weight": (2, 4),
        "base_model.model.up.lora_B.weight": (5, 2),
    }
    assert same_bits(adapter.from_hf(hf), native)
    hf["base_model.model.up.lora_A.weight"] = torch.zeros(2, 4)
    with pytest.raises(StateDictError, match="lora_A differ"):
        adapter.from_hf(hf)


def test_a_module_whose_rows_are_columns_elsewhere_has_no_peft_form() -> None:
    adapter = PeftAdapter(RuleAdapter("gpt2", [transpose("w.weight", "c.weight")]))
    native = {"w.lora_a.weight": torch.randn(2, 4), "w.lora_b.weight": torch.randn(8, 2)}
    with pytest.raises(StateDictError, match="export the merged model"):
        adapter.to_hf(native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_merge_is_made_in_float32_and_keeps_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    converter = lora(targets=["w"])
    state = {
        "w.weight": torch.randn(8, 6).to(dtype),
        "w.lora_a.weight": torch.randn(4, 6).to(dtype),
        "w.lora_b.weight": torch.randn(8, 4).to(dtype),
    }
    merged = converter.state_dict_transform(state)["w.weight"]
    wide = {key: value.double() for key, value in state.items()}
    exact = wide["w.weight"] + 2 * wide["w.lora_b.weight"] @ wide["w.lora_a.weight"]
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, exact.to(dtype))


@pytest.mark.parametrize("flavor", ["merged", "peft"])
@pytest.mark.parametrize("lacking", ["lora_a", "lora_b"])
def test_half_a_low_rank_layer_is_refused_by_name(flavor: str, lacking: str) -> None:
    converter = lora(flavor=flavor)
    state = make_model([converter]).state_dict()
    del state[f"layers.1.attention.wv.{lacking}.weight"]
    with pytest.raises(StateDictError, match=rf"layers\.1\.attention\.wv\.{lacking}\.weight"):
        converter.state_dict_transform(state)


def test_a_low_rank_layer_without_its_base_weight_is_refused_by_name() -> None:
    state = make_model([lora()]).state_dict()
    del state["layers.1.attention.wv.weight"]
    with pytest.raises(StateDictError, match=r"layers\.1\.attention\.wv\.weight"):
        lora().state_dict_transform(state)


def test_a_target_that_is_nowhere_is_answered_with_names_that_come_near() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.wq"):
        lora(targets=["layer.*.attention.wq"]).convert(make_model())


def test_a_pattern_that_matches_nothing_beside_one_that_does_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora(targets=[*ATTENTION, "w9"]).convert(make_model())
    assert "w9" in caplog.text


def test_keys_of_other_layers_are_not_lora_s() -> None:
    converter = lora(targets=["*.wq"])
    assert converter.key_filter("layers.0.attention.wq.lora_a.weight")
    assert not converter.key_filter("layers.0.attention.wk.lora_a.weight")
    assert not converter.key_filter("layers.0.attention.wq.weight")
    assert not converter.key_filter("ema.layers.0.attention.wq.lora_a.weight")


def test_on_the_meta_device_weights_come_afterwards() -> None:
    with torch.device("meta"):
        model = make_model([lora()])
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_lora_weights(model)
    weight = model.layers["0"].attention.wq.lora_a.weight
    assert 0 < weight.abs().max() <= 1 / 32**0.5
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("b.weight"))


def test_sharded_on_the_meta_device_weights_come_afterwards_too() -> None:
    assert run(_initialised_after_sharding) == [{"a": True, "b": True}] * 2


def _initialised_after_sharding() -> dict[str, bool]:
    with torch.device("meta"):
        model = make_model([lora()])
    model = shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_lora_weights(model)
    wq = model.layers["0"].attention.wq
    a, b = whole(wq.lora_a.weight), whole(wq.lora_b.weight)
    return {"a": bool(0 < a.abs().max() <= 1 / 32**0.5), "b": not b.any()}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_wrappers_leave_no_trace_in_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    converter = lora()
    model = make_model([converter])
    names = set(model.state_dict())
    for key, block in list(model.layers.items()):
        model.layers[key] = wrap(block)
    wrapper = ModelWrapper(model, converters=[converter])
    assert set(wrapper.state_dict()) == names
    assert set(wrapper.state_dict("export")) == set(make_model().state_dict())


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"alpha": -1}, {"saves": "all"}, {"flavor": "hf"}, {"targets": "wq"}],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any]) -> None:
    (field,) = options
    with pytest.raises(ConfigError, match=rf"lora\.{field}"):
        lora(**options)
