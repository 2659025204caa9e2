"""Which shape each tensor of a known architecture has, by its `config.json` alone.

A second opinion beside the adapters: they move tensors and know nothing of sizes.
"""

import re
from collections.abc import Mapping
from typing import Any

_SHAPES: Mapping[str, str] = {
    "model.embed_tokens.weight": "vocab hidden",
    "lm_head.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    "self_attn.q_proj.weight": "queries hidden",
    "self_attn.k_proj.weight": "keys hidden",
    "self_attn.v_proj.weight": "keys hidden",
    "self_attn.o_proj.weight": "hidden values",
    "self_attn.q_proj.bias": "queries",
    "self_attn.k_proj.bias": "keys",
    "self_attn.v_proj.bias": "keys",
    "self_attn.o_proj.bias": "hidden",
    "self_attn.q_norm.weight": "head",
    "self_attn.k_norm.weight": "head",
    "self_attn.sinks": "heads",
    "self_attn.q_a_proj.weight": "q_rank hidden",
    "self_attn.q_a_layernorm.weight": "q_rank",
    "self_attn.q_b_proj.weight": "queries q_rank",
    "self_attn.kv_a_proj_with_mqa.weight": "kv_rank+rope hidden",
    "self_attn.kv_a_layernorm.weight": "kv_rank",
    "self_attn.kv_b_proj.weight": "keys+values kv_rank",
    "mlp.gate_proj.weight": "ffn hidden",
    "mlp.up_proj.weight": "ffn hidden",
    "mlp.down_proj.weight": "hidden ffn",
    "mlp.gate_proj.bias": "ffn",
    "mlp.up_proj.bias": "ffn",
    "mlp.down_proj.bias": "hidden",
    "mlp.gate.weight": "experts hidden",
    "mlp.gate.e_score_correction_bias": "experts",
    "mlp.experts.{}.gate_proj.weight": "expert_ffn hidden",
    "mlp.experts.{}.up_proj.weight": "expert_ffn hidden",
    "mlp.experts.{}.down_proj.weight": "hidden expert_ffn",
    "mlp.shared_experts.gate_proj.weight": "shared_ffn hidden",
    "mlp.shared_experts.up_proj.weight": "shared_ffn hidden",
    "mlp.shared_experts.down_proj.weight": "hidden shared_ffn",
    "mlp.router.weight": "experts hidden",
    "mlp.router.bias": "experts",
    "mlp.experts.gate_up_proj": "experts hidden ffn+ffn",
    "mlp.experts.gate_up_proj_bias": "experts ffn+ffn",
    "mlp.experts.down_proj": "experts ffn hidden",
    "mlp.experts.down_proj_bias": "experts hidden",
    "block_sparse_moe.gate.weight": "experts hidden",
    "block_sparse_moe.experts.{}.w1.weight": "ffn hidden",
    "block_sparse_moe.experts.{}.w2.weight": "hidden ffn",
    "block_sparse_moe.experts.{}.w3.weight": "ffn hidden",
}
"""Sizes in order of dimensions; `{}` stands for a number, as `model.layers.<n>.` does before."""
_LAYER = re.compile(r"model\.layers\.\d+\.")
_NUMBER = re.compile(r"\.\d+\.")


def expected_shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of the tensor with this Hugging Face name; None where the config, or we, do not say."""
    pattern = _NUMBER.sub(".{}.", _LAYER.sub("", name, count=1))
    if pattern not in _SHAPES:
        return None
    try:
        sizes = _sizes(config)
        words = _SHAPES[pattern].split()
        return tuple(sum(sizes[part] for part in word.split("+")) for word in words)
    except KeyError:
        return None


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """What the words of the table mean for this model; a word that it has no use for is absent."""

    def number(*keys: str) -> int | None:
        return next((int(config[key]) for key in keys if config.get(key) is not None), None)

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    if heads is None or hidden is None:
        return {}
    rope, nope = number("qk_rope_head_dim"), number("qk_nope_head_dim")
    is_latent = rope is not None and nope is not None and config.get("kv_lora_rank") is not None
    head = (rope or 0) + (nope or 0) if is_latent else number("head_dim") or hidden // heads
    value = (number("v_head_dim") if is_latent else None) or head
    kv_heads = number("num_key_value_heads") or heads
    expert_ffn = number("moe_intermediate_size")
    shared = number("n_shared_experts")
    found = {
        "vocab": number("vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "head": head,
        "queries": heads * head,
        "keys": heads * (nope or 0) if is_latent else kv_heads * head,
        "values": heads * value,
        "ffn": number("intermediate_size"),
        "experts": number("n_routed_experts", "num_experts", "num_local_experts"),
        "expert_ffn": expert_ffn,
        "shared_ffn": shared * expert_ffn if shared and expert_ffn else None,
        "q_rank": number("q_lora_rank"),
        "kv_rank": number("kv_lora_rank"),
        "rope": rope,
    }
    return {word: size for word, size in found.items() if size is not None}
