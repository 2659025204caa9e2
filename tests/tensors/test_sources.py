"""Folders of every kind a run starts from: quantized, uneven over two ranks, and on S3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import HfAssets
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.bases import decoder_of, hf_base, module_of, open_manager, same_logits, weights
from tests.tensors.ranks import run
from tests.tensors.test_exactness import NEVER
from tests.tensors.tiny import same_tensors

# ---- quantized ----

BLOCK = 4
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 37}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 8,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def _saved(folder: Path, family: str, **sizes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that transformers would save of a tiny model, and its config."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **HEADS, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return {key: torch.randn(value.shape) for key, value in tensors.items()}, config.to_dict()


def _deepseek_in_fp8(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """What lies on disk, what it means, and the config."""
    plain, config = _saved(folder, "deepseek_v3", **LATENT)
    stored: dict[str, Tensor] = {}
    for key, weight in plain.items():
        stored[key] = weight
        if not key.endswith("_proj.weight"):
            continue
        rows, columns = (torch.arange(length) // BLOCK for length in weight.shape)
        scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) + 0.5
        stored[key] = weight.to(torch.float8_e4m3fn)
        stored[key.replace(".weight", ".weight_scale_inv")] = scales
        plain[key] = stored[key].float() * scales[rows[:, None], columns[None, :]]
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return stored, plain, {**config, "quantization_config": settings}


def _gpt_oss_in_mxfp4(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The same; what it means is what transformers makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain, config = _saved(folder, "gpt_oss", num_local_experts=3, num_experts_per_tok=2)
    stored = dict(plain)
    for key in [key for key in plain if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(key).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16)).byte()
        scales = torch.randint(120, 130, (experts, rows, columns // 32)).byte()
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        plain[key] = convert_moe_packed_tensors(blocks, scales)
    return stored, plain, {**config, "quantization_config": {"quant_method": "mxfp4"}}


def _load_sharded(
    root: str, folder: str, family: str, config: bytes, native: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """The model's tensors, whole, and how many elements this rank held."""
    model = fully_shard(module_of(native), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(model)),
        config=NEVER,
        assets=HfAssets(family=family, files={"config.json": config}),
    )
    manager.load(config=weights(folder, format="hf"))
    manager.close()
    own = model.state_dict()
    num_held = sum(value.to_local().numel() for value in own.values())
    return {key: value.full_tensor() for key, value in own.items()}, num_held


@pytest.mark.parametrize(
    ("family", "quantized"), [("deepseek_v3", _deepseek_in_fp8), ("gpt_oss", _gpt_oss_in_mxfp4)]
)
def test_a_quantized_model_is_read_as_what_it_means_and_sharded(
    root: str, tmp_path: Path, family: str, quantized: Any
) -> None:
    folder = tmp_path / "quantized"
    stored, plain, config = quantized(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    native = make_adapter(family, config).from_hf(plain)
    expected = {key: value.float() for key, value in native.items()}
    of_training = {key: value for key, value in config.items() if key != "quantization_config"}
    ranks = run(_load_sharded, root, str(folder), family, json.dumps(of_training).encode(), native)
    num_elements = sum(value.numel() for value in expected.values())
    assert sum(num_held for _, num_held in ranks) == num_elements, "nothing was replicated"
    for loaded, _ in ranks:
        assert same_tensors(loaded, expected)


# ---- on S3 ----


@pytest.mark.s3
def test_a_step_on_s3_begins_a_run(root: str, s3_root: str) -> None:
    manager, model = open_manager(s3_root)
    manager.save(1)
    manager.close()
    manager, other = open_manager(root)
    report = manager.load(config=weights(f"{s3_root}/step-1", parts=("optimizer",)))
    manager.close()
    assert report.sources == (f"base, optimizer from {s3_root}/step-1",)
    assert same_tensors(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.s3
def test_a_hugging_face_folder_on_s3_begins_a_run(root: str, s3_root: str, tmp_path: Path) -> None:
    expected = hf_base(tmp_path / "hf", max_shard_size="10KB")
    store = open_catalog(s3_root).store
    for path in (tmp_path / "hf").iterdir():
        store.write(f"llama/{path.name}", path.read_bytes())
    manager, model = open_manager(root)
    report = manager.load(config=weights(f"{s3_root}/llama", format="hf"))
    manager.close()
    assert report.sources == (f"base from {s3_root}/llama",)
    assert same_logits(decoder_of(model.state_dict()), expected)
