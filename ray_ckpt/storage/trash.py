"""What was purged: how it comes back, and when it is gone for good.

How a folder is moved aside and brought back is the commit's knowledge, not this module's.
"""

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, StepNotFoundError, UsageError
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.commit import Commit
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.listing import aside_folders, view_aside
from ray_ckpt.storage.records import Records


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
            raise StepNotFoundError(f"the trash holds no step-{step}", uri, step_errors.UNCHANGED)
        newest = max(trashed)
        if self._store.stat(names.manifest_key(names.step_dir(step))) is None:
            self._clear_dead_save(step)
        try:
            self._commit.bring_back(newest[1], names.step_dir(step))
        except ObjectExistsError as error:
            raise step_errors.exists(self._store.uri, step) from error
        self._forget(trashed[newest])

    def empty(self, *, older_than_s: float, now: float) -> dict[int, int]:
        """Bytes freed by step, for everything that was trashed more than `older_than_s` ago.

        The time of trashing is the one of the manifest's last purge record; a step without such
        a record was put there by hand and is left alone.
        """
        freed: dict[int, int] = {}
        trashed_at = {
            (r.action.step, r.action.source_id): r.changed_at
            for r in sorted(self._records.actions().values(), key=lambda r: r.changed_at)
            if r.action.grace_s is not None and r.state is ActionState.SUCCEEDED
        }
        for step, aside in aside_folders(self._store, names.TRASH):
            manifest = view_aside(self._store, step, aside).manifest
            since = trashed_at.get((step, manifest.content_id)) if manifest else None
            if since is not None and now - since >= older_than_s:
                freed[step] = self._commit.erase(aside, names.step_dir(step))
        return freed

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
            is_about_it = record.action.source_id == manifest.content_id
            is_moot = record.action.kind in (ActionKind.VERIFY, ActionKind.PURGE)
            if is_about_it and (is_moot or record.state is ActionState.CANCELLED):
                self._records.forget_action(record.action)
