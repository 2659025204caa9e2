"""What was purged: how it comes back, and when it is gone for good.

How a folder is moved aside and brought back is the commit's knowledge, not this module's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, StepNotFoundError, UsageError
from ray_ckpt.core.garbage import GRACE_S, duration
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.commit import Commit
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.listing import aside_folders, sizes_in, told_in, view_aside
from ray_ckpt.storage.records import Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Trashed:
    """A save in the trash that nothing brings back any more."""

    step: int
    folder: str
    size_bytes: int
    why: str


class Trash:
    """The trash of one root; remembers nothing."""

    def __init__(self, store: Store, commit: Commit, records: Records) -> None:
        self._store = store
        self._commit = commit
        self._records = records

    def restore(self, step: int) -> None:
        """The newest trashed save of the step is committed again; see `Catalog.restore`."""
        trashed = {
            (manifest.created_at, folder): manifest
            for found, folder in aside_folders(self._store, names.TRASH)
            if found == step and (manifest := view_aside(self._store, step, folder).manifest)
        }
        if not trashed:
            uri = self._store.uri
            raise StepNotFoundError(
                f"the trash holds no step-{step}",
                uri,
                step_errors.UNCHANGED,
                f"ray-ckpt ls {uri}    (shows what is trashed)",
            )
        newest = max(trashed)
        if self._store.stat(names.manifest_key(names.step_dir(step))) is None:
            self._clear_dead_save(step)
        try:
            self._commit.bring_back(newest[1], names.step_dir(step))
        except ObjectExistsError as error:
            raise step_errors.exists(self._store.uri, step) from error
        self._forget(trashed[newest])

    def expired(self, *, older_than_s: float, now: float) -> list[Trashed]:
        """Every save that was trashed more than `older_than_s` ago, and what is half erased.

        The time of trashing is the one of the manifest's last purge record; a step without such
        a record was put there by hand and is left alone. So is one with a pin where it lay: its
        purge did not see it, in a listing that lagged, or it came since.
        """
        trashed_at = {
            (r.action.step, r.action.source_id): r.changed_at
            for r in sorted(self._records.actions().values(), key=lambda r: r.changed_at)
            if r.action.grace_s is not None and r.state is ActionState.SUCCEEDED
        }
        found: list[Trashed] = []
        for step, aside in aside_folders(self._store, names.TRASH):
            told = told_in(self._store, aside)
            if told is None:
                found.extend(self._half_erased(step, aside, now))
            elif isinstance(told, Manifest):
                age_s = now - trashed_at.get((step, told.content_id), now)
                is_old = age_s >= older_than_s and (step, told.content_id) in trashed_at
                if is_old and not self._has_pin(step):
                    why = f"purged {duration(age_s)} ago"
                    size_bytes = told.total_bytes
                    found.append(Trashed(step=step, folder=aside, size_bytes=size_bytes, why=why))
        return found

    def erase(self, trashed: Trashed) -> int:
        """Bytes freed: the save is gone for good. Twice is harmless."""
        return self._commit.erase(trashed.folder, names.step_dir(trashed.step))

    def _has_pin(self, step: int) -> bool:
        return any(names.parse_pin(name) for name in sizes_in(self._store, names.step_dir(step)))

    def _half_erased(self, step: int, aside: str, now: float) -> Iterator[Trashed]:
        """A folder whose manifest has gone first, by somebody who died then.

        A young one may be on its way into the trash, where an object store takes the manifest last.
        """
        files = list(self._store.list_objects(aside))
        if not files and self._store.mark(aside) is None:
            return  # an object store lists a prefix for a while after its last object is gone
        if now - max((info.modified_at for info in files), default=0.0) >= GRACE_S:
            size_bytes = sum(info.size_bytes for info in files)
            yield Trashed(step=step, folder=aside, size_bytes=size_bytes, why="it is half erased")

    def _clear_dead_save(self, step: int) -> None:
        """No files of an unfinished save are in the way; on an object store alone there can be."""
        folder = names.step_dir(step)
        if self._store.stat(names.begun_key(folder)) is None:
            return
        trainer = holder_of(self._store, TRAINER)
        if trainer is not None:
            raise UsageError(
                f"step-{step} may be being saved anew, by process {trainer.pid} on {trainer.host}",
                self._store.uri,
                "the step is still in the trash",
                "run the same command once the trainer has ended",
            )
        self._commit.clear(folder)

    def _forget(self, manifest: Manifest) -> None:
        """What was recorded of a save before it was trashed: it is to be verified again."""
        for record in self._records.actions().values():
            about = record.action.step, record.action.source_id
            is_about_it = about == (manifest.step, manifest.content_id)
            is_moot = record.action.kind in (ActionKind.VERIFY, ActionKind.PURGE)
            if is_about_it and (is_moot or record.state is ActionState.CANCELLED):
                self._records.forget_action(record.action)
