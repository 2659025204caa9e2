"""A save as all ranks carry it out together, and the plan that they keep for the next one.

    every rank                                    coordinator
    has its state changed? where is room?     ->  the plan still holds, or is made anew:
        columns of all that is there          ->      who writes what; all refuse what is not whole
    writes; where each item lies, if anew     ->  `.metadata`, manifest, commit

While nothing changes, two small messages go each way, and `.metadata` is made of the last one. A
plan has a name that is drawn when it is made: a rank that lacks it, or whose state is another, says
so, and all plan anew. Whatever fails on one rank is raised on all of them, and then none remembers
anything.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import _DistWrapper

from ray_ckpt.tensors.metadata_file import MetadataFile
from ray_ckpt.tensors.save_columns import Columns, Table, packed, unpacked
from ray_ckpt.tensors.save_layout import Layout, Places, Written
from ray_ckpt.tensors.save_plan import GlobalPlan
from ray_ckpt.tensors.save_signature import Signature
from ray_ckpt.tensors.writer import CommittingWriter, Told


class SaveProtocol:
    """Collective: every rank of the group calls `save`, one save at a time."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """`group` is None where one process saves alone."""
        self._ranks = _DistWrapper(group, group is not None, 0)
        self._agreed: _Agreed | None = None

    @property
    def plan(self) -> str | None:
        """Name of the plan that the next save may reuse; None if it must make one."""
        return self._agreed and self._agreed.name

    def forget(self) -> None:
        """The next save makes a plan of its own."""
        self._agreed = None

    def save(
        self, state_dict: dict[str, Any], planner: DefaultSavePlanner, writer: CommittingWriter
    ) -> None:
        """The step is committed.

        Raises:
            CheckpointException: some rank failed, and every rank has heard of it.
            Exception: a rank is gone, or slower than the group waits.
        """
        before, self._agreed = self._agreed, None  # must be gone should anything be raised
        try:
            save = _Save(self._ranks, planner, writer, before)
            self._agreed = save.run(state_dict)
        except BaseException as error:
            # without an error that every rank has heard of, rank 0 may be committing the folder now
            if self._ranks.is_coordinator or isinstance(error, CheckpointException):
                writer.discard()
            raise
        writer.leave()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreed:
    """What a rank keeps of a save that went well."""

    name: str
    signature: Signature
    items: Sequence[WriteItem]
    """All that the rank has."""
    kept: npt.NDArray[np.bool_]
    """Those that it writes."""
    layout: Layout | None = None
    """Of what it has written."""
    plan: GlobalPlan | None = None
    """The coordinator's alone, and:"""
    layouts: Sequence[Layout] = ()
    metadata: MetadataFile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """First message of a rank."""

    plan: str | None
    """The one it could go by; None if its state has changed."""
    told: Told


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank hears of a new plan."""

    name: str
    kept: bytes
    """One bit an item."""


class _Save:
    """One save, on one rank."""

    def __init__(
        self,
        ranks: _DistWrapper,
        planner: DefaultSavePlanner,
        writer: CommittingWriter,
        before: _Agreed | None,
    ) -> None:
        self._ranks = ranks
        self._planner = planner
        self._writer = writer
        self._before = before
        self._told: list[Told] = []
        self._signature: Signature
        self._items: Sequence[WriteItem]

    def run(self, state_dict: dict[str, Any]) -> _Agreed:
        """What is agreed on from now on."""
        table = self._ranks.all_reduce("plan", lambda: self._ready(state_dict), self._go_on)
        agreed = self._before if table is None else self._plan_anew(table)
        assert agreed is not None, "the coordinator has heard that every rank has this plan"
        return self._written(agreed)

    def _ready(self, state_dict: dict[str, Any]) -> _Ready:
        self._planner.set_up_planner(state_dict, is_coordinator=self._ranks.is_coordinator)
        paths = self._planner.mappings
        self._signature = Signature.of(self._planner.state_dict, paths)
        before = self._before
        if before is None or before.signature != self._signature:
            before = None
            self._items = self._planner.create_local_plan().items
        else:
            self._items = before.items
        return _Ready(plan=before and before.name, told=self._writer.prepare_local_plan())

    def _go_on(self, ready: list[_Ready]) -> bytes | None:
        """On the coordinator: None if the last plan holds, else the table that a new one needs."""
        self._told = [rank.told for rank in ready]
        before = self._before
        if before is None or any(rank.plan != before.name for rank in ready):
            return packed(Table.of(self._items, self._planner.mappings))
        assert before.plan is not None, "the coordinator keeps it"
        self._writer.prepare_global_plan(self._told, before.plan.num_bytes)
        return None

    def _plan_anew(self, table: bytes) -> _Agreed:
        plans: list[GlobalPlan] = []

        def columns() -> bytes:
            paths = self._planner.mappings
            return packed(Columns.of(self._items, paths, unpacked(table)))

        def share_out(messages: list[bytes]) -> list[_Share]:
            plans.append(GlobalPlan.of(unpacked(table), [unpacked(one) for one in messages]))
            self._writer.prepare_global_plan(self._told, plans[0].num_bytes)
            name = uuid.uuid4().hex
            return [_Share(name, np.packbits(kept).tobytes()) for kept in plans[0].kept]

        share = self._ranks.reduce_scatter("plan", columns, share_out)
        bits = np.frombuffer(share.kept, np.uint8)
        return _Agreed(
            name=share.name,
            signature=self._signature,
            items=self._items,
            kept=np.unpackbits(bits, count=len(self._items)).astype(bool),
            plan=plans[0] if plans else None,
        )

    def _written(self, agreed: _Agreed) -> _Agreed:
        """The plan is carried out; what is agreed on then."""
        items = [item for item, kept in zip(agreed.items, agreed.kept, strict=True) if kept]
        plan = SavePlan(items, storage_data=self._writer.prefix(self._ranks.rank))
        found, layouts, metadata = list[Layout](), list[Layout](), list[MetadataFile]()

        def write() -> Written:
            written = self._writer.write_data(plan, self._planner)
            assert written.layout is not None, "whoever has just written knows where"
            found.append(written.layout)
            is_known = written.layout.equals(agreed.layout)
            return replace(written, layout=None) if is_known else written

        def finish(written: list[Written]) -> None:
            assert agreed.plan is not None, "the coordinator keeps it"
            for rank, one in enumerate(written):
                layouts.append(one.layout or agreed.layouts[rank])
            places = Places.of(written, layouts)
            is_known = all(one.layout is None for one in written)
            known = agreed.metadata if is_known else None
            metadata.append(known or MetadataFile(agreed.plan, places))
            self._writer.finish(agreed.plan, places, metadata[0], written)

        self._ranks.all_reduce("write", write, finish)
        kept = metadata[0] if metadata else None
        return replace(agreed, layout=found[0], layouts=layouts, metadata=kept)
