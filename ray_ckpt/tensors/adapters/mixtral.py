"""Mixtral: experts stacked as TorchTitan does; rotary halves on both sides."""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import experts, output, rename, renames


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    num_experts = int(config["num_local_experts"])
    layer, hf = "layers.{n}.", "model.layers.{n}."
    stacked = layer + "moe.routed_experts.inner_experts."
    single = hf + "block_sparse_moe.experts.{e}."
    rules = [
        rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        *renames(
            layer,
            hf,
            {
                "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
                "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
                "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
                "attention.wo.weight": "self_attn.o_proj.weight",
                "attention_norm.weight": "input_layernorm.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
                "moe.router.gate.weight": "block_sparse_moe.gate.weight",
            },
        ),
        experts(stacked + "w1_EFD", single + "w1.weight", num_experts=num_experts),
        experts(stacked + "w2_EDF", single + "w2.weight", num_experts=num_experts),
        experts(stacked + "w3_EFD", single + "w3.weight", num_experts=num_experts),
        rename("norm.weight", "model.norm.weight"),
        output("lm_head.weight", config),
    ]
    return RuleAdapter("mixtral", rules, num_layers=int(config["num_hidden_layers"]))
