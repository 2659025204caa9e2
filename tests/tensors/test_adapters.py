"""Every family that is listed: total in both directions, and the very model transformers knows.

To add a family: a line in CONFIGS with the config of a tiny model.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from jobs.decoder import Decoder, DecoderConfig, hf_config
from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.adapters import ADAPTERS, StateDictAdapter, make_adapter

VOCAB_SIZE = 37
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
    },
}
CLASSES: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig}


def _hf_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """What `save_pretrained` would write: shared tensors once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CLASSES[config["model_type"]](**config))
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    tensors = {key: value for key, value in model.state_dict().items() if key not in tied}
    return {key: torch.randn_like(value) for key, value in tensors.items()}


@pytest.fixture(params=ADAPTERS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


@pytest.fixture
def adapter(config: dict[str, Any]) -> StateDictAdapter:
    return make_adapter(config["model_type"], config)


@pytest.fixture
def hf(config: dict[str, Any]) -> dict[str, Tensor]:
    return _hf_tensors(config)


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_from_hugging_face_and_back_is_the_same_bit_for_bit(
    adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    native = adapter.from_hf(hf)
    assert len(native) == len(hf)
    assert _equal(adapter.to_hf(native), hf)
    assert {hf_name for hf_name in adapter.sources(native)} == set(hf)


def test_the_input_is_left_as_it_was(adapter: StateDictAdapter, hf: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in hf.items()}
    native = adapter.from_hf(hf)
    assert _equal(hf, before)
    kept = {key: value.clone() for key, value in native.items()}
    adapter.to_hf(native)
    assert _equal(native, kept)


def test_a_tensor_no_rule_knows_is_named(adapter: StateDictAdapter, hf: dict[str, Tensor]) -> None:
    with pytest.raises(StateDictError, match=r"model\.layers\.0\.stranger"):
        adapter.from_hf({**hf, "model.layers.0.stranger": torch.zeros(1)})
    with pytest.raises(StateDictError, match=r"layers\.0\.stranger"):
        adapter.sources([*adapter.from_hf(hf), "layers.0.stranger"])


def test_a_kind_of_tensor_that_is_lacking_is_named(
    adapter: StateDictAdapter, hf: dict[str, Tensor]
) -> None:
    keys = [key for key in adapter.from_hf(hf) if not key.endswith("ffn_norm.weight")]
    with pytest.raises(StateDictError, match="ffn_norm"):
        adapter.sources(keys)


def test_part_of_a_model_can_be_renamed(adapter: StateDictAdapter, hf: dict[str, Tensor]) -> None:
    native = adapter.from_hf(hf)
    for hf_name, sources in adapter.sources(native).items():
        part = adapter.to_hf({key: native[key] for key in sources})
        assert _equal(part, {hf_name: hf[hf_name]})


def test_tied_embeddings_have_no_output_of_their_own(config: dict[str, Any]) -> None:
    tied = {**config, "tie_word_embeddings": True}
    adapter = make_adapter(config["model_type"], tied)
    hf = _hf_tensors(tied)
    native = adapter.from_hf(hf)
    assert _equal(adapter.to_hf(native), hf)
    with pytest.raises(StateDictError, match="output"):
        adapter.sources([*native, "output.weight"])


def test_every_family_that_is_listed_is_tested() -> None:
    assert set(ADAPTERS) == set(CONFIGS) == set(CLASSES)


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="llama") as caught:
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
