"""Saves that lie on their nodes, as the root knows them: what is where, and what became of it.

    .ray_ckpt/drafts/<save id>.json          written once, by the trainer, in place of a commit
    .ray_ckpt/drafts/<save id>.ended.json    written once: committed or abandoned; the first counts

Whoever has ended a draft leaves both until nothing of it is left on any node.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Ended, How
from ray_ckpt.core.errors import IntegrityError, ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.commit import Commit
from ray_ckpt.storage.read_once import ReadOnce

log = logging.getLogger("ray_ckpt")


class Drafts:
    """Reads and writes these objects of one root."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self._store = store
        self._commit = commit
        self._drafts = ReadOnce(store, _draft_or_tell)
        self._ended = ReadOnce(store, _ended_or_tell)

    def add(self, draft: Draft) -> None:
        """The save is staged: whoever manages the root brings it there."""
        self._store.create(names.draft_key(draft.save_id), draft.to_json())

    def all(self) -> tuple[Draft, ...]:
        """Every draft, manifests without the index of their tensors, and how far it has come."""
        infos = list(self._store.list_objects(names.DRAFTS))
        found = self._drafts.read(i for i in infos if names.parse_draft(i.key) is not None)
        told = self._ended.read(info for info in infos if names.parse_draft(info.key) is None)
        drafts = (
            replace(draft, ended=told.get(names.ended_key(draft.save_id)))
            for draft in found.values()
            if draft is not None
        )
        return tuple(replace(draft, brought=self._brought(draft)) for draft in drafts)

    def read(self, save_id: str) -> Draft:
        """One draft, with its whole manifest.

        Raises:
            ObjectNotFoundError: there is none.
        """
        key = names.draft_key(save_id)
        draft = Draft.from_json(self._store.read(key), f"{self._store.uri}/{key}")
        draft = replace(draft, ended=self._read_ended(save_id))
        return replace(draft, brought=self._brought(draft))

    def is_there(self, save_id: str) -> bool:
        """Whether the save is staged, or was and has ended since."""
        return self._store.stat(names.draft_key(save_id)) is not None

    def end(self, save_id: str, how: How, *, why: str, at: float) -> Ended:
        """The draft has ended so, unless somebody has said before how it did; returns that."""
        ended = Ended(how=how, reason=why, at=at)
        try:
            text = json.dumps(asdict(ended), sort_keys=True).encode()
            self._store.create(names.ended_key(save_id), text)
        except ObjectExistsError:
            return self._read_ended(save_id) or ended
        return ended

    def discard_parts(self, draft: Draft) -> None:
        """Nothing of an abandoned draft lies at the root."""
        self._store.delete([self._waiting_key(draft, name) for name in draft.brought])

    def forget(self, draft: Draft) -> None:
        """Nobody knows of the draft any more."""
        # the draft must go first: without its end it would be brought once more
        keys = [names.draft_key(draft.save_id), names.ended_key(draft.save_id)]
        self._store.delete(keys)

    def _brought(self, draft: Draft) -> frozenset[str]:
        """Files that have arrived; by their size, since none is seen there before it is whole."""
        if draft.ended is not None and draft.ended.how == "committed":
            return frozenset()
        keys = {e.path: self._waiting_key(draft, e.path) for e in draft.manifest.files}
        sizes: dict[str, int] = {}
        for folder in _folders(keys.values()):
            sizes |= {info.key: info.size_bytes for info in self._store.list_objects(folder)}
        files = draft.manifest.files
        return frozenset(e.path for e in files if sizes.get(keys[e.path]) == e.size_bytes)

    def _waiting_key(self, draft: Draft, name: str) -> str:
        return self._commit.waiting_key(names.step_dir(draft.step), draft.save_id, name)

    def _read_ended(self, save_id: str) -> Ended | None:
        try:
            return Ended(**json.loads(self._store.read(names.ended_key(save_id))))
        except ObjectNotFoundError:
            return None


def drafts_at(store: Store, step: int) -> list[Manifest]:
    """The manifests-to-be of the step's drafts, without the index of their tensors."""
    infos = (i for i in store.list_objects(names.DRAFTS) if names.parse_draft(i.key) is not None)
    found = ReadOnce(store, _draft_or_tell).read(infos).values()
    return [draft.manifest for draft in found if draft is not None and draft.step == step]


def _folders(keys: Iterable[str]) -> set[str]:
    """The attempt's own folder and, on an object store, the step's."""
    private = f"{names.STAGING}/"
    return {
        "/".join(key.split("/", 3)[:3]) if key.startswith(private) else key.partition("/")[0]
        for key in keys
    }


def _draft_or_tell(text: bytes, where: str) -> Draft | None:
    try:
        return Draft.from_json(text, where, manifest=Manifest.without_tensors)
    except IntegrityError as error:
        log.warning("%s", error)
        return None


def _ended_or_tell(text: bytes, where: str) -> Ended | None:
    try:
        return Ended(**json.loads(text))
    except (ValueError, TypeError) as error:
        log.warning("%s cannot be read: %r", where, error)
        return Ended(how="abandoned", reason=f"{where} cannot be read", at=0.0)
