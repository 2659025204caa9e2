"""The save process itself: it maps what its rank has staged and takes part in the saves of it.

It meets the other ranks' children in a gloo group of their own, answers one request at a time, and
ends when its parent does.
"""

import contextlib
import io
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from ray_ckpt.storage.host_memory.copies import FileInMemory
from ray_ckpt.tensors.ranks import Phase
from ray_ckpt.tensors.save_planner import ValueSavePlanner
from ray_ckpt.tensors.save_protocol import SaveProtocol
from ray_ckpt.tensors.save_wire import (
    Answer,
    Join,
    Noted,
    OpenStore,
    Save,
    Segments,
    Serialized,
    Sharded,
    Unpacker,
    portable,
)
from ray_ckpt.tensors.staging import Span, found_in, map_segment
from ray_ckpt.tensors.still import Memory
from ray_ckpt.tensors.writer import CommittingWriter

_NICENESS = 5
"""Added to its own: training comes first."""
_LOOK_S = 0.5
"""How often it looks whether its parent is alive, should the socket not tell."""


def serve(descriptor: int, parent: int) -> None:
    """Serves the parent until it closes the connection or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all; when to end is the parent's word
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        _Server(Connection(descriptor), parent=parent).run()
    os._exit(0)  # must not wait for the other ranks' children


def _end_with(parent: int) -> None:
    """The process is gone soon after its parent."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


class _Server:
    """Answers the requests of one parent, one after the other."""

    def __init__(self, connection: Connection, *, parent: int) -> None:
        self._connection = connection
        self._parent = parent
        self._mappings: dict[int, mmap.mmap] = {}
        self._store: dist.Store | None = None
        self._protocol = SaveProtocol(None)
        self._memory = Memory()

    def run(self) -> None:
        """Greets, then answers until nobody asks."""
        self._connection.send(Answer())
        while True:
            request = self._connection.recv_bytes()
            self._answer(lambda request=request: self._perform(request))

    def _answer(self, function: Callable[[], Any]) -> None:
        try:
            answer = Answer(value=function())
        except BaseException as error:  # noqa: BLE001  the parent raises it
            answer = Answer(error=portable(error))
        self._connection.send(answer)

    def _perform(self, request: bytes) -> Any:
        match Unpacker(request, self._mappings).load():
            case OpenStore():
                return self._open_store()
            case Join() as join:
                self._join(join)
            case Segments() as segments:
                self._map(segments)
            case Save() as save:
                return self._save(save)
        return None

    def _open_store(self) -> int:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._store = store
        return store.port

    def _join(self, join: Join) -> None:
        timeout = timedelta(seconds=join.timeout_s)
        store = self._store or dist.TCPStore(*join.address, timeout=timeout / 2)
        store.set(f"here/{join.rank}", "")
        # must give up before the parents do: they are to agree that a child is missing
        store.wait([f"here/{rank}" for rank in range(join.size)], timeout / 2)
        dist.init_process_group(
            "gloo", store=store, rank=join.rank, world_size=join.size, timeout=timeout
        )
        self._protocol = SaveProtocol(dist.group.WORLD)

    def _map(self, segments: Segments) -> None:
        self._mappings = {n: m for n, m in self._mappings.items() if n in segments.num_bytes}
        for number, num_bytes in segments.num_bytes.items():
            if number not in self._mappings:
                descriptor = recv_handle(self._connection)
                self._mappings[number] = map_segment(descriptor, num_bytes)
                os.close(descriptor)

    def _save(self, save: Save) -> list[FileInMemory]:
        def check_lease() -> None:
            if os.getppid() != self._parent:
                os._exit(1)
            save.job.check_lease()

        def note(attempt: str, phase: Phase) -> None:
            self._connection.send(Noted(save=attempt, phase=phase))

        job = replace(save.job, check_lease=check_lease, note=note, wrote=self._connection.send)
        writer = CommittingWriter(job, self._memory)
        self._protocol.save(save.values, _StagedPlanner(save.mappings), writer)
        if not job.is_kept:
            return []
        spans = [Span.of(number, mapping) for number, mapping in self._mappings.items()]
        return writer.in_memory(partial(found_in, spans))


class _StagedPlanner(ValueSavePlanner):
    """Plans what `packed` made: flat already, DTensors and foreign classes described."""

    def __init__(self, mappings: dict[str, Any]) -> None:
        super().__init__()
        self._staged_mappings = mappings

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """The state dict is taken as it is."""
        self.state_dict = state_dict
        self.mappings = self._staged_mappings
        self.is_coordinator = is_coordinator

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The local tensor of a Sharded, any other value as it is."""
        value = self.state_dict[index.fqn]
        return value.shard(index) if isinstance(value, Sharded) else value

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Bytes that are there already are not made again."""
        if isinstance(object, Serialized):
            return io.BytesIO(object.data)
        return super().transform_object(write_item, object)
