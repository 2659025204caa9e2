"""Models as they are built: in parts, tied, wrapped; saved and restored by the manager."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from tests.tensors.kept import load, manager_of, same, save, values_of, whole
from tests.tensors.ranks import run
from tests.tensors.tiny import same_tensors

# ---- asked once ----


class _Root(nn.Module):
    """Counts how often its state dict is asked for, as the whole model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.num_calls = 0
        self.add_module(name, nn.Linear(3, 3))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().state_dict(*args, **kwargs)


def test_each_part_is_asked_once_a_save_and_once_a_load_and_never_before(tmp_path: Path) -> None:
    parts = [_Root("front"), _Root("back")]
    manager, _ = manager_of(tmp_path, list(parts), trained=True)
    calls = [[part.num_calls for part in parts]]
    actions: list[Callable[[], Any]] = [
        manager.load,  # of nothing
        lambda: manager.save(1),
        lambda: manager.save(2),
        manager.close,
    ]
    for act in actions:
        act()
        calls.append([part.num_calls for part in parts])
    again = [_Root("front"), _Root("back")]
    manager, _ = manager_of(tmp_path, list(again))
    manager.load()
    manager.close()
    assert calls == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 2]]
    assert [part.num_calls for part in again] == [1, 1]


def test_no_tensor_is_held_between_two_calls() -> None:
    wrapper = ModelWrapper(_plain(0))
    for _ in range(2):
        tensors = wrapper.state_dict()
        wrapper.load_state_dict(tensors)
        watched = [weakref.ref(tensor) for tensor in tensors.values()]
        del tensors
        gc.collect()
        assert [ref() for ref in watched] == [None] * 6


def test_a_buffer_that_is_not_persistent_is_neither_saved_nor_asked_for(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.ones(2), persistent=False)
        model.register_buffer("mean", torch.randn(2))
        return model

    saved, loaded = make(), make()
    save(tmp_path, saved)
    manifest = open_catalog(str(tmp_path)).manifest(1)
    assert manifest.model is not None
    assert manifest.model.keys == ("bias", "mean", "weight")
    load(tmp_path, loaded)
    assert same_tensors(values_of(loaded), values_of(saved))


# ---- tied ----


def _tied_llama(seed: int, *, is_sharded: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    if is_sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _save_and_load_tied(root: str, is_sharded: bool) -> None:
    saved, loaded = (_tied_llama(seed, is_sharded=is_sharded) for seed in (1, 2))
    assert not torch.equal(whole(saved.lm_head.weight), whole(loaded.lm_head.weight))
    moments = save(root, saved)
    assert same(load(root, loaded), moments)
    assert same_tensors(values_of(loaded), values_of(saved))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    manifest = open_catalog(root).manifest(1)
    assert manifest.model is not None
    assert manifest.model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in {tensor.name for tensor in manifest.tensors}
    assert "model.embed_tokens.weight" in manifest.model.keys


def test_a_tied_weight_is_saved_once_and_restored_tied(root: str) -> None:
    _save_and_load_tied(root, is_sharded=False)


def test_a_tied_weight_under_fsdp_is_saved_once_and_restored_tied(root: str) -> None:
    run(_save_and_load_tied, root, True)


# ---- wrapped ----


def _plain(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 2))


def _wrapped(seed: int) -> nn.Module:
    model = _plain(seed)
    model[0] = checkpoint_wrapper(model[0])
    model[1][0] = torch.compile(model[1][0])
    return torch.compile(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize(("make", "other"), [(_wrapped, _plain), (_plain, _wrapped)])
def test_what_was_saved_wrapped_is_loaded_unwrapped_and_the_other_way(
    tmp_path: Path, make: Callable[[int], nn.Module], other: Callable[[int], nn.Module]
) -> None:
    saved, loaded = make(1), other(2)
    moments = save(tmp_path, saved)
    names = {tensor.name for tensor in open_catalog(str(tmp_path)).manifest(1).tensors}
    assert not [name for name in names if "_orig_mod" in name or "_wrapped_module" in name]
    assert "optimizer.state.1.0.weight.exp_avg" in names
    assert same(load(tmp_path, loaded), moments)
    assert same(list(values_of(loaded).values()), list(values_of(saved).values()))
