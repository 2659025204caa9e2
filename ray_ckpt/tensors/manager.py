"""What a training loop calls: `load()`, `save(step)`, `close()`. Knows I/O, not content.

    manager = CheckpointManager(root, TrainingState(model=ModelWrapper(model), optimizer=...))
    report = manager.load()
    for step in range(report.step + 1, num_steps + 1):
        ...
        manager.save(step, last_step=step == num_steps)
    manager.close()

Every method is collective: all ranks call it, in the same order, with the same arguments.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ray_ckpt.core.config import LifecyclePolicy, SaveConfig
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.names import run_name
from ray_ckpt.core.schedule import SaveSchedule
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import Lease
from ray_ckpt.tensors.loading import LoadReport, choose, choose_newest, restore
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.states import TrainingState, collect
from ray_ckpt.tensors.writer import CommittingWriter, SaveJob

log = logging.getLogger("ray_ckpt")
NEWEST = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class HfAssets:
    """What an export needs beside the weights; saved with every step, so that it is never lost."""

    family: str
    """The adapter that knows the model's names, for example `llama`."""
    files: Mapping[str, bytes]
    """`config.json`, `generation_config.json`, the tokenizer's files, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run this process belongs to."""

    owner: str | None = None
    """Equal for all restarts of one training job, which may take its own lease over at once."""
    policy: LifecyclePolicy | None = None
    """What is to happen after a save; None leaves the root's policy as it is."""
    on_commit: Callable[[int], None] | None = None
    """Called with the step, on rank 0, after a commit; in the save's thread, must not block."""


class CheckpointManager:
    """Saves and restores one run's TrainingState under one root."""

    def __init__(
        self,
        root: str,
        state: TrainingState,
        *,
        config: SaveConfig | None = None,
        assets: HfAssets | None = None,
        run: Run | None = None,
    ) -> None:
        self.config = config or SaveConfig()
        self._state = state
        self._assets = assets
        self._run = run or Run()
        self._schedule = SaveSchedule(
            every_steps=self.config.every_steps, first_step=self.config.first_step
        )
        self._ranks = Ranks(timeout_s=self.config.timeout_s)
        self._parts = state.parts(self._ranks.rank)
        self._catalog = open_catalog(root)
        self._token = self._ranks.on_coordinator(lambda: uuid.uuid4().hex[:12])
        self._lease = Lease(self._catalog.store, "trainer", owner=self._run.owner or self._token)
        self._run_id = self._ranks.on_coordinator(self._begin)
        self._stager = _make_stager()
        self._pending: PendingSave | None = None
        self._num_saves = 0
        self._resumed_from: int | None = None

    # ---- saving ----

    def save(
        self, step: int, *, last_step: bool = False, metrics: Mapping[str, float] | None = None
    ) -> PendingSave | None:
        """The save of `step` has begun, if one is due; None if not.

        In `async` mode this returns once the state is copied to host memory; the step is a
        checkpoint only when `PendingSave.wait` returns. A save still in flight is waited for
        first. One that failed in the background is logged here and does not stop training.

        Raises:
            RayCkptError: in `sync` mode, the save failed; nothing of it is visible.
        """
        reason = self._schedule.reason_to_save(step, last_step=last_step)
        if reason is None:
            return None
        self._settle()
        if self._ranks.is_coordinator:
            log.info("saving step-%d: %s", step, reason)
        self._pending = self._begin_save(step, last_step=last_step, metrics=metrics or {})
        return self._pending

    def _begin_save(
        self, step: int, *, last_step: bool, metrics: Mapping[str, float]
    ) -> PendingSave:
        job = self._job(step, last_step=last_step, metrics=metrics)
        state_dict = collect(self._state.model, self._parts)
        if self.config.mode == "sync":
            pending = PendingSave(step, lambda: self._write(job, state_dict))
            pending.run()
            return pending
        staged = self._stager.stage(state_dict)
        pending = PendingSave(step, lambda: self._write(job, staged))
        pending.start()
        return pending

    def _write(self, job: SaveJob, state_dict: Any) -> None:
        """Writes, gathers and commits; in the save's thread when the mode is `async`."""
        writer = CommittingWriter(job)
        try:
            dcp_save(
                state_dict,
                storage_writer=writer,
                process_group=self._ranks.group,
                no_dist=self._ranks.group is None,
            )
        except BaseException as error:
            # without an error that every rank has heard of, rank 0 may be committing the folder now
            if self._ranks.is_coordinator or isinstance(error, CheckpointException):
                writer.discard()
            raise
        if self._ranks.is_coordinator:
            log.info("step-%d is committed at %s", job.draft.step, self._catalog.uri)
            self._tell(job.draft.step)

    def _tell(self, step: int) -> None:
        """`on_commit` was called; the step is committed whatever it raises."""
        try:
            if self._run.on_commit is not None:
                self._run.on_commit(step)
        except Exception as error:  # noqa: BLE001  the listener's fault, and training goes on
            log.error("step-%d is committed, but on_commit failed: %r", step, error)

    def wait(self) -> None:
        """No save is in flight; the last one is committed.

        Raises:
            RayCkptError: it failed; nothing of it is visible.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()

    def close(self) -> None:
        """Like `wait`; then the root is free for the next writer."""
        try:
            self.wait()
        finally:
            if self._ranks.is_coordinator:
                self._lease.release()
            self._ranks.close()

    def _settle(self) -> None:
        """The save in flight has ended; a failure is told, never raised into training."""
        error = self._pending.error() if self._pending is not None else None
        self._pending = None
        if error is not None:
            log.error("an earlier save failed; training goes on\n%s", error)

    # ---- loading ----

    def load(self, step: int = NEWEST) -> LoadReport:
        """The state of `step`, or of the newest good one, is in place.

        Every file's digest is recomputed first, the work split over the ranks. A damaged step is
        set aside and the one before it is tried; a step that was asked for by number is never
        replaced by another. Without any checkpoint nothing changes and the report says step 0.

        Raises:
            StepNotFoundError: the step asked for is not there.
            IntegrityError: the step asked for is damaged; storage is not touched.
            StateDictError: keys differ from the model's; found before a tensor is read.
        """
        if step == NEWEST:
            report = choose_newest(self._catalog, self._ranks)
        else:
            report = choose(self._catalog, self._ranks, step)
        if report.step:
            restore(
                self._catalog, self._ranks, report.step, model=self._state.model, parts=self._parts
            )
            self._resumed_from = report.step
        if self._ranks.is_coordinator:
            report.log()
        return report

    # ---- parts ----

    def _begin(self) -> str:
        """On rank 0: the root is writable and ours; returns the run's id."""
        self._lease.acquire()
        # the lease is exclusive: whatever another trainer left in staging will never be finished
        for attempt in self._catalog.commit.sweep(prefix="save-", idle_s=0.0, now=time.time()):
            log.warning("removed %s, a save that died before its commit", attempt)
        name = run_name(self._catalog.uri)
        return self._catalog.records.begin_run(f"{name}-{self._token}", self._run.policy).run_id

    def _job(self, step: int, *, last_step: bool, metrics: Mapping[str, float]) -> SaveJob:
        self._num_saves += 1
        return SaveJob(
            catalog=self._catalog,
            draft=Manifest(
                step=step,
                save_id=f"{self._token}{self._num_saves:04d}",
                created_at="",
                lineage=Lineage(run_id=self._run_id, resumed_from=self._resumed_from),
                files=(),
                world_size=self._ranks.size,
                is_last_step=last_step,
                metrics=metrics,
                versions={"torch": torch.__version__},
            ),
            family=self._assets.family if self._assets else None,
            assets=self._assets.files if self._assets else {},
            reserved=frozenset(self._parts),
            check_lease=self._lease.check,
        )


def _make_stager() -> DefaultStager:
    """Host buffers that are kept and reused; pinned where there is a GPU."""
    has_gpu = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=has_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=has_gpu,
        )
    )
