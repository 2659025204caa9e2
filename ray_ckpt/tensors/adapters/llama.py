"""Llama 2 and 3: interleaved rotary pairs natively, two halves in transformers.

`llama` has the names of Llama's own code (`attention.wq`, `output`), `torchtitan_llama3` those of
TorchTitan since 0.3 (`attention.qkv_linear.wq`, `lm_head`).
"""

from collections.abc import Mapping
from typing import Any

from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import (
    Rule,
    left_out,
    output,
    rename,
    renames,
    rotary,
)

_LAYER, _HF_LAYER = "layers.{n}.", "model.layers.{n}."


def adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The adapter for a model with this Hugging Face `config.json`."""
    return _adapter(config, qkv="attention", head="output.weight")


def torchtitan_adapter(config: Mapping[str, Any]) -> RuleAdapter:
    """The same for TorchTitan's present names."""
    return _adapter(config, qkv="attention.qkv_linear", head="lm_head.weight")


def _adapter(config: Mapping[str, Any], *, qkv: str, head: str) -> RuleAdapter:
    rules = [
        rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        *_attention(config, qkv, "weight"),
        *(_attention(config, qkv, "bias") if config.get("attention_bias") else ()),
        *_feed_forward("weight"),
        *(_feed_forward("bias") if config.get("mlp_bias") else ()),
        rename(_LAYER + "attention_norm.weight", _HF_LAYER + "input_layernorm.weight"),
        rename(_LAYER + "ffn_norm.weight", _HF_LAYER + "post_attention_layernorm.weight"),
        rename("norm.weight", "model.norm.weight"),
        output(head, config),
        left_out("*.rotary_emb.inv_freq"),  # old checkpoints hold this table
    ]
    return RuleAdapter("llama", rules, num_layers=int(config["num_hidden_layers"]))


def _attention(config: Mapping[str, Any], qkv: str, kind: str) -> list[Rule]:
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    native, hf = f"{_LAYER}{qkv}.", f"{_HF_LAYER}self_attn."
    return [
        rotary(f"{native}wq.{kind}", f"{hf}q_proj.{kind}", num_heads=num_heads),
        rotary(f"{native}wk.{kind}", f"{hf}k_proj.{kind}", num_heads=num_kv_heads),
        rename(f"{native}wv.{kind}", f"{hf}v_proj.{kind}"),
        rename(f"{_LAYER}attention.wo.{kind}", f"{hf}o_proj.{kind}"),
    ]


def _feed_forward(kind: str) -> list[Rule]:
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return renames(
        f"{_LAYER}feed_forward.",
        f"{_HF_LAYER}mlp.",
        {f"{native}.{kind}": f"{hf}.{kind}" for native, hf in names.items()},
    )
