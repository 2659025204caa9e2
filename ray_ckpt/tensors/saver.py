"""How a save is carried out: at once, in a thread, or in a process of its own.

    sync       written from the model's own memory; training waits
    async      copied to host memory; a thread writes the copy
    process    copied to shared memory; one more process a rank writes the copy

Knows nothing of why a save is made or what it holds.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.events import Volume
from ray_ckpt.core.saving import Mode
from ray_ckpt.storage.host_memory.copies import FileInMemory
from ray_ckpt.tensors.kept_copy import KeptCopy
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.ranks import Phase, Ranks
from ray_ckpt.tensors.save_planner import ValueSavePlanner
from ray_ckpt.tensors.save_process import SaveProcess
from ray_ckpt.tensors.save_protocol import SaveProtocol
from ray_ckpt.tensors.staging import HostMemory, Stager
from ray_ckpt.tensors.still import Memory
from ray_ckpt.tensors.stopwatch import Stopwatch
from ray_ckpt.tensors.writer import CommittingWriter, SaveJob

log = logging.getLogger("ray_ckpt")


class Saver:
    """Owns the buffers and, in `process` mode, the process; one save at a time."""

    def __init__(
        self, mode: Mode, *, timeout_s: float, keep_in_memory_s: float | None = None
    ) -> None:
        self._mode = mode
        # of the thread that writes: training's thread has collectives of its own meanwhile
        self._ranks = Ranks(timeout_s=timeout_s)
        self._protocol = SaveProtocol(self._ranks.group)
        self._stager = Stager(_memory(mode, is_kept=keep_in_memory_s is not None))
        self._kept_copy: KeptCopy | None = None
        if keep_in_memory_s is not None:
            self._kept_copy = KeptCopy(self._stager, stays_s=keep_in_memory_s)
        self._process: SaveProcess | None = None
        if mode == "process":
            self._process = SaveProcess(self._ranks, self._stager, timeout_s=timeout_s)
        self._memory = Memory()
        self._is_broken = False
        """Whether a save ended here without an error that all ranks heard of."""

    def mend(self, ranks: Ranks) -> None:
        """The next save can succeed, however the last one failed; collective, no save in flight.

        `ranks` is training's, which waits for a rank that hung for as long as training does.
        """
        if ranks.any(self._is_broken):
            self._ranks.renew()
            self._protocol = SaveProtocol(self._ranks.group)
            self._is_broken = False

    def begin(
        self,
        job: SaveJob,
        state_dict: dict[str, Any],
        *,
        ended: Callable[[PendingSave], None],
        stopwatch: Stopwatch,
    ) -> PendingSave:
        """The save has begun; `state_dict` may change. In `sync` mode it has ended too.

        `ended` is called with it in the end, well or not, in the thread that wrote.
        """

        def note(save: str, phase: Phase) -> None:
            if phase is Phase.WRITTEN:
                stopwatch.end_of("write")
            self._ranks.note(save, phase)

        def wrote(volume: Volume) -> None:
            pending.volume = volume

        noted = replace(job, note=note, wrote=wrote, is_kept=self._kept_copy is not None)
        if self._kept_copy is not None:
            self._kept_copy.spoil()
        staged = state_dict if self._mode == "sync" else self._stager.stage(state_dict)
        stopwatch.end_of("stage")
        pending = PendingSave(
            job.draft.step,
            lambda: self._write(noted, staged),
            missing=lambda: self._ranks.who_is_missing(job.attempt),
            ended=ended,
            becomes=job.goes_to.becomes,
        )
        if self._mode == "sync":
            pending.run()
        else:
            pending.start()
        return pending

    def close(self) -> None:
        """Nothing is held any more; collective, and no save is in flight."""
        if self._process is not None:
            self._process.close()
        if self._kept_copy is not None:
            self._kept_copy.close()
        self._stager.close()
        self._ranks.close()

    def _write(self, job: SaveJob, state_dict: dict[str, Any]) -> None:
        try:
            job.note(job.attempt, Phase.STAGED)
            files = self._save(job, state_dict)
            if self._kept_copy is not None:
                self._kept_copy.keep(job.step, files)
        except (CheckpointException, RayCkptError):
            raise  # every rank has heard of it
        except BaseException as error:
            self._is_broken = True
            if not (self._ranks.is_coordinator and job.is_done()):
                raise
            log.warning("step-%d is saved, but some rank has not heard: %r", job.step, error)

    def _save(self, job: SaveJob, state_dict: dict[str, Any]) -> list[FileInMemory]:
        """The step is committed; which of its bytes are in shared memory, if they are kept."""
        if self._process is not None:
            return self._process.save(job, state_dict)
        writer = CommittingWriter(job, self._memory)
        self._protocol.save(state_dict, ValueSavePlanner(), writer)
        return writer.in_memory(self._stager.find) if job.is_kept else []


def _memory(mode: Mode, *, is_kept: bool) -> HostMemory:
    if mode == "process" or is_kept:
        return HostMemory.SHARED
    return HostMemory.PINNED if torch.cuda.is_available() else HostMemory.PLAIN
