"""Llama 2 and 3: TorchTitan's names and rotary pairs to transformers' names and halves."""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rules import RuleAdapter, rename, rotary


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads", num_heads))
    layer, hf = "layers.{n}.", "model.layers.{n}."
    rules = [
        rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        rotary(layer + "attention.wq.weight", hf + "self_attn.q_proj.weight", num_heads=num_heads),
        rotary(
            layer + "attention.wk.weight", hf + "self_attn.k_proj.weight", num_heads=num_kv_heads
        ),
        rename(layer + "attention.wv.weight", hf + "self_attn.v_proj.weight"),
        rename(layer + "attention.wo.weight", hf + "self_attn.o_proj.weight"),
        rename(layer + "feed_forward.w1.weight", hf + "mlp.gate_proj.weight"),
        rename(layer + "feed_forward.w2.weight", hf + "mlp.down_proj.weight"),
        rename(layer + "feed_forward.w3.weight", hf + "mlp.up_proj.weight"),
        rename(layer + "attention_norm.weight", hf + "input_layernorm.weight"),
        rename(layer + "ffn_norm.weight", hf + "post_attention_layernorm.weight"),
        rename("norm.weight", "model.norm.weight"),
    ]
    if not config.get("tie_word_embeddings", False):
        rules.append(rename("output.weight", "lm_head.weight"))
    return RuleAdapter("llama", rules)
