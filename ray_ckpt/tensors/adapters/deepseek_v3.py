"""DeepSeek V3: latent attention, shared and routed experts; rotary pairs interleaved on both sides.

The layers behind the last one predict further tokens (`num_nextn_predict_layers`); transformers
does not load them, and they are left out.
"""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import (
    Rule,
    experts,
    in_layers,
    left_out,
    output,
    rename,
    renames,
    uncast,
)

_LAYER, _HF_LAYER = "layers.{n}.", "model.layers.{n}."


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`.

    Raises:
        ConfigError: rotary halves or attention biases, which no released DeepSeek V3 has.
    """
    if not config.get("rope_interleave", True) or config.get("attention_bias"):
        raise ConfigError(
            "deepseek_v3 has rotary pairs interleaved and no attention bias here",
            "hf_assets: rope_interleave, attention_bias",
        )
    num_layers = int(config["num_hidden_layers"])
    num_dense = min(int(config["first_k_dense_replace"]), num_layers)
    num_further = int(config.get("num_nextn_predict_layers") or 0)
    rules = [
        rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        *_attention(config),
        *in_layers(range(num_dense), _feed_forward("feed_forward", "mlp")),
        *in_layers(range(num_dense, num_layers), _moe(config)),
        rename(_LAYER + "attention_norm.weight", _HF_LAYER + "input_layernorm.weight"),
        rename(_LAYER + "ffn_norm.weight", _HF_LAYER + "post_attention_layernorm.weight"),
        rename("norm.weight", "model.norm.weight"),
        output("lm_head.weight", config),
        *(left_out(f"model.layers.{num_layers + n}.*") for n in range(num_further)),
        left_out("*.rotary_emb.inv_freq"),
    ]
    return RuleAdapter("deepseek_v3", rules, num_layers=num_layers)


def _attention(config: Mapping[str, Any]) -> list[Rule]:
    compressed = {
        "wq_a.weight": "q_a_proj.weight",
        "q_norm.weight": "q_a_layernorm.weight",
        "wq_b.weight": "q_b_proj.weight",
    }
    names = {
        **(compressed if config.get("q_lora_rank") else {"wq.weight": "q_proj.weight"}),
        "wkv_a.weight": "kv_a_proj_with_mqa.weight",
        "kv_norm.weight": "kv_a_layernorm.weight",
        "wkv_b.weight": "kv_b_proj.weight",
        "wo.weight": "o_proj.weight",
    }
    return renames(_LAYER + "attention.", _HF_LAYER + "self_attn.", names)


def _moe(config: Mapping[str, Any]) -> list[Rule]:
    num_experts = int(config["n_routed_experts"])
    stacked = _LAYER + "moe.routed_experts.inner_experts."
    single = _HF_LAYER + "mlp.experts.{e}."
    shared = _feed_forward("moe.shared_experts", "mlp.shared_experts")
    return [
        # by tiny steps they decide whom a token is sent to: transformers does not cast them either
        uncast(rename(_LAYER + "moe.router.gate.weight", _HF_LAYER + "mlp.gate.weight")),
        uncast(
            rename(_LAYER + "moe.expert_bias_E", _HF_LAYER + "mlp.gate.e_score_correction_bias")
        ),
        experts(stacked + "w1_EFD", single + "gate_proj.weight", num_experts=num_experts),
        experts(stacked + "w2_EDF", single + "down_proj.weight", num_experts=num_experts),
        experts(stacked + "w3_EFD", single + "up_proj.weight", num_experts=num_experts),
        *(shared if config.get("n_shared_experts") else ()),
    ]


def _feed_forward(native: str, hf: str) -> list[Rule]:
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return [
        rename(f"{_LAYER}{native}.{a}.weight", f"{_HF_LAYER}{hf}.{b}.weight")
        for a, b in names.items()
    ]
