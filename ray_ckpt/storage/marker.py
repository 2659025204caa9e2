"""How a folder appears and disappears on an object store, which can rename nothing.

    step-10/.metadata  hf_assets/...       names that every save of the step uses: what is trashed
    step-10/ray_ckpt.manifest.json, pins   takes copies of these along, made by the store itself
    step-10/__0_<save id>_0.distcp         names of one save alone: they stay where they are

So a step can be saved anew beside the shards of an older save that is in the trash. Folders that
somebody else wrote (adopted ones) have no names of their own: all of their files are copied.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Blocks, ObjectInfo, Store
from ray_ckpt.storage.commit import Kept, Remains
from ray_ckpt.storage.disk.scratch import make_scratch, remove_scratch
from ray_ckpt.storage.drafts import drafts_at
from ray_ckpt.storage.listing import ASIDE, manifest_in, sizes_in
from ray_ckpt.storage.progress import UNTOLD, Progress

_FILES_AT_ONCE = 16
"""Most wait for an answer. How many parts of large ones are in memory is limited elsewhere."""


class MarkerCommit:
    """For an object store, where the manifest's own PUT and DELETE show and hide a folder."""

    names_shards_by_save = True
    is_staging_shared = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def staging(self, attempt: str) -> Path:
        """A folder of this process on the local disk."""
        return make_scratch(attempt)

    def clear(self, folder: str) -> None:
        """Where a note tells of an unfinished save: all but pins and what the trash still needs.

        Uploads that never ended go first: their writers would bring back what is removed.

        Only a note makes files ours, and the note goes last: dying here changes nothing.
        """
        note = names.begun_key(folder)
        if self._store.stat(note) is None:
            return
        self._store.abandon(self._store.list_unfinished(folder))
        if self._store.stat(names.manifest_key(folder)) is None:
            self._store.delete([f"{folder}/{name}" for name in self._unfinished(folder)])
        self._store.delete([note])

    def begin(self, folder: str) -> None:
        """A note, so that the remains of a dead save are not taken for foreign files."""
        self._store.write(names.begun_key(folder), b"")

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> Blocks:
        """In its place, where no other save has one of its name; the note comes first."""
        self.begin(folder)
        return self._store.begin(f"{folder}/{name}", size_bytes)

    def contribute(self, staging: Path, folder: str, *, progress: Progress = UNTOLD) -> None:
        """Uploads the files, several at once; without a manifest nobody counts them."""
        found = sorted(_files_in(staging))
        if found:
            self.begin(folder)

        def send(name: str) -> None:
            path = staging / name
            self._store.upload(path, f"{folder}/{name}", progress=progress)
            path.unlink()

        at_once(send, found, num_threads=_FILES_AT_ONCE)

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """Copied by the store into its place; shards of a step that is set aside stay where it was.

        The note comes first, as in `contribute`.
        """
        if self._store.stat(names.manifest_key(kept.folder)) is None:
            raise ObjectNotFoundError("it is not committed", f"{self._store.uri}/{kept.folder}")
        self.begin(folder)
        self._store.take_over(kept.key, f"{folder}/{name}", kept.entry, mark=kept.mark)

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """Remaining files first, then the manifest, which must not be there yet."""
        if self._store.stat(names.manifest_key(folder)) is not None:
            raise ObjectExistsError("something is there already", f"{self._store.uri}/{folder}")
        self.contribute(staging, folder)
        self._store.create(names.manifest_key(folder), manifest)
        self._end(folder)
        self.discard(staging)

    def waiting_key(self, folder: str, save_id: str, name: str) -> str:
        """A shard has a name of its own and waits in its place, like one whose save is trashed."""
        if names.save_of_shard(name) == save_id:
            return f"{folder}/{name}"
        return f"{names.staging_dir(names.gather_attempt(save_id))}/{name}"

    def publish_waiting(self, folder: str, manifest: Manifest) -> None:
        """Copies of the files whose names every save uses, then the manifest.

        The note comes first, as in `contribute`: what the trash erases meanwhile is not ours.
        """
        if self._store.stat(names.manifest_key(folder)) is not None:
            raise ObjectExistsError("something is there already", f"{self._store.uri}/{folder}")
        save_id = manifest.save_id
        self.begin(folder)
        for name in _shared_names((entry.path for entry in manifest.files), save_id):
            self._store.copy(self.waiting_key(folder, save_id, name), f"{folder}/{name}")
        self._store.create(names.manifest_key(folder), manifest.to_json())
        self._end(folder)

    def part_key(self, folder: str, export_id: str, file: str, *, token: str) -> str:
        """In its place; the note comes first, as in `contribute`."""
        self.begin(folder)
        return f"{folder}/{file}"

    def take_part(self, key: str, target: Path) -> None:
        """Nothing to do: it is there."""

    def drop_parts(self, export_id: str) -> None:
        """Nothing to do: `clear` removes what no manifest names."""

    def _end(self, folder: str) -> None:
        """Nobody writes to the folder any more, and no note says so."""
        # must come before the note goes: it alone tells that they are ours
        self._store.abandon(self._store.list_unfinished(folder))
        self._store.delete([names.begun_key(folder)])

    def discard(self, staging: Path) -> None:
        """The local folder is removed; objects that were put already wait for `clear`."""
        remove_scratch(staging)

    def leave(self, staging: Path) -> None:
        """The local folder is removed: every process has its own."""
        self.discard(staging)

    def remains(self) -> list[Remains]:
        """Attempts are named by what they were to become: `save-step-5`, `export-hf-step-5`."""
        notes = list(self._store.list_objects(names.STAGING))
        begun = ((note, names.parse_begun(note.key)) for note in notes)
        return [
            self._remains(note, folder)
            for note, folder in begun
            if folder is not None and not self._may_be_committed_now(folder)
        ]

    def give_up(self, remains: Remains) -> None:
        """As the one writer would, before it writes the folder anew."""
        self.clear(remains.folder)

    def _remains(self, note: ObjectInfo, folder: str) -> Remains:
        present = list(self._store.list_objects(folder))
        uploads = self._store.list_unfinished(folder)
        times = [*(i.modified_at for i in present), *(u.changed_at for u in uploads)]
        is_whole = any(info.key == names.manifest_key(folder) for info in present)
        sizes = {} if is_whole else self._unfinished(folder)
        return Remains(
            attempt=names.attempt_of(folder),
            what="it is committed, and left a note" if is_whole else "it was not committed",
            folder=folder,
            size_bytes=sum(sizes.values()) + sum(upload.size_bytes for upload in uploads),
            changed_at=max([note.modified_at, *times]),
        )

    def _unfinished(self, folder: str) -> dict[str, int]:
        """Size of every object there that no save needs, whole or in the trash, by its name."""
        present = sizes_in(self._store, folder)
        kept = self._kept_saves(folder, present)
        return {
            name: size
            for name, size in present.items()
            if names.parse_pin(name) is None and names.save_of_shard(name) not in kept
        }

    def set_aside(self, folder: str, aside: str) -> None:
        """Copies, then their manifest, then the manifest in place goes first: a rerun ends it."""
        marker = self._store.read(names.manifest_key(folder))
        moving = self._moving(folder, marker)
        for name in moving:
            self._store.copy(f"{folder}/{name}", f"{aside}/{name}")
        self._store.write(names.manifest_key(aside), marker)
        gone = (names.manifest_key(folder), *(f"{folder}/{name}" for name in moving))
        self._store.delete(gone)

    def bring_back(self, aside: str, folder: str) -> None:
        """Copies, then the manifest if none is there, then what lies aside goes."""
        marker = self._store.read(names.manifest_key(aside))
        if not self._is_in_place(folder, marker):
            for name in sizes_in(self._store, aside):
                if name != names.MANIFEST:
                    self._store.copy(f"{aside}/{name}", f"{folder}/{name}")
            self._store.create(names.manifest_key(folder), marker)
        self._delete_aside(aside)

    def erase(self, aside: str, folder: str) -> int:
        """The shards first, while the manifest in the trash still knows them."""
        try:
            marker = self._store.read(names.manifest_key(aside))
        except ObjectNotFoundError:
            return self._delete_aside(aside)
        manifest = Manifest.from_json(marker, f"{self._store.uri}/{aside}")
        try:
            present = manifest_in(self._store, folder)
        except IntegrityError:
            return 0  # it may be this very save: wait until that one is out of the way
        freed = 0
        if present is None or present.save_id != manifest.save_id:
            freed = self._delete_shards(folder, manifest)
        return freed + self._delete_aside(aside)

    def _moving(self, folder: str, marker: bytes) -> list[str]:
        """Names of the files that must be copied: all but shards that no other save can name."""
        present = sizes_in(self._store, folder)
        present.pop(names.MANIFEST, None)
        pins = [name for name in present if names.parse_pin(name)]
        try:
            manifest = Manifest.from_json(marker, f"{self._store.uri}/{folder}")
        except IntegrityError:
            # nobody can tell any more which files are its own: all that no other save needs
            kept = self._kept_saves(folder, present)
            return [name for name in present if names.save_of_shard(name) not in kept]
        own = _shared_names((entry.path for entry in manifest.files), manifest.save_id)
        here = [name for name in own if name in present or self._store.stat(f"{folder}/{name}")]
        return [*here, *pins]

    def _is_in_place(self, folder: str, marker: bytes) -> bool:
        """Whether this very manifest is there, from a restore that died.

        Raises:
            ObjectExistsError: another one is.
        """
        try:
            present = self._store.read(names.manifest_key(folder))
        except ObjectNotFoundError:
            return False
        if present != marker:
            raise ObjectExistsError("something is there already", f"{self._store.uri}/{folder}")
        return True

    def _delete_shards(self, folder: str, manifest: Manifest) -> int:
        """Shards of this save, and copies left in place by a purge that died; returns bytes."""
        present = sizes_in(self._store, folder)
        own = [entry.path for entry in manifest.files if entry.path in present]
        shared = set(_shared_names(own, manifest.save_id))
        has_begun = self._store.stat(names.begun_key(folder)) is not None
        is_whole = self._store.stat(names.manifest_key(folder)) is not None
        is_free = not has_begun and not is_whole
        doomed = [name for name in own if name not in shared or is_free]
        self._store.delete([f"{folder}/{name}" for name in doomed])
        return sum(present[name] for name in doomed if name not in shared)

    def _delete_aside(self, aside: str) -> int:
        """The folder in the trash is gone, its manifest first; returns bytes."""
        sizes = sizes_in(self._store, aside)
        ordered = sorted(sizes, key=lambda name: name != names.MANIFEST)
        self._store.delete([f"{aside}/{name}" for name in ordered])
        return sum(sizes.values())

    def _kept_saves(self, folder: str, present: Iterable[str]) -> set[str]:
        """Of the saves whose shards lie in the folder, those that a draft or the trash still needs.

        Each is asked for by its name: a listing may not show yet what was set aside just now.
        """
        step = names.parse_step(folder)
        saves = {save for name in present if (save := names.save_of_shard(name)) is not None}
        return {save for save in saves if step is not None and self._is_kept(step, save)}

    def _is_kept(self, step: int, save_id: str) -> bool:
        aside = (names.set_aside_dir(parent, step, save_id) for parent in ASIDE)
        keys = (names.draft_key(save_id), *(names.manifest_key(folder) for folder in aside))
        return any(self._store.stat(key) is not None for key in keys)

    def _may_be_committed_now(self, folder: str) -> bool:
        """Whether a draft of the step is there, whose note is its manager's."""
        step = names.parse_step(folder)
        return step is not None and bool(drafts_at(self._store, step))


def _shared_names(files: Iterable[str], save_id: str) -> list[str]:
    """Those that another save of the same step may use as well."""
    return [name for name in files if names.save_of_shard(name) != save_id]


def _files_in(folder: Path) -> Iterator[str]:
    """Names of all files below, with slashes."""
    for base, _, files in os.walk(folder):
        inside = os.path.relpath(base, folder)
        yield from (name if inside == "." else f"{inside}/{name}" for name in files)
