"""What a save may rely on: a true copy, apart from training, in memory that is used again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from ray_ckpt.core.errors import StateDictError, UsageError
from ray_ckpt.tensors.staging import HostMemory, Stager, map_segment, tensor_at
from tests.tensors.ranks import run

HOST_ONLY = [HostMemory.PLAIN, HostMemory.SHARED]


@pytest.fixture(params=HOST_ONLY)
def stager(request: pytest.FixtureRequest) -> Stager:
    return Stager(request.param)


class Attention(nn.Module):
    """Keeps q, k and v fused and shows them apart, in tensors that are new at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))
        self.register_state_dict_post_hook(self._split)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        fused = state.pop(f"{prefix}qkv")
        for name, part in zip("qkv", fused.chunk(3), strict=True):
            state[f"{prefix}{name}"] = part.clone()


def pointers(state: dict[str, Any]) -> dict[str, int]:
    return {key: _local(value).data_ptr() for key, value in state.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(left: Tensor, right: Tensor) -> bool:
    """Bits, not numbers: NaN equals itself."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and (
            left.contiguous().flatten().view(torch.uint8).tolist()
            == right.contiguous().flatten().view(torch.uint8).tolist()
        )
    )


# ---- values ----


def test_a_staged_state_stays_what_it_was_while_training_goes_on(stager: Stager) -> None:
    model = nn.Linear(64, 64)
    before = copy.deepcopy(model.state_dict())
    staged = stager.stage({"model": model.state_dict(), "lr": [0.1, {"warm": True}]})
    with torch.no_grad():
        model.weight.add_(1.0)
    assert all(same(staged["model"][key], before[key]) for key in before)
    assert staged["lr"] == [0.1, {"warm": True}]


TENSORS: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.tensor(2.5),
    "no elements": lambda: torch.empty(0, 7, dtype=torch.bfloat16),
    "transposed": lambda: torch.randn(5, 3).t(),
    "every second row": lambda: torch.randn(8, 3)[::2],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "a slice of a larger storage": lambda: torch.randn(100)[10:13],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "bool": lambda: torch.tensor([True, False, True]),
    "float8": lambda: torch.randn(9).to(torch.float8_e4m3fn),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "a parameter": lambda: nn.Parameter(torch.randn(3)),
    "a NaN": lambda: torch.tensor([float("nan"), 1.0]),
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_every_kind_of_tensor_is_copied_bit_for_bit(
    stager: Stager, make: Callable[[], Tensor]
) -> None:
    source = make()
    staged = stager.stage({"x": source})["x"]
    assert same(staged, source.detach().resolve_conj())
    assert staged.stride() == source.detach().clone().stride()
    assert type(staged) is Tensor
    assert not staged.requires_grad
    assert staged.untyped_storage().nbytes() == staged.nbytes, "torch.save writes whole storages"


def test_keys_that_share_a_storage_are_each_right(stager: Stager) -> None:
    whole = torch.arange(12.0).view(3, 4)
    staged = stager.stage({"tied": whole, "also": whole, "row": whole[1], "column": whole[:, 2]})
    assert same(staged["tied"], whole)
    assert same(staged["also"], whole)
    assert staged["row"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert staged["column"].tolist() == [2.0, 6.0, 10.0]


class Pair(NamedTuple):
    left: Tensor
    right: int


def test_containers_keep_their_kind_and_order(stager: Stager) -> None:
    state = {
        "b": (torch.ones(2), [torch.zeros(1), {"deep": torch.ones(1)}]),
        "a": Pair(torch.ones(3), 7),
        "n": None,
        "empty": {},
    }
    staged = stager.stage(state)
    assert list(staged) == list(state)
    assert type(staged["a"]) is Pair
    assert staged["a"].right == 7
    assert same(staged["a"].left, torch.ones(3))
    assert same(staged["b"][1][1]["deep"], torch.ones(1))
    assert isinstance(staged["b"], tuple)
    assert staged["n"] is None


def test_what_is_not_a_tensor_is_a_copy_of_its_own(stager: Stager) -> None:
    class Position:
        def __init__(self) -> None:
            self.seen = [1, 2]

    position = Position()
    staged = stager.stage({"position": position})
    position.seen.append(3)
    assert staged["position"].seen == [1, 2]


def test_a_tensor_made_of_tensors_keeps_its_class(stager: Stager) -> None:
    source = TwoTensor(torch.ones(3), torch.zeros(3))
    staged = [stager.stage({"x": source})["x"] for _ in range(2)]
    assert type(staged[0]) is TwoTensor
    assert same(staged[0].a, torch.ones(3))
    assert same(staged[0].b, torch.zeros(3))
    assert staged[0].a.data_ptr() == staged[1].a.data_ptr() != source.a.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"]
)
def test_a_tensor_without_plain_memory_is_refused_by_name(stager: Stager, tensor: Tensor) -> None:
    with pytest.raises(StateDictError, match=r"optimizer\.x cannot be saved"):
        stager.stage({"optimizer": {"x": tensor}})


# ---- memory ----


def test_buffers_are_used_again_also_for_tensors_that_a_hook_makes(stager: Stager) -> None:
    model = Attention()
    first = stager.stage(model.state_dict())
    held_bytes, places = stager.num_bytes, pointers(first)
    for _ in range(5):
        with torch.no_grad():
            model.qkv.add_(1.0)
        staged = stager.stage(model.state_dict())
        assert pointers(staged) == places
        assert same(torch.cat(list(staged.values())), model.qkv.detach())
    assert stager.num_bytes == held_bytes


def test_a_key_of_another_shape_gets_another_buffer_and_the_others_keep_theirs(
    stager: Stager,
) -> None:
    first = pointers(stager.stage({"a": torch.ones(4000), "b": torch.ones(10)}))
    second = pointers(stager.stage({"a": torch.ones(4000), "b": torch.ones(11)}))
    third = pointers(stager.stage({"a": torch.ones(4000), "b": torch.ones(11).int()}))
    assert first["a"] == second["a"] == third["a"]
    assert len({first["b"], second["b"], third["b"]}) == 3


def test_a_key_that_grows_forever_does_not_make_memory_grow(stager: Stager) -> None:
    for length in range(1, 100):
        stager.stage({"a": torch.ones(1000), "b": torch.ones(length)})
    assert stager.num_bytes <= 2 * 4000 + 1024


def test_keys_that_are_gone_take_no_memory(stager: Stager) -> None:
    stager.stage({"a": torch.ones(100_000), "b": torch.ones(10)})
    staged = stager.stage({"b": torch.ones(10)})
    assert stager.num_bytes < 1024
    assert same(staged["b"], torch.ones(10))
    stager.stage({})
    assert stager.num_bytes == 0


def test_a_closed_stager_holds_nothing_and_what_it_staged_is_still_there(stager: Stager) -> None:
    staged = stager.stage({"a": torch.ones(1000)})
    stager.close()
    assert stager.num_bytes == 0
    assert same(staged["a"], torch.ones(1000))


def test_another_mapping_of_shared_memory_shows_the_same_bytes() -> None:
    stager = Stager(HostMemory.SHARED)
    staged = stager.stage({"a": torch.ones(3), "b": torch.arange(6).view(2, 3).t()})
    (segment,) = stager.segments
    mapping = map_segment(segment.descriptor, segment.num_bytes)
    slot = stager.slot(staged["b"])
    assert slot.segment == segment.number
    assert same(tensor_at(mapping, slot.offset_bytes, slot.layout), staged["b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_pinned_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="CUDA"):
        Stager(HostMemory.PINNED)


# ---- sharded ----


def sharded_model() -> nn.Module:
    """FSDP2 over all ranks, of odd sizes: the last layer leaves rank 1 without a row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _stage_sharded() -> None:
    model, stager = sharded_model(), Stager(HostMemory.PLAIN)
    first = stager.stage(model.state_dict())
    places = pointers(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    expected = {key: value.to_local().clone() for key, value in model.state_dict().items()}
    staged = stager.stage(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert pointers(staged) == places
    assert all(staged[key] is first[key] for key in staged)
    for key, source in model.state_dict().items():
        copied = staged[key]
        assert isinstance(copied, DTensor)
        assert copied.device_mesh is source.device_mesh
        assert copied.placements == source.placements
        assert (copied.shape, copied.stride()) == (source.shape, source.stride())
        assert same(copied.to_local(), expected[key])
        assert copied.__create_chunk_list__() == source.__create_chunk_list__()
    assert any(not v.to_local().numel() for v in staged.values()) == (dist.get_rank() == 1)


def test_sharded_tensors_stay_sharded() -> None:
    run(_stage_sharded, num_ranks=2)


def _stage_in_another_way() -> None:
    """The same part of another whole: with as many rows on each rank, all or half of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stager, rows = Stager(HostMemory.PLAIN), torch.ones(2, 3)
    for placement, shape in ((Shard(0), (4, 3)), (Replicate(), (2, 3)), (Shard(1), (2, 6))):
        source = DTensor.from_local(rows, mesh, [placement])
        staged = stager.stage({"x": source})["x"]
        assert (staged.placements, tuple(staged.shape)) == ((placement,), shape)


def test_a_tensor_that_is_sharded_anew_is_staged_anew() -> None:
    run(_stage_in_another_way, num_ranks=2)


def _stage_what_is_on_its_way() -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = funcol.all_reduce(torch.full((3,), 1.0 + dist.get_rank()), "sum", mesh)
    return Stager(HostMemory.PLAIN).stage({"x": tensor})["x"].tolist()


def test_a_tensor_that_a_collective_still_brings_is_waited_for() -> None:
    assert run(_stage_what_is_on_its_way, num_ranks=2) == [[3.0, 3.0, 3.0]] * 2


# ---- with a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", list(HostMemory))
def test_a_gpu_state_is_copied_after_what_it_waits_for(memory: HostMemory, tmp_path: Path) -> None:
    stager = Stager(memory)
    weight = torch.zeros(4096, 4096, device="cuda")
    places, staged = None, {}
    for turn in range(1, 4):
        for _ in range(50):
            weight.add_(1.0)  # still running when the copy is asked for
        staged = stager.stage({"a": weight, "t": weight[:8].t(), "host": torch.ones(3)})
        weight.add_(0.0)
        assert torch.equal(staged["a"], torch.full((4096, 4096), 50.0 * turn))
        assert torch.equal(staged["t"], torch.full((4096, 8), 50.0 * turn))
        assert staged["a"].is_pinned() == (memory is not HostMemory.PLAIN)
        assert places in (None, pointers(staged))
        places = pointers(staged)
    stager.close()
    assert not staged["a"].is_pinned()
