"""Plans of simulated ranks, as DCP makes them of a state that is sharded over them."""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ray_ckpt.tensors.save_columns import Columns, Table, packed, unpacked
from ray_ckpt.tensors.save_plan import GlobalPlan

Ints = tuple[int, ...]


def shard(
    name: str,
    shape: Ints,
    offsets: Ints,
    sizes: Ints,
    *,
    kind: WriteItemType = WriteItemType.SHARD,
    dtype: torch.dtype = torch.float32,
) -> WriteItem:
    """A piece of a tensor."""
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=kind,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
        ),
    )


def tensor(name: str, *shape: int) -> WriteItem:
    """A whole one, as every rank has it."""
    return shard(name, shape, (0,) * len(shape), shape, kind=WriteItemType.TENSOR)


def value(name: str) -> WriteItem:
    """No tensor."""
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def rows_of(name: str, shape: Ints, rank: int, num_ranks: int, dimension: int = 0) -> WriteItem:
    """This rank's part, as FSDP2 cuts it: the last ranks may have none."""
    step = -(-shape[dimension] // num_ranks)
    begin = min(rank * step, shape[dimension])
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dimension] = begin
    sizes[dimension] = min(step, shape[dimension] - begin)
    return shard(name, shape, tuple(offsets), tuple(sizes))


def plan_of(items: Iterable[WriteItem]) -> SavePlan:
    """With the paths that `flatten_state_dict` would tell."""
    items = list(items)
    return SavePlan(items, planner_data={i.index.fqn: tuple(i.index.fqn.split(".")) for i in items})


def planned(plans: Sequence[SavePlan]) -> GlobalPlan:
    """Ours, with every message as it goes from rank to rank."""
    table = packed(Table.of(plans[0].items, plans[0].planner_data))
    messages = [packed(Columns.of(p.items, p.planner_data, unpacked(table))) for p in plans]
    return GlobalPlan.of(unpacked(table), [unpacked(message) for message in messages])
