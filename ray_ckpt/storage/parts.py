"""Finished files of an export that is still being made: a killed export goes on from them.

                    a folder                                    an object store
    the file        .ray_ckpt/staging/export-<id>/<token>-<f>   in its place in the export's folder
    the note        .ray_ckpt/parts/<id>/<file>.json: its manifest entry, where it lies, its version

The note is made once the file is whole and never replaced: of several who make the same file the
first counts. An export's id stands for its source and for everything that shapes its bytes, so that
two which differ never meet.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Blocks, Store
from ray_ckpt.storage.commit import Commit
from ray_ckpt.storage.digests import algorithm_of, describe_object
from ray_ckpt.storage.progress import UNTOLD, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One finished file."""

    entry: FileEntry
    key: str
    """Where it lies."""
    version: str
    """What the store said of it when it was finished."""


class ExportParts:
    """The finished files of one export; processes on several nodes may add to them."""

    def __init__(self, store: Store, commit: Commit, *, export_id: str, folder: str) -> None:
        self._store = store
        self._commit = commit
        self.export_id = export_id
        self._folder = folder

    def finished(self) -> dict[str, Part]:
        """By file name, what is noted and still there as it was; other notes are removed."""
        noted = self._store.list_objects(names.parts_dir(self.export_id))
        found = {info.key: self._read(info.key) for info in noted}
        lost = [key for key, part in found.items() if part is None]
        self._store.delete(lost)
        return {part.entry.path: part for part in found.values() if part is not None}

    def intact(self, *, progress: Progress = UNTOLD) -> dict[str, Part]:
        """As `finished`, of those whose bytes are the ones that were written: each is read."""
        parts = self.finished()
        progress.begin("reads what was finished", sum(p.entry.size_bytes for p in parts.values()))
        broken = [f for f, part in parts.items() if not self._is_intact(part, progress)]
        self._store.delete([names.part_note(self.export_id, file) for file in broken])
        return {file: part for file, part in parts.items() if file not in broken}

    def begin(self, file: str, size_bytes: int) -> tuple[str, Blocks]:
        """Where a new file of about that size will lie, and what its bytes are given to."""
        key = self._commit.part_key(self._folder, self.export_id, file, token=uuid.uuid4().hex)
        return key, self._store.begin(key, size_bytes)

    def end(self, entry: FileEntry, key: str) -> None:
        """The file under `key` is finished; if somebody was faster, theirs is kept."""
        info = self._store.stat(key)
        if info is None:
            raise ObjectNotFoundError("somebody has removed it", f"{self._store.uri}/{key}")
        note = names.part_note(self.export_id, entry.path)
        text = {"entry": asdict(entry), "key": key, "version": info.version}
        try:
            self._store.create(note, json.dumps(text).encode())
        except ObjectExistsError:
            first = self._read(note)
            if first is not None and first.key != key:
                self._store.delete([key])

    def take(self, staging: Path, parts: Mapping[str, Part]) -> None:
        """The files are part of the folder that `staging` will become."""
        for file, part in parts.items():
            self._commit.take_part(part.key, staging / file)

    def drop(self) -> None:
        """Nothing is left of them but what a folder has taken."""
        self._store.delete(
            [i.key for i in self._store.list_objects(names.parts_dir(self.export_id))]
        )
        self._commit.drop_parts(self.export_id)

    def _is_intact(self, part: Part, progress: Progress) -> bool:
        algorithm = algorithm_of(part.entry)
        name = part.entry.path
        try:
            found = describe_object(
                self._store, part.key, name=name, algorithm=algorithm, progress=progress
            )
        except ObjectNotFoundError:
            return False
        return found == part.entry

    def _read(self, note: str) -> Part | None:
        try:
            text = json.loads(self._store.read(note))
            entry = FileEntry(**text["entry"])
            part = Part(entry=entry, key=text["key"], version=text["version"])
        except (ObjectNotFoundError, ValueError, KeyError, TypeError):
            return None
        info = self._store.stat(part.key)
        return part if info is not None and info.version == part.version else None
