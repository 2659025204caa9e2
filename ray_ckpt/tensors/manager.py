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
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ray_ckpt.core.config import LifecyclePolicy, SaveConfig
from ray_ckpt.core.errors import RayCkptError, StateDictError
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.names import run_name
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.core.schedule import SaveSchedule
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import Lease
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.reader import StepReader, load_into
from ray_ckpt.tensors.states import RNG, TrainingState
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load` chose, and why."""

    step: int
    """Optimizer steps that are done; 0 for a new run."""
    reason: str
    skipped: tuple[tuple[int, str], ...] = field(default=())
    """Newer steps that were passed over, newest first, each with the reason."""


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
        state_dict = self._collect()
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
        except BaseException:
            writer.discard()
            raise
        if self._ranks.is_coordinator:
            log.info("step-%d is committed at %s", job.draft.step, self._catalog.uri)
            if self._run.on_commit is not None:
                self._run.on_commit(job.draft.step)

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
        if step != NEWEST:
            self._verify(step)
            self._restore(step)
            return self._loaded(LoadReport(step=step, reason="asked for by number"))
        damaged: list[tuple[int, str]] = []
        while True:
            plan = self._ranks.on_coordinator(
                lambda: plan_resume(self._catalog.observe().checkpoints)
            )
            if plan.step is None:
                return self._loaded(LoadReport(step=0, reason=plan.reason, skipped=plan.skipped))
            damage = self._damage(plan.step)
            if not damage:
                self._restore(plan.step)
                skipped = tuple(dict([*plan.skipped, *damaged]).items())
                return self._loaded(LoadReport(step=plan.step, reason=plan.reason, skipped=skipped))
            damaged.append((plan.step, "; ".join(damage)))
            self._set_aside(plan.step, damage)

    def _restore(self, step: int) -> None:
        reader = StepReader(self._catalog, self._catalog.manifest(step))
        state_dict = self._collect()
        self._fit(state_dict, reader)
        load_into(state_dict, reader, process_group=self._ranks.group)
        parts = {name: state_dict.pop(name) for name in list(self._parts) if name in state_dict}
        self._state.model.load_state_dict(state_dict)
        for name, values in parts.items():
            self._parts[name].load_state_dict(values)
        self._resumed_from = step

    def _fit(self, state_dict: dict[str, Any], reader: StepReader) -> None:
        """Keys agree, found out on the index alone; random numbers of new ranks start afresh."""
        available = set(reader.read_metadata().state_dict_metadata)
        own_rng = f"{RNG}.rank_{self._ranks.rank}."
        if not any(key.startswith(own_rng) for key in available):
            del state_dict[RNG]
            log.warning(
                "no random state for rank %d: its generators start afresh", self._ranks.rank
            )
        wanted = set(flatten_state_dict(state_dict)[0])
        everyone = set().union(*self._ranks.gather(wanted))
        prefixes = tuple(f"{name}." for name in self._parts)
        missing = sorted(everyone - available)
        unexpected = sorted(k for k in available - everyone if not k.startswith(prefixes))
        if missing or unexpected:
            raise StateDictError(
                f"the checkpoint does not fit the model: it lacks {missing or 'nothing'} and "
                f"brings unexpected {unexpected or 'nothing'}",
                self._catalog.uri,
                "no tensor was read, the model is as it was",
                "load it with the model and optimizer it was saved from",
            )

    def _verify(self, step: int) -> None:
        damage = self._damage(step)
        if damage:
            raise self._catalog.corrupt(step, damage)

    def _damage(self, step: int) -> list[str]:
        """Each rank reads its share of the files; all hear of all damage."""

        def own_share() -> list[str] | RayCkptError:
            try:
                return self._catalog.damage(
                    step, part=slice(self._ranks.rank, None, self._ranks.size)
                )
            except RayCkptError as error:
                return error

        damage: list[str] = []
        for share in self._ranks.gather(own_share()):
            if isinstance(share, RayCkptError):
                raise share
            damage.extend(share)
        return damage

    def _set_aside(self, step: int, damage: list[str]) -> None:
        def quarantine() -> None:
            self._catalog.quarantine(step)
            log.warning(
                "step-%d is damaged and was moved to quarantine; trying the one before: %s",
                step,
                "; ".join(damage),
            )

        self._ranks.on_coordinator(quarantine)

    def _loaded(self, report: LoadReport) -> LoadReport:
        if self._ranks.is_coordinator:
            log.info("resuming from step-%d: %s", report.step, report.reason)
            for step, why in report.skipped:
                log.warning("passed over step-%d: %s", step, why)
        return report

    # ---- parts ----

    def _begin(self) -> str:
        """On rank 0: the root is writable and ours; returns the run's id."""
        self._lease.acquire()
        name = run_name(self._catalog.uri)
        return self._catalog.records.begin_run(f"{name}-{self._token}", self._run.policy).run_id

    def _collect(self) -> dict[str, Any]:
        model = self._state.model.state_dict()
        return {**model, **{name: part.state_dict() for name, part in self._parts.items()}}

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
