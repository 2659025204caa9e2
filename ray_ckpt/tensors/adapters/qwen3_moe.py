"""Qwen3 with experts: TorchTitan stacks them, Hugging Face has a tensor for each.

TorchTitan's `expert_bias_E` (auxiliary-loss-free balancing) has no place in this architecture: a
model that was trained with it is refused rather than exported as another model.
"""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import experts, in_layers, output, rename, renames


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    num_layers = int(config["num_hidden_layers"])
    num_experts = int(config.get("num_experts") or config["num_local_experts"])
    sparse = [n for n in range(num_layers) if _has_experts(config, n)]
    layer, hf = "layers.{n}.", "model.layers.{n}."
    stacked, single = layer + "moe.routed_experts.inner_experts.", hf + "mlp.experts.{e}."
    moe = [
        rename(layer + "moe.router.gate.weight", hf + "mlp.gate.weight"),
        experts(stacked + "w1_EFD", single + "gate_proj.weight", num_experts=num_experts),
        experts(stacked + "w2_EDF", single + "down_proj.weight", num_experts=num_experts),
        experts(stacked + "w3_EFD", single + "up_proj.weight", num_experts=num_experts),
    ]
    dense = renames(
        layer + "feed_forward.",
        hf + "mlp.",
        {
            "w1.weight": "gate_proj.weight",
            "w2.weight": "down_proj.weight",
            "w3.weight": "up_proj.weight",
        },
    )
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
                "attention.q_norm.weight": "self_attn.q_norm.weight",
                "attention.k_norm.weight": "self_attn.k_norm.weight",
                "attention_norm.weight": "input_layernorm.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
            },
        ),
        *in_layers(sparse, moe),
        *in_layers(sorted(set(range(num_layers)) - set(sparse)), dense),
        rename("norm.weight", "model.norm.weight"),
        output("lm_head.weight", config),
    ]
    return RuleAdapter("qwen3_moe", rules, num_layers=num_layers)


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    every = int(config.get("decoder_sparse_step") or 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % every == 0
