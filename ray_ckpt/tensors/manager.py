"""What a training loop calls: `load()`, `save(step)`, `close()`. Knows I/O, not content.

    manager = CheckpointManager(root, TrainingState(model=ModelWrapper(model), optimizer=...))
    report = manager.load()
    for step in range(report.step + 1, num_steps + 1):
        ...
        manager.save(step, last_step=step == num_steps)
        if manager.stop_reason:
            break
    manager.close()

Every method is collective: all ranks call it, in the same order, with the same arguments. Only
`request_save` and `request_stop` may be called by one rank alone, from any thread.

    save(step)          decides: due by step, by time, on request, at the end
      do_save(...)      collects the state, copies it, hands it over; a subclass may change either
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from ray_ckpt.core.errors import RayCkptError, SaveError
from ray_ckpt.core.events import SaveStats
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.manifest import ModelEntry, NeededSource
from ray_ckpt.core.saving import Everything, HuggingFace, ModelOnly, SaveConfig
from ray_ckpt.core.schedule import SaveSchedule, fits
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.host_memory.nearby import Nearby
from ray_ckpt.tensors.contents import (
    Contents,
    everything,
    exported_model,
    model_as_it_trains,
    refuse_own_formats,
)
from ray_ckpt.tensors.hf_save import HfSave, hf_assets, pending_hf
from ray_ckpt.tensors.loader import NEWEST, Loader
from ray_ckpt.tensors.loading import LoadReport
from ray_ckpt.tensors.outcomes import Outcomes
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.root_writer import RootWriter
from ray_ckpt.tensors.run import REFERENCE, HfAssets, Run
from ray_ckpt.tensors.saver import Saver
from ray_ckpt.tensors.states import TrainingState
from ray_ckpt.tensors.stopwatch import Stopwatch
from ray_ckpt.tensors.triggers import ASKED_FOR, TIME_HAS_COME, Heard, Listener
from ray_ckpt.tensors.undisturbed import without_collections
from ray_ckpt.tensors.writer import SaveJob

log = logging.getLogger("ray_ckpt")


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
        self.stop_reason: str | None = None
        """Why training should stop after this step; the same on every rank."""
        if isinstance(self.config.last, HuggingFace):
            hf_assets(assets)
        elif isinstance(self.config.last, ModelOnly):
            refuse_own_formats(state.model)
        self._state = state
        self._assets = assets
        self._reference = run.reference if run else None
        self._schedule = SaveSchedule(
            every_steps=self.config.every_steps,
            every_s=self.config.every_s,
            first_step=self.config.first_step,
        )
        run = run or Run()
        self._ranks = Ranks()
        self._parts = state.parts(self._ranks.rank)
        self._catalog = open_catalog(root)
        self._loader = Loader(
            catalog=self._catalog,
            ranks=self._ranks,
            model=state.model,
            parts=self._parts,
            assets=assets,
        )
        self._writer = RootWriter(self._catalog, run, self._ranks, local_dir=self.config.local_dir)
        self._saver = Saver(
            self.config.mode,
            timeout_s=self.config.timeout_s,
            keep_in_memory_s=self.config.keep_in_memory_s,
        )
        self._outcomes = Outcomes(
            self._catalog.store,
            run.on_event,
            owner=self._writer.owner,
            is_coordinator=self._ranks.is_coordinator,
        )
        self._pending: PendingSave | None = None
        self._needs: tuple[NeededSource, ...] = ()
        """Which bases the saves of an adapter alone belong to; known from the load."""
        self._memories: tuple[Nearby, ...] = ()
        """Copies of an earlier trainer, which the state was loaded from; there until a save."""
        self._saved_at = time.monotonic()
        is_asked = self._catalog.records.take_save_request
        self._listener = Listener(self._ranks, self.config, is_asked=is_asked)

    @property
    def stats(self) -> SaveStats:
        """Counts of this process's saves."""
        return self._outcomes.stats

    # ---- saving ----

    def save(
        self, step: int, *, last_step: bool = False, metrics: Mapping[str, float] | None = None
    ) -> PendingSave | None:
        """The save of `step` has begun, if one is due; None if not. Call it after every step.

        Unless the mode is `sync` this returns once the state is copied to host memory; the step is
        a checkpoint only when `PendingSave.wait` returns, and with `local_dir` once its manager has
        brought it to the root. A save that failed in the background is logged, counted in `stats`
        and told to `Run.on_event`.

        Raises:
            SaveError: a save failed in the background, and `on_failure` is `stop`.
            RayCkptError: in `sync` mode, this save failed; nothing of it is visible.
        """
        is_time = self._schedule.is_time(time.monotonic() - self._saved_at)
        heard = self._listener.hear(is_time=is_time)
        if heard.has_failed:
            raise _failed_before(self._outcomes.failure)
        reason = self.reason_to_save(step, last_step=last_step) or heard.reason
        if heard.stop_s is not None and self.stop_reason is None:
            return self._stop(step, heard.stop_s, last_step=last_step, metrics=metrics or {})
        if reason is None:
            return None
        if not self._is_free(must=last_step):
            self._skip(step, reason, heard)
            return None
        return self.do_save(step, reason, last_step=last_step, metrics=metrics or {})

    def reason_to_save(self, step: int, *, last_step: bool) -> str | None:
        """Why `step` is saved by its number; None if it is not. The same on every rank."""
        return self._schedule.reason_to_save(step, last_step=last_step)

    def do_save(
        self, step: int, reason: str, *, last_step: bool, metrics: Mapping[str, float]
    ) -> PendingSave:
        """The save of `step` has begun, whatever the schedule says; none is in flight."""
        stopwatch = Stopwatch()
        self._settle()
        stopwatch.end_of("wait")
        self._saver.mend(self._ranks)
        if self._ranks.is_coordinator:
            log.info("saving step-%d: %s", step, reason)
        self._saved_at = time.monotonic()
        what = self.config.last if last_step else Everything()
        if isinstance(what, HuggingFace):
            exported = self._save_hf(what, step, reason, metrics)
            if exported is not None:
                return exported
            what = Everything()
        contents = self._contents(what)
        job = self._job(step, contents, last_step=last_step, metrics=metrics)
        self._pending = self._begin(job, contents, reason, stopwatch)
        return self._pending

    def _begin(
        self, job: SaveJob, contents: Contents, reason: str, stopwatch: Stopwatch
    ) -> PendingSave:
        for memory in self._memories:  # before as much is taken for the copy that is to come
            memory.release()
        self._memories = ()
        return self._saver.begin(
            job,
            contents.state_dict,
            ended=lambda pending: self._ended(pending, reason, stopwatch),
            stopwatch=stopwatch,
        )

    def _save_hf(
        self, what: HuggingFace, step: int, reason: str, metrics: Mapping[str, float]
    ) -> PendingSave | None:
        """The step is a Hugging Face folder; None if that failed, and it is to be a checkpoint."""
        contents = Contents(state_dict={}, model=ModelEntry(family=None, keys=()), holds="model")
        save = HfSave(
            catalog=self._catalog,
            draft=self._writer.draft(step, contents, is_last_step=True, metrics=metrics),
            what=what,
            assets=hf_assets(self._assets),
        )
        stopwatch = Stopwatch()
        pending = pending_hf(
            save,
            self._state.model,
            self._ranks,
            ended=lambda pending: self._ended(pending, reason, stopwatch),
        )
        try:
            pending.run()
        except RayCkptError as error:
            log.error("step-%d is saved as a checkpoint instead of an export\n%s", step, error)
            return None
        return pending

    def save_seed(self) -> None:
        """Step 0 holds the model as it is and nothing else: other runs, of any size, start from it.

        Raises:
            StepExistsError: there is a step 0 already.
        """
        contents = model_as_it_trains(self._state.model)
        job = self._job(0, contents, last_step=False, metrics={})
        self._begin(job, contents, "seed", Stopwatch()).wait()

    def request_save(self) -> None:
        """The next step is saved; any rank may call it, from any thread.

        Raises:
            UsageError: the config says not to listen.
        """
        self._listener.request()

    def request_stop(self) -> None:
        """As if SIGTERM had come: a save that fits the notice, then `stop_reason` is set.

        Raises:
            UsageError: the config says not to listen.
        """
        self._listener.stop()

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
        with contextlib.ExitStack() as end:  # whatever fails, the rest is closed
            end.callback(self._ranks.close)
            end.callback(self._writer.close)
            end.callback(self._outcomes.close)
            end.callback(self._saver.close)
            end.callback(self._listener.close)
            self.wait()

    def _is_free(self, *, must: bool) -> bool:
        """Whether a save may begin now; the same on every rank. Two are never written at once."""
        if self._pending is None or must or self.config.when_busy == "wait":
            return True
        return not self._ranks.any(not self._pending.done())

    def _skip(self, step: int, reason: str, heard: Heard) -> None:
        """Told, and the clock starts anew; what somebody asked for is only put off."""
        assert self._pending is not None, "nothing else is in the way"
        if heard.reason == ASKED_FOR:
            self._listener.request()
        if reason == ASKED_FOR:
            return
        if heard.reason == TIME_HAS_COME:
            self._saved_at = time.monotonic()
        in_the_way = f"step-{self._pending.step} is still being written"
        self._outcomes.skipped(step, f"{reason}; {in_the_way}")

    def _stop(
        self, step: int, elapsed_s: float, *, last_step: bool, metrics: Mapping[str, float]
    ) -> PendingSave | None:
        """Training is to stop now: the last save is made if it ends before the kill."""
        self.stop_reason = "asked to stop"
        began_at = time.monotonic()
        self._settle()
        elapsed_s += time.monotonic() - began_at
        notice_s = self.config.sigterm_notice_s
        last_save_s = self.stats.last_save_s
        is_in_time = self._ranks.on_coordinator(
            lambda: notice_s is None or fits(notice_s, elapsed_s, last_save_s)
        )
        if not is_in_time:
            late = f"{elapsed_s:.1f} of the {notice_s} s before the kill are over"
            self._outcomes.skipped(step, f"a save takes {last_save_s:.1f} s, and {late}")
            return None
        pending = self.do_save(step, self.stop_reason, last_step=last_step, metrics=metrics)
        pending.error()
        return pending

    def _contents(self, what: Everything | ModelOnly) -> Contents:
        if isinstance(what, ModelOnly):
            return exported_model(self._state.model, what.dtype)
        return everything(self._state.model, self._parts, self._needs)

    def _settle(self) -> None:
        """The save in flight has ended; a failure was told when it ended."""
        if self._pending is not None:
            self._pending.error()
            self._pending = None

    def _ended(self, pending: PendingSave, reason: str, stopwatch: Stopwatch) -> None:
        """In the thread that wrote."""
        stopwatch.end()
        self._outcomes.ended(pending, reason, stopwatch)
        if pending.error() is None:
            self._writer.has_saved()
        elif pending.is_in_background and self.config.on_failure == "stop":
            self._listener.failed()

    # ---- loading ----

    def load(self, step: int = NEWEST, *, config: LoadConfig | None = None) -> LoadReport:
        """The state of `step`, or of the newest good one, is in place; else what the config says.

        Every byte is read once, by some rank, and compared with what was committed, before a pickle
        is run or this returns. A damaged step is set aside and the one before it is tried; a step
        that was asked for by number is never replaced by another. Without any checkpoint the
        config's `start` is loaded, and the report says step 0.

        Raises:
            StepNotFoundError: the step asked for is not there.
            IntegrityError: the step asked for is damaged; storage is not touched. Unless a file was
                missing or too short, the model may hold some of it: do not train on.
            StateDictError: keys differ from the model's; found before a tensor is read.
            ConfigError: a source or an excluded part is not there.
        """
        with without_collections():
            loaded = self._loader.load(step, config or LoadConfig())
        self._writer.goes_on_from(loaded.choice.step, started_from=loaded.origins)
        self._needs = loaded.needs
        self._memories = loaded.memories
        self._outcomes.began(loaded.choice, loaded.origins, world_size=self._ranks.size)
        if self._ranks.is_coordinator:
            loaded.report.log()
        return loaded.report

    # ---- parts ----

    def _job(
        self, step: int, contents: Contents, *, last_step: bool, metrics: Mapping[str, float]
    ) -> SaveJob:
        family = self._assets.family if self._assets else None
        contents = replace(contents, model=replace(contents.model, family=family))
        return SaveJob(
            catalog=self._catalog,
            draft=self._writer.draft(step, contents, is_last_step=last_step, metrics=metrics),
            assets=self._files(),
            reserved=frozenset(self._parts),
            check_lease=self._writer.check_lease,
            supersedes=self._writer.branch,
            target=self._writer.target,
            full_every_saves=self.config.full_every_saves,
        )

    def _files(self) -> dict[str, bytes]:
        """What is saved beside the state. Collective, where the run gives a reference."""
        files = dict(self._assets.files) if self._assets else {}
        if self._reference is not None:
            files[REFERENCE] = self._reference().to_bytes()
        return files


def _failed_before(error: RayCkptError | None) -> SaveError:
    return SaveError(
        f"training stops, because a save failed: {error.what if error else 'on another rank'}",
        error.where if error else "",
        "every step that was committed before is safe",
        "mend the cause and start again: training goes on from the newest committed step",
    )
