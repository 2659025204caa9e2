"""Qwen3, dense: TorchTitan's names; rotary halves on both sides, so that no row moves."""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import output, rename, renames

_ATTENTION_BIASES = {
    "qkv_linear.wq.bias": "q_proj.bias",
    "qkv_linear.wk.bias": "k_proj.bias",
    "qkv_linear.wv.bias": "v_proj.bias",
    "wo.bias": "o_proj.bias",
}


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    biases = _ATTENTION_BIASES if config.get("attention_bias") else {}
    layer, hf = "layers.{n}.", "model.layers.{n}."
    rules = [
        rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        *renames(
            layer + "attention.",
            hf + "self_attn.",
            {
                "qkv_linear.wq.weight": "q_proj.weight",
                "qkv_linear.wk.weight": "k_proj.weight",
                "qkv_linear.wv.weight": "v_proj.weight",
                "wo.weight": "o_proj.weight",
                "q_norm.weight": "q_norm.weight",
                "k_norm.weight": "k_norm.weight",
                **biases,
            },
        ),
        *renames(
            layer,
            hf,
            {
                "feed_forward.w1.weight": "mlp.gate_proj.weight",
                "feed_forward.w2.weight": "mlp.down_proj.weight",
                "feed_forward.w3.weight": "mlp.up_proj.weight",
                "attention_norm.weight": "input_layernorm.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
            },
        ),
        rename("norm.weight", "model.norm.weight"),
        output("lm_head.weight", config),
    ]
    return RuleAdapter("qwen3", rules, num_layers=int(config["num_hidden_layers"]))
