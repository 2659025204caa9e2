"""QAT against torchao and transformers: what is exported is what was trained, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import AutoModelForCausalLM

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.converters.qat import CODES, QAT, quantize
from ray_ckpt.tensors.converters.torchao_files import TorchAoAdapter
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import split, transpose
from ray_ckpt.tensors.transforms import StateDictTransforms
from tests.tensors.converters.models import (
    CONFIG,
    hf_logits,
    llama,
    make_model,
    native_logits,
    same_bits,
    train,
    write_hf,
)

SCHEMES = pytest.mark.parametrize(
    ("weights", "activations"), [("int4", "none"), ("int8", "none"), ("int4", "int8")]
)


def qat(**options: Any) -> QAT:
    return QAT(**{"targets": ["layers.*"], "group_size": 16, **options})


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(shape=tuple(v.shape), dtype=v.dtype) for k, v in tensors.items()}


def export(folder: Path, converter: QAT, state: dict[str, Tensor], dtype: Any = "float32") -> Path:
    """As the export engine writes it."""
    tensors = StateDictTransforms(
        adapter=llama(), dtype=dtype, converters=(converter,)
    ).whole_to_hf(state)
    layout = converter.layout(specs(tensors))
    config = {**CONFIG, **layout.config, "torch_dtype": dtype, "dtype": dtype}
    return write_hf(folder, tensors, config, layout.metadata)


def test_training_computes_with_rounded_weights_and_saves_exact_ones() -> None:
    converter = qat()
    model = make_model([converter])
    assert not torch.equal(native_logits(model), native_logits(make_model()))
    assert same_bits(model.state_dict(), make_model().state_dict())
    train(model, range(3))
    assert same_bits(converter.state_dict_transform(model.state_dict()), model.state_dict())


@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_times_scale_is_what_was_trained_with(
    weights: Any, activations: Any, dtype: torch.dtype
) -> None:
    converter = qat(weights=weights, activations=activations)
    model = make_model([converter], dtype=dtype)
    train(model, range(3))
    for block in model.layers.values():
        linear = block.feed_forward.w1
        parts = quantize(linear.weight.detach(), codes=CODES[weights], group_size=16)
        scale = parts["scale"].repeat_interleave(16, dim=1)
        rounded = (parts["qdata"] * scale).to(dtype)
        assert torch.equal(rounded, linear.weight_fake_quantizer(linear.weight))


@SCHEMES
def test_transformers_loads_the_export_and_says_what_the_trained_model_says(
    weights: Any, activations: Any, tmp_path: Path
) -> None:
    converter = qat(weights=weights, activations=activations, flavor=weights)
    model = make_model([converter])
    train(model, range(3))
    folder = export(tmp_path / "hf", converter, model.state_dict())
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert type(hf.model.layers[0].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert type(hf.lm_head.weight) is nn.Parameter
    torch.testing.assert_close(hf_logits(hf), native_logits(model), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(hf_logits(hf), native_logits(make_model()), atol=1e-3)


def test_an_export_in_bfloat16_keeps_its_codes_and_scales(tmp_path: Path) -> None:
    converter = qat(flavor="int4")
    model = make_model([converter])
    train(model, range(3))
    wide = export(tmp_path / "wide", converter, model.state_dict())
    narrow = export(tmp_path / "narrow", converter, model.state_dict(), "bfloat16")
    of = [AutoModelForCausalLM.from_pretrained(folder) for folder in (wide, narrow)]
    weights = [hf.model.layers[1].self_attn.q_proj.weight for hf in of]
    assert torch.equal(weights[0].qdata, weights[1].qdata)
    assert torch.equal(weights[0].scale, weights[1].scale)
    assert weights[1].dtype == torch.bfloat16
    torch.testing.assert_close(hf_logits(of[1]).float(), native_logits(model), atol=5e-2, rtol=5e-2)


def test_codes_and_scales_may_lie_in_different_files(tmp_path: Path) -> None:
    converter = qat(flavor="int4")
    state = make_model([converter]).state_dict()
    whole = export(tmp_path / "whole", converter, state)
    tensors = load_file(whole / "model.safetensors")
    halves = {
        "model-1.safetensors": {k: v for k, v in tensors.items() if not k.endswith("_scale")},
        "model-2.safetensors": {k: v for k, v in tensors.items() if k.endswith("_scale")},
    }
    header = {"format": "pt", **converter.layout(specs(tensors)).metadata}
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_text((whole / "config.json").read_text())
    for file, half in halves.items():
        save_file(half, split / file, metadata=header)
    weight_map = {name: file for file, half in halves.items() for name in half}
    index = {"metadata": {}, "weight_map": weight_map}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, split))
    assert torch.equal(hf_logits(one), hf_logits(other))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (
            {"weights": "int4"},
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
        ),
        (
            {"weights": "int8", "activations": "int8"},
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int8, weight_granularity=PerGroup(16)
            ),
        ),
    ],
)
def test_tensors_header_and_config_are_those_that_torchao_writes(
    options: dict[str, Any], config: Any
) -> None:
    converter = qat(**options, flavor=options["weights"])
    model = make_model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    quantize_(model.layers, config)
    tensors, header = flatten_tensor_state_dict(model.state_dict())
    ours = converter.state_dict_transform(state)
    assert same_bits({key: ours[key] for key in tensors}, tensors)
    layout = converter.layout(specs(ours))
    assert {k: json.loads(v) for k, v in layout.metadata.items() if k != "tensor_names"} == {
        k: json.loads(v) for k, v in header.items() if k != "tensor_names"
    }
    assert set(json.loads(layout.metadata["tensor_names"])) == set(
        json.loads(header["tensor_names"])
    )
    quant_type = layout.config["quantization_config"]["quant_type"]["default"]
    assert quant_type == json.loads(json.dumps(config_to_dict(config)))


def test_a_recorded_low_precision_export_makes_the_same_bits() -> None:
    converter = qat(flavor="int4")
    state = make_model([converter]).state_dict()
    recording = record(converter.state_dict_transform, specs(state))
    replayed = recording.run(list(recording.outputs), lambda key: state[key])
    assert same_bits(replayed, converter.state_dict_transform(state))


def test_names_go_to_hugging_face_and_back() -> None:
    quantized = qat(flavor="int4").state_dict_transform(make_model().state_dict())
    adapter = TorchAoAdapter(llama())
    adapter.expect_whole(quantized)
    hf = adapter.to_hf(quantized)
    assert "model.layers.0.self_attn.q_proj._weight_qdata" in hf
    adapter.expect_whole_hf(hf)
    assert same_bits(adapter.from_hf(hf), quantized)


def test_a_fused_layer_is_split_with_its_scales() -> None:
    base = RuleAdapter("fused", [split("w13.weight", ["gate.weight", "up.weight"], rows=[3, 5])])
    quantized = qat(targets=["w13"], flavor="int4").state_dict_transform(
        {"w13.weight": torch.randn(8, 32)}
    )
    shapes = {name: tuple(t.shape) for name, t in TorchAoAdapter(base).to_hf(quantized).items()}
    assert shapes["gate._weight_qdata"] == (3, 32)
    assert shapes["up._weight_scale"] == (5, 2)


def test_a_layer_that_is_transposed_elsewhere_has_no_quantized_form() -> None:
    adapter = TorchAoAdapter(RuleAdapter("gpt2", [transpose("w.weight", "c.weight")]))
    quantized = qat(targets=["w"], flavor="int4").state_dict_transform(
        {"w.weight": torch.randn(8, 32)}
    )
    with pytest.raises(StateDictError, match="export the plain flavor"):
        adapter.to_hf(quantized)


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(ConfigError, match=r"groups of 32 do not divide.*w2 \(48\)"):
        qat(group_size=32).convert(make_model())


def test_a_pattern_that_also_matches_an_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="tok_embeddings"):
        qat(targets=["*"]).convert(make_model())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"weights": "int2"}, "weights"),
        ({"activations": "int4"}, "activations"),
        ({"weights": "int8", "flavor": "int4"}, "flavor"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"qat\.{field}"):
        qat(**options)
