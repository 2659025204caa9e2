"""Known values are quantized as a source on the Hub is, and come back plain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.quantized import dequantize, stored_as
from ray_ckpt.tensors.recording import TensorSpec, record

FP8: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
}
MXFP4: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values and scales; block by block, as slow as it is plain."""
    rows, columns = (-(-length // block) for length in weight.shape)
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("shape", [(256, 128), (300, 200), (5, 7)], ids=str)
def test_fp8_weights_come_back_block_by_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    values, scales = _fp8(weight, 128)
    norm = torch.randn(3)
    stored = {"a.weight": values, "a.weight_scale_inv": scales, "norm.weight": norm}
    plain = dequantize(stored, FP8)
    assert set(plain) == {"a.weight", "norm.weight"}
    assert plain["norm.weight"] is norm
    blocks = torch.arange(shape[0])[:, None] // 128, torch.arange(shape[1])[None, :] // 128
    assert torch.equal(plain["a.weight"], values.float() * scales[blocks])
    error = (plain["a.weight"] - weight).abs() / scales[blocks] / 448
    assert error.max() < 2**-4


def test_blocks_are_as_large_as_the_config_says() -> None:
    values, scales = _fp8(torch.randn(8, 6), 4)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    plain = dequantize({"a.weight": values, "a.weight_scale_inv": scales}, config)
    assert torch.equal(plain["a.weight"][4:, 4:], values[4:, 4:].float() * scales[1, 1])
    with pytest.raises(StateDictError, match=r"\(1, 1\), these have \(2, 2\)"):
        dequantize({"a.weight": values, "a.weight_scale_inv": scales}, FP8)


def _packed(experts: int, rows: int, blocks: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x.gate_up_proj_blocks": torch.randint(0, 256, (experts, rows, blocks, 16)).byte(),
        "x.gate_up_proj_scales": torch.randint(100, 140, (experts, rows, blocks)).byte(),
        "x.gate_up_proj_bias": torch.randn(experts, rows),
    }


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    stored = _packed(3, 8, 2)
    plain = dequantize(stored, MXFP4)
    expected = convert_moe_packed_tensors(
        stored["x.gate_up_proj_blocks"], stored["x.gate_up_proj_scales"]
    )
    assert set(plain) == {"x.gate_up_proj", "x.gate_up_proj_bias"}
    assert plain["x.gate_up_proj"].dtype == expected.dtype == torch.bfloat16
    assert torch.equal(plain["x.gate_up_proj"], expected)
    assert plain["x.gate_up_proj"].is_contiguous()


def test_a_packed_gpt_oss_is_a_whole_model_for_its_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("gpt_oss", num_local_experts=3, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = {}
    for name in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{name}"
        shapes[stem] = stored.pop(stem).shape
        experts, columns, rows = shapes[stem]
        stored[f"{stem}_blocks"] = torch.ones(experts, rows, columns // 32, 16).byte()
        stored[f"{stem}_scales"] = torch.full((experts, rows, columns // 32), 127).byte()
    plain = dequantize(stored, MXFP4)
    assert {stem: plain[stem].shape for stem in shapes} == shapes
    adapter = make_adapter("gpt_oss", config.to_dict())
    adapter.expect_whole_hf(plain)
    native = adapter.from_hf(plain)
    assert native["layers.0.moe.routed_experts.inner_experts.mlp1_weight_EGD"].shape == (3, 128, 32)


def test_every_code_of_mxfp4_is_its_number_and_every_scale_its_power_of_two() -> None:
    low_first = torch.arange(16).reshape(1, 1, 1, 16) | (torch.arange(16) << 4)
    for scale in (0, 1, 126, 127, 128, 200):
        stored = {"w_blocks": low_first.byte(), "w_scales": torch.full((1, 1, 1), scale).byte()}
        plain = dequantize(stored, MXFP4)["w"].flatten()
        assert torch.equal(plain, (FP4 * 2.0 ** (scale - 127)).bfloat16().repeat_interleave(2))


@pytest.mark.parametrize(
    ("stored", "config"),
    [
        (_packed(2, 4, 1), MXFP4),
        (
            dict(zip(("a.weight", "a.weight_scale_inv"), _fp8(torch.ones(9, 9), 128), strict=True)),
            FP8,
        ),
    ],
    ids=["mxfp4", "fp8"],
)
def test_it_can_be_recorded_and_leaves_its_input(
    stored: dict[str, Tensor], config: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in stored.items()}
    specs = {n: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for n, t in stored.items()}
    recording = record(lambda sd: dequantize(sd, config), specs)
    made = recording.run(recording.outputs, stored.__getitem__)
    assert all(torch.equal(made[n], tensor) for n, tensor in dequantize(stored, config).items())
    assert all(
        torch.equal(stored[n].view(torch.uint8), before[n].view(torch.uint8)) for n in stored
    )
    assert {n: set(o.sources) for n, o in recording.outputs.items()} == {
        n: set(sources) for n, sources in stored_as(stored, config).items()
    }


def test_the_names_a_plain_one_is_made_from_are_told() -> None:
    fp8 = ["a.weight", "a.weight_scale_inv", "a.bias", "norm.weight"]
    assert stored_as(fp8, FP8) == {
        "a.weight": ("a.weight", "a.weight_scale_inv"),
        "a.bias": ("a.bias",),
        "norm.weight": ("norm.weight",),
    }
    assert stored_as(_packed(1, 1, 1), MXFP4) == {
        "x.gate_up_proj": ("x.gate_up_proj_blocks", "x.gate_up_proj_scales"),
        "x.gate_up_proj_bias": ("x.gate_up_proj_bias",),
    }
    assert stored_as(["a_blocks"], {}) == {"a_blocks": ("a_blocks",)}


@pytest.mark.parametrize(
    ("name", "config"),
    [("a.weight_scale_inv", FP8), ("a_blocks", MXFP4), ("a_scales", MXFP4)],
)
def test_one_half_without_the_other_is_named(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(StateDictError, match=f"other half: {name}"):
        dequantize({name: torch.zeros(1)}, config)


def test_a_folder_that_is_not_quantized_is_as_it_is() -> None:
    stored = {"a.weight": torch.ones(2)}
    assert dequantize(stored, {})["a.weight"] is stored["a.weight"]
    assert dequantize(stored, {"quantization_config": None}) == stored


def test_an_unknown_way_to_quantize_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="awq") as caught:
        dequantize({}, {"quantization_config": {"quant_method": "awq"}})
    assert "fp8, mxfp4" in caught.value.do
