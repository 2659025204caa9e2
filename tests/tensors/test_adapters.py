"""Every family that is listed: total in both directions, and the very model transformers knows.

To add a family: a line in CASES with the config of a tiny model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from jobs.decoder import Decoder, DecoderConfig, hf_config
from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.adapters import ADAPTERS, StateDictAdapter, make_adapter
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.transforms import StateDictTransforms

VOCAB_SIZE = 37
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 8,
    "n_routed_experts": 12,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model of one family."""

    family: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> dict[str, Any]:
        """What its config.json says."""
        sizes = {**SIZES, **self.sizes, **changes}
        return AutoConfig.for_model(self.model_type, **sizes).to_dict()

    def hf(self, folder: Path, **changes: Any) -> dict[str, Tensor]:
        """What `save_pretrained` writes: names on disk, shared tensors once; values are random."""
        torch.manual_seed(0)
        sizes = {**SIZES, **self.sizes, **changes}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.model_type, **sizes))
        model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        return {key: torch.randn_like(value) for key, value in saved.items()}


EXPERTS = {"num_experts_per_tok": 2}
CASES = {
    "deepseek_v3": Case(family="deepseek_v3", model_type="deepseek_v3", sizes=LATENT),
    "deepseek_v3 without q_lora": Case(
        family="deepseek_v3", model_type="deepseek_v3", sizes={**LATENT, "q_lora_rank": None}
    ),
    "gpt_oss": Case(
        family="gpt_oss", model_type="gpt_oss", sizes={**EXPERTS, "num_local_experts": 4}
    ),
    "identity": Case(family="identity", model_type="qwen3"),
    "identity with routing biases": Case(family="identity", model_type="deepseek_v3", sizes=LATENT),
    "llama": Case(family="llama", model_type="llama", sizes={"num_hidden_layers": 12}),
    "llama with biases": Case(
        family="llama", model_type="llama", sizes={"attention_bias": True, "mlp_bias": True}
    ),
    "mixtral": Case(
        family="mixtral", model_type="mixtral", sizes={**EXPERTS, "num_local_experts": 12}
    ),
    "qwen3": Case(family="qwen3", model_type="qwen3"),
    "qwen3 with biases": Case(family="qwen3", model_type="qwen3", sizes={"attention_bias": True}),
    "qwen3_moe": Case(
        family="qwen3_moe",
        model_type="qwen3_moe",
        sizes={**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
    ),
    "torchtitan_llama3": Case(family="torchtitan_llama3", model_type="llama"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def adapter(case: Case) -> StateDictAdapter:
    return make_adapter(case.family, case.config())


@pytest.fixture
def hf(case: Case, tmp_path: Path) -> dict[str, Tensor]:
    return case.hf(tmp_path)


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def _specs(state_dict: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        key: TensorSpec(shape=tuple(value.shape), dtype=value.dtype)
        for key, value in state_dict.items()
    }


def test_from_hugging_face_and_back_is_the_same_bit_for_bit(
    adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    adapter.expect_whole_hf(hf)
    native = adapter.from_hf(hf)
    adapter.expect_whole(native)
    assert sum(tensor.numel() for tensor in native.values()) == sum(t.numel() for t in hf.values())
    there = adapter.to_hf(native)
    assert _equal(there, hf)
    assert _equal(adapter.from_hf(there), native)


def test_a_recording_does_the_same_without_reading_a_value(
    adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    inward = record(adapter.from_hf, _specs(hf))
    native = inward.run(inward.outputs, hf.__getitem__)
    assert _equal(native, adapter.from_hf(hf))
    outward = record(adapter.to_hf, _specs(native))
    assert _equal(outward.run(outward.outputs, native.__getitem__), hf)


def test_the_input_is_left_as_it_was(adapter: StateDictAdapter, hf: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in hf.items()}
    native = adapter.from_hf(hf)
    assert _equal(hf, before)
    kept = {key: value.clone() for key, value in native.items()}
    adapter.to_hf(native)
    assert _equal(native, kept)


def test_a_tensor_no_rule_knows_is_named(
    case: Case, adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    if case.family == "identity":
        pytest.skip("knows every name")
    with pytest.raises(StateDictError, match=r"model\.layers\.0\.stranger"):
        adapter.from_hf({**hf, "model.layers.0.stranger": torch.zeros(1)})
    with pytest.raises(StateDictError, match=r"layers\.0\.stranger"):
        adapter.expect_whole([*adapter.from_hf(hf), "layers.0.stranger"])


def test_every_single_tensor_that_is_lacking_is_named(
    case: Case, adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    if case.family == "identity":
        pytest.skip("any set of names is a model")
    native = adapter.from_hf(hf)
    for names, expect in ((hf, adapter.expect_whole_hf), (native, adapter.expect_whole)):
        for lacking in names:
            with pytest.raises(StateDictError, match="expects 1 ") as caught:
                expect(set(names) - {lacking})
            assert lacking.split(".")[-1] in caught.value.what


def test_part_of_a_model_can_be_renamed(adapter: StateDictAdapter, hf: dict[str, Tensor]) -> None:
    native = adapter.from_hf(hf)
    parts = [adapter.to_hf({key: tensor}) for key, tensor in native.items()]
    assert sum(len(part) for part in parts) == len(hf)
    assert _equal({key: value for part in parts for key, value in part.items()}, hf)


def _dtypes(state_dict: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {key: value.dtype for key, value in state_dict.items()}


def test_an_export_has_the_types_in_which_transformers_keeps_the_model(
    case: Case, adapter: StateDictAdapter, tmp_path: Path
) -> None:
    native = adapter.from_hf(case.hf(tmp_path / "float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    exported = StateDictTransforms(adapter=adapter, dtype="bfloat16").to_hf(native)
    cast = _dtypes(load_file(tmp_path / "bfloat16/model.safetensors"))
    # transformers keeps the routers in float32 since 5.24
    routers = {key: torch.float32 for key in cast if key.endswith("mlp.gate.weight")}
    keeps_routers = any(key.endswith("e_score_correction_bias") for key in cast)
    assert _dtypes(exported) == cast | (routers if keeps_routers else {})


@pytest.mark.parametrize("name", ["llama", "qwen3", "torchtitan_llama3"])
def test_tied_embeddings_have_no_output_of_their_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = make_adapter(case.family, case.config(tie_word_embeddings=True))
    hf = case.hf(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in hf
    native = adapter.from_hf(hf)
    assert _equal(adapter.to_hf(native), hf)
    assert native.keys() == adapter.from_hf({**hf, "lm_head.weight": torch.zeros(1)}).keys()
    for head in ("output.weight", "lm_head.weight"):
        with pytest.raises(StateDictError, match=head):
            adapter.expect_whole([*native, head])


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = CASES["deepseek_v3"]
    adapter = make_adapter(case.family, {**case.config(), "num_nextn_predict_layers": 1})
    hf = case.hf(tmp_path)
    further = {"model.layers.3.eh_proj.weight": torch.zeros(1)}
    adapter.expect_whole_hf({**hf, **further})
    assert _equal(adapter.from_hf({**hf, **further}), adapter.from_hf(hf))


def test_a_deepseek_with_rotary_halves_is_refused() -> None:
    with pytest.raises(ConfigError, match="interleaved"):
        make_adapter("deepseek_v3", CASES["deepseek_v3"].config(rope_interleave=False))


def test_every_family_that_is_listed_is_tested() -> None:
    assert set(ADAPTERS) == {case.family for case in CASES.values()}


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lama") as caught:
        make_adapter("lama", {})
    assert "llama" in caught.value.do


def test_a_config_that_lacks_a_field_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads"):
        make_adapter("llama", {})


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_native_decoder_computes_what_transformers_does(num_kv_heads: int) -> None:
    sizes = DecoderConfig(
        dim=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, ffn_dim=48, max_seq_len=64
    )
    config = hf_config(sizes, vocab_size=VOCAB_SIZE, eos_token_id=0)
    torch.manual_seed(0)
    native = Decoder(sizes, VOCAB_SIZE)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    model.load_state_dict(make_adapter("llama", config).to_hf(native.state_dict()))
    ids = torch.randint(0, VOCAB_SIZE, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(native(ids), model(ids).logits, atol=1e-4, rtol=0)
