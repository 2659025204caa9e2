"""Models whose state dict is no list of their parameters: fused ones, chunks of a pipeline."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ray_ckpt.core.errors import RayCkptError, StateDictError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.staging import HostMemory, Stager
from tests.tensors.kept import load, manager_of, same, save, values_of, whole
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of, same_tensors

# ---- fused ----


class _Fused(nn.Module):
    """One projection for queries, keys and values, which a state dict holds apart."""

    NAMES = ("wq.weight", "wk.weight", "wv.weight")

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(4, 8 + 4 + 4, bias=False)
        self.wo = nn.Linear(8, 4, bias=False)
        self.register_state_dict_post_hook(_Fused._split)
        self.register_load_state_dict_pre_hook(_Fused._merge)

    @staticmethod
    def _split(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
        parts = whole(tensors.pop(f"{prefix}wqkv.weight")).split((8, 4, 4))
        tensors.update(zip((prefix + name for name in _Fused.NAMES), parts, strict=True))

    @staticmethod
    def _merge(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        merged = torch.cat([tensors.pop(prefix + name) for name in _Fused.NAMES])
        own = module.wqkv.weight
        if isinstance(own, DTensor):
            merged = distribute_tensor(merged, own.device_mesh, own.placements)
        tensors[f"{prefix}wqkv.weight"] = merged


def _save_and_load_fused(root: str) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(_Fused(), _Fused())
        models.append(fully_shard(model) if dist.is_initialized() else model)
    saved, loaded = models
    before = values_of(saved)
    moments = save(root, saved)
    assert not same_tensors(values_of(saved), before)  # it was trained
    assert same(load(root, loaded), moments)
    assert same_tensors(values_of(loaded), values_of(saved))
    assert torch.equal(whole(loaded[1].wqkv.weight), whole(saved[1].wqkv.weight))


def test_tensors_that_hooks_make_are_saved_apart_and_restored_as_one(root: str) -> None:
    _save_and_load_fused(root)
    names = {tensor.name for tensor in open_catalog(root).manifest(1).tensors}
    assert {"0.wq.weight", "1.wv.weight", "optimizer.state.0.wqkv.weight.exp_avg"} <= names
    assert "0.wqkv.weight" not in names


def test_tensors_that_hooks_make_of_shards_too(root: str) -> None:
    run(_save_and_load_fused, root)


def test_tensors_that_hooks_make_anew_find_their_buffers_again() -> None:
    model = _Fused()
    wrapper, stager = ModelWrapper(model), Stager(HostMemory.PLAIN)
    first = {key: value.data_ptr() for key, value in stager.stage(wrapper.state_dict()).items()}
    segments = stager.segments
    with torch.no_grad():
        model.wqkv.weight.add_(1)
    second = stager.stage(wrapper.state_dict())
    assert {key: value.data_ptr() for key, value in second.items()} == first
    assert stager.segments == segments
    assert torch.equal(second["wq.weight"], model.wqkv.weight[:8])
    stager.close()


# ---- pipeline ----


def _chunk(rank: int, seed: int, *, extra: str | None = None) -> nn.Module:
    torch.manual_seed(10 * seed + rank)
    model = nn.Module()
    model.add_module("front" if rank == 0 else "back", nn.Linear(3, 3))
    if extra is not None:
        model.add_module(extra, nn.Linear(1, 1))
    return model


def _save_chunk(root: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    model = _chunk(dist.get_rank(), 1)
    moments = save(root, model)
    return values_of(model), moments


def _load_chunk(root: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    model = _chunk(dist.get_rank(), 2)
    moments = load(root, model)
    return values_of(model), moments


def _load_chunk_and_more(root: str) -> tuple[RayCkptError | None, bool]:
    model = _chunk(dist.get_rank(), 2, extra="side" if dist.get_rank() == 1 else None)
    before = values_of(model)
    manager, _ = manager_of(root, model)
    error = error_of(manager.load)
    manager.close()
    return error, same_tensors(values_of(model), before)


def test_chunks_of_a_pipeline_are_one_model_for_those_and_for_one_process(root: str) -> None:
    saved = run(_save_chunk, root)
    manifest = open_catalog(root).manifest(1)
    assert manifest.model is not None
    assert manifest.model.keys == ("back.bias", "back.weight", "front.bias", "front.weight")
    both = [_chunk(0, 3), _chunk(1, 3)]
    moments = load(root, both)
    assert same_tensors(
        {**values_of(both[0]), **values_of(both[1])}, {**saved[0][0], **saved[1][0]}
    )
    assert same(moments, [*saved[0][1], *saved[1][1]])
    for error, is_unchanged in run(_load_chunk_and_more, root):
        assert isinstance(error, StateDictError)
        assert "lacks 2 tensors (side.bias, side.weight)" in error.what
        assert is_unchanged


def _save_tied_chunk(root: str) -> None:
    model = _chunk(dist.get_rank(), 1, extra="twin")
    if dist.get_rank() == 1:
        model.twin, model.back.bias = nn.Linear(3, 3), None
        model.twin.weight = model.back.weight
    else:
        del model.twin
    save(root, model)


def test_names_that_share_a_tensor_in_any_chunk_of_a_pipeline_are_told(root: str) -> None:
    run(_save_tied_chunk, root)
    model = open_catalog(root).manifest(1).model
    assert model is not None
    assert model.keys == ("back.weight", "front.bias", "front.weight", "twin.bias")
    assert model.tied == {"twin.weight": "back.weight"}


def _save_replicated(root: str) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    save(root, DistributedDataParallel(model))
    return values_of(model)


def test_a_model_under_data_parallel_is_saved_under_its_own_names(root: str) -> None:
    saved, _ = run(_save_replicated, root)
    loaded = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    load(root, loaded)
    assert same_tensors(values_of(loaded), saved)


def test_each_rank_of_a_pipeline_loads_its_own_chunk(root: str) -> None:
    saved, loaded = run(_save_chunk, root), run(_load_chunk, root)
    for (values, moments), (own_values, own_moments) in zip(saved, loaded, strict=True):
        assert same_tensors(own_values, values)
        assert same(own_moments, moments)
