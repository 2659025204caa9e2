"""GPT-OSS, in transformers' own 16-bit form: experts stacked and gate and up fused on both sides.

Natively each expert's weight is [out, in], in transformers [in, out]. For the MXFP4 form on the
Hub see `tensors.quantized`, which makes this one of it.
"""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import output, rename, renames, transpose

_ATTENTION_BIASES = {
    "qkv_linear.wq.bias": "q_proj.bias",
    "qkv_linear.wk.bias": "k_proj.bias",
    "qkv_linear.wv.bias": "v_proj.bias",
    "wo.bias": "o_proj.bias",
}


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    biases = _ATTENTION_BIASES if config.get("attention_bias", True) else {}
    layer, hf = "layers.{n}.", "model.layers.{n}."
    native, stacked = layer + "moe.routed_experts.inner_experts.", hf + "mlp.experts."
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
                "sinks": "sinks",
                **biases,
            },
        ),
        transpose(native + "mlp1_weight_EGD", stacked + "gate_up_proj"),
        rename(native + "mlp1_bias_EG", stacked + "gate_up_proj_bias"),
        transpose(native + "mlp2_weight_EDF", stacked + "down_proj"),
        rename(native + "mlp2_bias_ED", stacked + "down_proj_bias"),
        *renames(
            layer,
            hf,
            {
                "moe.router.gate.weight": "mlp.router.weight",
                "moe.router.gate.bias": "mlp.router.bias",
                "attention_norm.weight": "input_layernorm.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
            },
        ),
        rename("norm.weight", "model.norm.weight"),
        output("lm_head.weight", config),
    ]
    return RuleAdapter("gpt_oss", rules, num_layers=int(config["num_hidden_layers"]))
