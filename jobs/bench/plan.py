"""What it takes to plan the exports of two large models: names and shapes alone, no data."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.export_plan import plan_model
from ray_ckpt.tensors.plan_reads import node_read_bytes
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.transforms import StateDictTransforms

Shapes = dict[str, tuple[int, ...]]
LLAMA_3_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What it took to plan one export to bfloat16, and what the nodes that make it will read."""

    model: str
    num_inputs: int
    num_outputs: int
    wall_s: float
    cpu_s: float
    extra_mb: float
    """How much the resident memory grew, in a process of its own."""
    num_files: int
    node_read_gb: float
    """Of the node that reads the most, when the files are spread evenly over so many nodes."""
    read_ratio: float
    """Of all bytes that are read to those of the model in float32: 1.0 is each of them once."""


MODELS = {
    "llama-3-405b": ("llama", LLAMA_3_405B),
    "deepseek-v3": ("deepseek_v3", DEEPSEEK_V3),
}
"""Name to family and config."""


def measure_plans(num_layers: int | None, *, num_nodes: int) -> list[Planned]:
    """One plan a model, each in a new process, so that peaks of memory do not hide each other."""
    shorter = {} if num_layers is None else {"num_hidden_layers": num_layers}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        waiting = [
            processes.submit(measure_plan, model, family, config | shorter, num_nodes=num_nodes)
            for model, (family, config) in MODELS.items()
        ]
        return [one.result() for one in waiting]


def measure_plan(model: str, family: str, config: Mapping[str, Any], *, num_nodes: int) -> Planned:
    """From a config to the plan of the whole export, looked at as every plan is."""
    specs = {
        name: TensorSpec(shape=shape, dtype=torch.float32)
        for name, shape in _SHAPES[family](config).items()
    }
    resident_bytes = _resident_bytes()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    transforms = StateDictTransforms(adapter=make_adapter(family, config), dtype="bfloat16")
    made = plan_model(transforms, specs, config)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    extra_mb = (_resident_bytes() - resident_bytes) / 1e6
    read_bytes = node_read_bytes(made, num_nodes)
    return Planned(
        model=model,
        num_inputs=len(specs),
        num_outputs=len(made.recording.outputs),
        wall_s=wall_s,
        cpu_s=cpu_s,
        extra_mb=extra_mb,
        num_files=len(made.shards),
        node_read_gb=max(read_bytes) / 1e9,
        read_ratio=sum(read_bytes) / sum(spec.size_bytes for spec in specs.values()),
    )


def _resident_bytes() -> int:
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * resource.getpagesize()


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """Native names and shapes of a Llama."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_dim = dim // heads * config["num_key_value_heads"]
    layer = {
        "attention.wq.weight": (dim, dim),
        "attention.wk.weight": (kv_dim, dim),
        "attention.wv.weight": (kv_dim, dim),
        "attention.wo.weight": (dim, dim),
        **_feed_forward("feed_forward", dim, config["intermediate_size"]),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    layers = _in_layers(range(config["num_hidden_layers"]), layer)
    return {**layers, **_ends(config), "output.weight": (config["vocab_size"], dim)}


def deepseek_shapes(config: Mapping[str, Any]) -> Shapes:
    """Native names and shapes of a DeepSeek V3."""
    dim, heads, experts = (
        config[key] for key in ("hidden_size", "num_attention_heads", "n_routed_experts")
    )
    q_rank, kv_rank, rope = (
        config[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, value, ffn = (
        config[key] for key in ("qk_nope_head_dim", "v_head_dim", "moe_intermediate_size")
    )
    attention = {
        "attention.wq_a.weight": (q_rank, dim),
        "attention.q_norm.weight": (q_rank,),
        "attention.wq_b.weight": (heads * (nope + rope), q_rank),
        "attention.wkv_a.weight": (kv_rank + rope, dim),
        "attention.kv_norm.weight": (kv_rank,),
        "attention.wkv_b.weight": (heads * (nope + value), kv_rank),
        "attention.wo.weight": (dim, heads * value),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    moe = {
        "moe.router.gate.weight": (experts, dim),
        "moe.expert_bias_E": (experts,),
        "moe.routed_experts.inner_experts.w1_EFD": (experts, ffn, dim),
        "moe.routed_experts.inner_experts.w2_EDF": (experts, dim, ffn),
        "moe.routed_experts.inner_experts.w3_EFD": (experts, ffn, dim),
        **_feed_forward("moe.shared_experts", dim, ffn),
    }
    num_layers, num_dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    dense = _feed_forward("feed_forward", dim, config["intermediate_size"])
    return {
        **_in_layers(range(num_layers), attention),
        **_in_layers(range(min(num_dense, num_layers)), dense),
        **_in_layers(range(num_dense, num_layers), moe),
        **_ends(config),
        "lm_head.weight": (config["vocab_size"], dim),
    }


_SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "llama": llama_shapes,
    "deepseek_v3": deepseek_shapes,
}


def _feed_forward(name: str, dim: int, ffn_dim: int) -> Shapes:
    return {
        f"{name}.w1.weight": (ffn_dim, dim),
        f"{name}.w2.weight": (dim, ffn_dim),
        f"{name}.w3.weight": (ffn_dim, dim),
    }


def _ends(config: Mapping[str, Any]) -> Shapes:
    dim = config["hidden_size"]
    return {"tok_embeddings.weight": (config["vocab_size"], dim), "norm.weight": (dim,)}


def _in_layers(layers: range, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"layers.{n}.{name}": shape for n in layers for name, shape in shapes.items()}
