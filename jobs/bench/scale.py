"""What planning a save, committing it and planning a load cost by ranks and tensors.

Ranks are simulated in one process.

Every rank's messages are made and read as in a save; nothing travels and no tensor is there. A
model's tensors are cut into rows as FSDP2 does it; a learning rate for each tenth of them is on
all ranks, and a random state on each. Beside it the same by DCP's planner, where that ends soon.
"""

import gc
import multiprocessing
import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.room import Room
from ray_ckpt.tensors.load_plan import Part, Read, reads_of
from ray_ckpt.tensors.metadata_file import MetadataFile
from ray_ckpt.tensors.save_columns import Columns, Table, packed, unpacked
from ray_ckpt.tensors.save_layout import Layout, Places, Written
from ray_ckpt.tensors.save_plan import GlobalPlan
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.writer import Told

R = TypeVar("R")
_ITEM_BYTES = 4096
_MAX_PEER_ITEMS = 120_000
"""DCP takes about a tenth of a millisecond for each, twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """One save of so many tensors by so many ranks."""

    what: str
    num_ranks: int
    num_tensors: int
    gathered_mb: float
    """That the coordinator receives when all plan anew."""
    again_mb: float
    """When nothing has changed."""
    rank_cpu_s: float
    """The slowest rank's for its message, its items being there."""
    plan_cpu_s: float
    """The coordinator's, from the messages to the answers."""
    again_cpu_s: float
    """The same when nothing has changed."""
    metadata_mb: float
    metadata_cpu_s: float
    """Of `.metadata` and our index beside it."""
    metadata_again_cpu_s: float
    """The same when nothing has changed."""
    manifest_cpu_s: float
    """Of the manifest, in every save; DCP has none."""
    peak_mb: float
    """How much the coordinator's memory grew from when it had all messages."""
    load_mb: float
    """That each rank reads to know where all lies."""
    load_cpu_s: float
    """Of a rank's own plan of a load, from what it has read on."""


def measure_scale(
    num_ranks: Sequence[int], num_tensors: Sequence[int], *, with_peers: bool
) -> list[Scaled]:
    """Each in a new process, so that peaks of memory do not hide each other."""
    context = multiprocessing.get_context("spawn")
    rows: list[Scaled] = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for ranks in num_ranks:
            for tensors in num_tensors:
                rows.append(processes.submit(_ours, ranks, tensors).result())
                if with_peers and ranks * tensors <= _MAX_PEER_ITEMS:
                    rows.append(processes.submit(_dcps, ranks, tensors).result())
    return rows


def items_of(rank: int, num_ranks: int, num_tensors: int) -> list[WriteItem]:
    """What DCP's planner makes of this rank's state."""
    properties = TensorProperties(dtype=torch.float32)
    items = [_rows(number, rank, num_ranks, properties) for number in range(num_tensors)]
    values = [f"optimizer.param_groups.{n}.lr" for n in range(num_tensors // 10)]
    items += [_value(name) for name in (*values, f"rng.rank_{rank}.python")]
    return items


def _rows(number: int, rank: int, num_ranks: int, properties: TensorProperties) -> WriteItem:
    shape = torch.Size((1024 * (1 + number % 4), 4096))
    step = -(-shape[0] // num_ranks)
    begin = min(rank * step, shape[0])
    offsets = torch.Size((begin, 0))
    sizes = torch.Size((min(step, shape[0] - begin), shape[1]))
    return WriteItem(
        index=MetadataIndex(f"layers.{number // 9}.feed_forward.w{number % 9}.weight", offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes), properties=properties, size=shape
        ),
    )


def _value(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def _paths(items: Sequence[WriteItem]) -> dict[str, tuple[str, ...]]:
    return {item.index.fqn: tuple(item.index.fqn.split(".", 1)) for item in items}


@dataclass(slots=True)
class _Clock:
    """CPU seconds of what was done, by name: of several times the longest."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def of(self, what: str, act: Callable[[], R]) -> R:
        """What `act` returns."""
        began = time.process_time()
        result = act()
        self.seconds[what] = max(self.seconds.get(what, 0.0), time.process_time() - began)
        return result


def _ours(num_ranks: int, num_tensors: int) -> Scaled:
    clock = _Clock()
    table, messages = _messages(clock, num_ranks, num_tensors)
    memory = _Memory()
    plan = clock.of("plan", lambda: _planned(table, messages))
    layouts = [_layout(plan, rank) for rank in range(num_ranks)]
    told = [pickle.dumps((_ready(), _written(rank))) for rank in range(num_ranks)]
    heard = clock.of("again", lambda: [pickle.loads(one) for one in told])
    written: list[Written] = [one for _, one in heard]
    places = Places.of(written, layouts)
    meta = StorageMeta(checkpoint_id="step-1")
    file = clock.of("metadata", lambda: MetadataFile(plan, places))
    data = clock.of("metadata again", lambda: file.of(places.names, meta))
    known, index = clock.of("index", lambda: _indexed(plan, places))
    manifest = clock.of("manifest", lambda: _manifest(known))
    peak_mb = memory.peak_mb()
    held = items_of(num_ranks // 2, num_ranks, num_tensors)
    clock.of("load", lambda: _loads(manifest, index, held))
    return Scaled(
        what="ray_ckpt",
        num_ranks=num_ranks,
        num_tensors=num_tensors,
        gathered_mb=sum(map(len, messages)) / 1e6,
        again_mb=sum(map(len, told)) / 1e6,
        rank_cpu_s=clock.seconds["rank"],
        plan_cpu_s=clock.seconds["table"] + clock.seconds["plan"],
        again_cpu_s=clock.seconds["again"],
        metadata_mb=len(data) / 1e6,
        metadata_cpu_s=sum(clock.seconds[what] for what in ("metadata", "metadata again", "index")),
        metadata_again_cpu_s=clock.seconds["metadata again"] + clock.seconds["index"],
        manifest_cpu_s=clock.seconds["manifest"],
        peak_mb=peak_mb,
        load_mb=(len(manifest) + len(index)) / 1e6,
        load_cpu_s=clock.seconds["load"],
    )


def _messages(clock: _Clock, num_ranks: int, num_tensors: int) -> tuple[bytes, list[bytes]]:
    first = items_of(0, num_ranks, num_tensors)
    table = clock.of("table", lambda: packed(Table.of(first, _paths(first))))
    messages: list[bytes] = []
    for rank in range(num_ranks):
        items = items_of(rank, num_ranks, num_tensors)
        columns = partial(Columns.of, items, _paths(items))
        messages.append(clock.of("rank", lambda c=columns: packed(c(unpacked(table)))))
    return table, messages


def _planned(table: bytes, messages: Sequence[bytes]) -> GlobalPlan:
    plan = GlobalPlan.of(unpacked(table), [unpacked(message) for message in messages])
    for kept in plan.kept:
        pickle.dumps(np.packbits(kept).tobytes())
    return plan


def _layout(plan: GlobalPlan, rank: int) -> Layout:
    count = plan.starts[rank + 1] - plan.starts[rank]
    lengths = np.full(count, _ITEM_BYTES, np.int64)
    return Layout(
        files=np.zeros(count, np.int32), begins=np.cumsum(lengths) - lengths, lengths=lengths
    )


def _ready() -> tuple[str, Told]:
    """What a rank says first: the plan that it could go by, and where it writes."""
    return uuid.uuid4().hex, Told(tied={}, room=Room(place="disk", where="/run", free_bytes=2**40))


def _written(rank: int) -> Written:
    """And what it says last, when everything lies where it did."""
    file = FileEntry(path=f"__{rank}_0.distcp", size_bytes=1, digest="crc64nvme:0123456789abcdef")
    return Written(files=(file,), taken_over=(), layout=None, non_finite=(), places=())


def _indexed(plan: GlobalPlan, places: Places) -> tuple[StepIndex, bytes]:
    index = StepIndex.of_save(plan, places)
    return index, index.to_bytes()


def _manifest(index: StepIndex) -> bytes:
    return Manifest(
        step=1,
        save_id="save1",
        created_at="",
        lineage=Lineage(run_id="run"),
        files=(),
        tensors=index.entries(),
        tensor_bytes=index.tensor_bytes(()),
    ).to_json()


def _loads(manifest: bytes, index: bytes, held: Sequence[WriteItem]) -> list[Read]:
    """What a rank that holds this reads of each file."""
    Manifest.without_tensors(manifest, "step-1")
    known = StepIndex.from_bytes(index)
    return reads_of(
        known,
        [
            Part(
                name=item.index.fqn,
                number=known.numbers[item.index.fqn],
                local=torch.empty(item.tensor_data.chunk.sizes, device="meta"),
                offsets=item.tensor_data.chunk.offsets,
            )
            for item in held
            if item.tensor_data is not None
        ],
    )


def _dcps_loads(data: bytes, held: Sequence[WriteItem]) -> list[ReadItem]:
    """The same by DCP."""
    metadata = pickle.loads(data)
    return [
        read
        for item in held
        if item.tensor_data is not None
        for read in create_read_items_for_chunk_list(
            item.index.fqn,
            metadata.state_dict_metadata[item.index.fqn],
            [item.tensor_data.chunk],
        )
    ]


def _dcps(num_ranks: int, num_tensors: int) -> Scaled:
    """By DCP's own code; the items' places are filled in as its writer does it."""
    clock = _Clock()
    messages = _dcps_messages(clock, num_ranks, num_tensors)
    memory = _Memory()

    def planned() -> tuple[list[SavePlan], Any]:
        plans, metadata = DefaultSavePlanner().create_global_plan(
            [pickle.loads(m) for m in messages]
        )
        for answer in plans:
            pickle.dumps(answer)
        return plans, metadata

    plans, metadata = clock.of("plan", planned)

    def stored() -> bytes:
        metadata.storage_data = {
            item.index: _StorageInfo(f"__{rank}_0.distcp", number * _ITEM_BYTES, _ITEM_BYTES)
            for rank, its in enumerate(plans)
            for number, item in enumerate(its.items)
        }
        return pickle.dumps(metadata)

    data = clock.of("metadata", stored)
    peak_mb = memory.peak_mb()
    held = items_of(num_ranks // 2, num_ranks, num_tensors)
    clock.of("load", lambda: _dcps_loads(data, held))
    gathered_mb = sum(map(len, messages)) / 1e6
    return Scaled(
        what="DefaultSavePlanner",
        num_ranks=num_ranks,
        num_tensors=num_tensors,
        gathered_mb=gathered_mb,
        again_mb=gathered_mb,
        rank_cpu_s=clock.seconds["rank"],
        plan_cpu_s=clock.seconds["plan"],
        again_cpu_s=clock.seconds["plan"],
        metadata_mb=len(data) / 1e6,
        metadata_cpu_s=clock.seconds["metadata"],
        metadata_again_cpu_s=clock.seconds["metadata"],
        manifest_cpu_s=0.0,
        peak_mb=peak_mb,
        load_mb=len(data) / 1e6,
        load_cpu_s=clock.seconds["load"],
    )


def _dcps_messages(clock: _Clock, num_ranks: int, num_tensors: int) -> list[bytes]:
    messages: list[bytes] = []
    for rank in range(num_ranks):
        items = items_of(rank, num_ranks, num_tensors)
        plan = SavePlan(items, planner_data=_paths(items))
        messages.append(clock.of("rank", partial(pickle.dumps, plan)))
    return messages


class _Memory:
    """How far this process's grows from now on; for Linux."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
        self._before_kb = self._peak_kb()

    def peak_mb(self) -> float:
        """By how much it was larger at most."""
        return (self._peak_kb() - self._before_kb) / 1e3

    def _peak_kb(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
