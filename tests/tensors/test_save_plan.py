"""The plan of all ranks is DCP's, but for who writes what several of them hold."""

import pickle
from collections import Counter

import numpy as np
import pytest
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.index import read_foreign_metadata
from ray_ckpt.tensors.metadata_file import MetadataFile
from ray_ckpt.tensors.save_layout import Places
from ray_ckpt.tensors.save_plan import GlobalPlan
from ray_ckpt.tensors.step_index import StepIndex
from tests.tensors.plans import plan_of, planned, rows_of, shard, tensor, value


def fsdp(rank: int, num_ranks: int) -> list[WriteItem]:
    """Every rank has a part of the weights, and all of what is small; some ranks have no row."""
    return [
        *(rows_of(f"layers.{n}.weight", (5 * n + 1, 3), rank, num_ranks) for n in range(9)),
        rows_of("experts", (4, 8, 2), rank, num_ranks, dimension=1),
        rows_of("odd", (0, 3), rank, num_ranks),
        tensor("norm", 7),
        tensor("step"),
        *(value(f"optimizer.{n}.lr") for n in range(11)),
        value(f"rng.rank_{rank}"),
        tensor(f"rng.state_{rank}", 5),
    ]


def hsdp(rank: int, num_ranks: int) -> list[WriteItem]:
    """Half of the ranks hold everything, and the other half once more."""
    half = max(num_ranks // 2, 1)
    return [
        *(rows_of(f"layers.{n}.weight", (5 * n + 1, 3), rank % half, half) for n in range(9)),
        tensor("norm", 7),
        value("step"),
    ]


def grid(rank: int, num_ranks: int) -> list[WriteItem]:
    """Columns by tensor parallelism, each of them in rows by FSDP."""
    width = 2 if num_ranks % 2 == 0 else 1
    row, column = divmod(rank, width)
    height = num_ranks // width
    piece = (4, 6 // width)
    offsets = (row * piece[0], column * piece[1])
    return [shard("weight", (4 * height, 6), offsets, piece), tensor("norm", 7)]


def pipeline(rank: int, num_ranks: int) -> list[WriteItem]:
    """Nobody has what another one has; the last rank has nothing."""
    if rank == num_ranks - 1 and rank:
        return []
    return [tensor(f"layers.{rank}.weight", 3, rank + 1), value(f"layers.{rank}.extra")]


STATES = pytest.mark.parametrize("state", [fsdp, hsdp, grid, pipeline])
RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])


def everywhere(state, num_ranks: int) -> list[SavePlan]:
    return [plan_of(state(rank, num_ranks)) for rank in range(num_ranks)]


def places_of(plan: GlobalPlan) -> Places:
    """An item after the other in one file of each rank."""
    count = len(plan.ranks)
    return Places(
        names=[f"__{rank}_0.distcp" for rank in range(plan.num_ranks)],
        files=plan.ranks,
        begins=np.arange(count) * 2**40,
        lengths=np.arange(count) + 7,
    )


def file_of(plan: GlobalPlan) -> bytes:
    places = places_of(plan)
    return MetadataFile(plan, places).of(places.names, StorageMeta(checkpoint_id="step-5"))


def read(plan: GlobalPlan) -> Metadata:
    return pickle.loads(file_of(plan))


def written(plan: GlobalPlan, plans: list[SavePlan]) -> list[tuple[int, WriteItem]]:
    """Each item that is written, and by whom, in the plan's order."""
    return [
        (rank, item)
        for rank, kept in enumerate(plan.kept)
        for item, is_kept in zip(plans[rank].items, kept, strict=True)
        if is_kept
    ]


@STATES
@RANKS
def test_the_metadata_is_that_of_dcp(state, num_ranks: int) -> None:
    plans = everywhere(state, num_ranks)
    theirs, expected = DefaultSavePlanner().create_global_plan(plans)
    found = read(planned(plans))
    assert found.planner_data == expected.planner_data
    assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    for name, entry in expected.state_dict_metadata.items():
        assert _sorted(found.state_dict_metadata[name]) == _sorted(entry)
    assert found.storage_data.keys() == {item.index for plan in theirs for item in plan.items}


def _sorted(entry: STORAGE_TYPES) -> STORAGE_TYPES:
    """Chunks by their offsets: their order is that of who writes them."""
    if isinstance(entry, TensorStorageMetadata):
        entry.chunks.sort(key=lambda chunk: chunk.offsets)
    return entry


@STATES
@RANKS
def test_every_item_is_written_once_and_found_where_it_was_put(state, num_ranks: int) -> None:
    plans = everywhere(state, num_ranks)
    plan = planned(plans)
    found, items = read(plan), written(plan, plans)
    assert len({item.index for _, item in items}) == len(items) == len(plan.ranks)
    assert [rank for rank, _ in items] == plan.ranks.tolist()
    for number, (rank, item) in enumerate(items):
        place = _StorageInfo(f"__{rank}_0.distcp", number * 2**40, number + 7)
        assert found.storage_data[item.index] == place
    for index in found.storage_data:
        if index.index is not None:
            chunk = found.state_dict_metadata[index.fqn].chunks[index.index]
            assert chunk.offsets == index.offset
    assert found.storage_meta == StorageMeta(checkpoint_id="step-5")


@STATES
@RANKS
def test_the_index_says_what_the_metadata_says(state, num_ranks: int) -> None:
    plan = planned(everywhere(state, num_ranks))
    index, expected = StepIndex.of_save(plan, places_of(plan)), StepIndex.of(read(plan))
    assert index.entries() == expected.entries()
    keys = [entry.name for entry in index.entries()][::2]
    assert index.tensor_bytes(keys) == expected.tensor_bytes(keys)


def test_a_reader_that_trusts_nobody_reads_it() -> None:
    plan = planned(everywhere(fsdp, 3))
    data = file_of(plan)
    assert read_foreign_metadata(data, "x") == pickle.loads(data)


def test_the_next_saves_differ_in_whose_they_are_and_the_names_of_files() -> None:
    plan = planned(everywhere(hsdp, 3))
    places = places_of(plan)
    kept = MetadataFile(plan, places)
    names = [f"__{rank}_0123abcd_{'x' * rank}.distcp" for rank in range(3)]
    found: Metadata = pickle.loads(kept.of(names, StorageMeta(checkpoint_id="step-60")))
    expected = read(plan)
    assert found.storage_meta == StorageMeta(checkpoint_id="step-60")
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.planner_data == expected.planner_data
    assert {
        index: (places.names[names.index(at.relative_path)], at.offset, at.length)
        for index, at in found.storage_data.items()
    } == {
        index: (at.relative_path, at.offset, at.length)
        for index, at in expected.storage_data.items()
    }


def test_it_is_the_same_plan_each_time() -> None:
    plans = everywhere(hsdp, 8)
    first, second = planned(plans), planned(plans)
    assert all(map(np.array_equal, first.kept, second.kept))


def test_what_all_hold_is_written_by_all_alike() -> None:
    plans = [plan_of(tensor(f"{n}", n + 1) for n in range(100))] * 8
    plan = planned(plans)
    assert sum(plan.num_bytes) == 4 * 5050
    assert max(plan.num_bytes) - min(plan.num_bytes) <= 16
    values = planned([plan_of(value(f"{n}") for n in range(80))] * 8)
    assert Counter(values.ranks.tolist()) == dict.fromkeys(range(8), 10)


def test_who_has_much_of_their_own_writes_little_of_what_all_have() -> None:
    plans = [plan_of([*(tensor(f"{n}", 10) for n in range(10))]) for _ in range(2)]
    plans[0] = plan_of([*plans[0].items, tensor("own", 80)])
    plan = planned(plans)
    assert plan.num_bytes == [360, 360]


def test_the_bytes_of_a_rank_are_those_of_its_pieces() -> None:
    plan = planned([plan_of([rows_of("a", (10, 4), rank, 4)]) for rank in range(4)])
    assert plan.num_bytes == [48, 48, 48, 16]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([shard("a", (4, 2), (0, 0), (2, 2)), shard("a", (4, 2), (3, 0), (1, 2))], "gaps"),
        ([shard("a", (4, 2), (0, 0), (3, 2)), shard("a", (4, 2), (2, 0), (2, 2))], "overlap"),
        ([shard("a", (4, 2), (0, 0), (2, 2)), shard("a", (4, 2), (2, 0), (3, 2))], "overlap"),
        ([shard("a", (4, 2), (0, 0), (2, 2)), shard("a", (4, 2), (2, 0), (1, 2))], "gaps"),
        ([tensor("a", 4), value("a")], "one thing on one rank"),
        ([tensor("a", 4), tensor("a", 2, 2)], "one thing on one rank"),
        ([tensor("a", 4), shard("a", (4,), (2,), (2,))], "one thing on one rank"),
        ([shard("a", (4,), (0,), (2,)), shard("a", (2, 2), (1, 0), (1, 2))], "one thing on one"),
    ],
)
def test_what_does_not_make_up_one_tensor_is_refused_by_name(
    items: list[WriteItem], said: str
) -> None:
    plans = [plan_of([tensor("sound", 3), item]) for item in items]
    with pytest.raises(StateDictError, match=said) as caught:
        planned(plans)
    assert caught.value.what.startswith("a: ")
    assert "nothing was written" in caught.value.safe
    with pytest.raises((ValueError, AssertionError, IndexError)):
        DefaultSavePlanner().create_global_plan(plans)


def test_of_many_names_three_are_told() -> None:
    plans = [plan_of(shard(f"t{n}", (4,), (0,), (2,)) for n in range(5))] * 2
    with pytest.raises(StateDictError, match="t0, t1, t2 and 2 more: has pieces"):
        planned(plans)


def test_of_tensors_that_differ_from_rank_to_rank_one_is_saved_as_dcp_does() -> None:
    plans = [plan_of([tensor("seen", length)]) for length in (3, 5)]
    found = read(planned(plans))
    (index,) = found.storage_data
    assert index == MetadataIndex("seen", (0,))
    assert found.state_dict_metadata["seen"].size in ((3,), (5,))


def test_a_state_without_anything_in_it_is_planned() -> None:
    found = read(planned([SavePlan([], planner_data={}), SavePlan([], planner_data={})]))
    assert (found.state_dict_metadata, found.storage_data) == ({}, {})
