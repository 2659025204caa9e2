"""Looks at one root again and again, and reads only what has changed since.

    every look      lists names and records, and the folders whose marks have changed
    a close look    lists every file: comes first, and again every `CLOSE_EVERY_S`

A manifest or a record is read once for each of its versions. What marks do not show is seen at the
next close look: a file that was changed in place and, on an object store, a pin, a lost shard, a
folder that was adopted, a step that was in the trash already and was saved anew between two looks.
All that is remembered can be dropped at any time.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.draft import Draft
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.gathering import draft_views
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, ExportView, Observation
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import ObjectInfo, Store
from ray_ckpt.storage.drafts import Drafts
from ray_ckpt.storage.listing import ASIDE, Told, draft_view, told_aside, view_in_place
from ray_ckpt.storage.marks import Mark, marks_of
from ray_ckpt.storage.pins import read_pins
from ray_ckpt.storage.read_once import ReadOnce
from ray_ckpt.storage.records import Records, Run

log = logging.getLogger("ray_ckpt")
CLOSE_EVERY_S = 60.0
_DEPTHS = {"": 1, names.EXPORTS: 3, **dict.fromkeys(ASIDE, 3)}
"""Segments of the key of a folder with a manifest, by where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """The files of one folder."""

    manifest: ObjectInfo | None = None
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the last look at one folder made of it."""

    mark: Mark
    manifest: ObjectInfo | None
    view: CheckpointView | ExportView | None
    verify_key: str | None
    """Key of the record that would say that this very content was verified."""
    is_settled: bool
    """False while somebody may be in the middle of changing it."""


class Observer:
    """Owns what was read before; one caller, one thread."""

    def __init__(self, store: Store, records: Records, drafts: Drafts) -> None:
        self._store = store
        self._records = records
        self._drafts = drafts
        self._manifests = ReadOnce(store, _light_manifest)
        self._seen: dict[str, _Seen] = {}
        self._close_at: float | None = None

    def observe(self, *, now: float) -> Observation:
        """All that storage shows of the run; `now` in seconds, by any clock that goes on.

        What people want is read first: of what was gone then, the records say what became of it.
        """
        requests, commands = self._records.requests(), self._records.commands()
        run = self._records.run() or Run(run_id=names.run_name(self._store.uri))
        records = self._records.actions()
        drafts = self._drafts.all()
        self._look(now, drafts)
        checkpoints = [
            with_verdict(seen.view, records.get(seen.verify_key or ""))
            for seen in self._seen.values()
            if isinstance(seen.view, CheckpointView)
        ]
        exports = [s.view for s in self._seen.values() if isinstance(s.view, ExportView)]
        return Observation(
            run_id=run.run_id,
            policy=run.policy,
            checkpoints=tuple(sorted(draft_views(drafts, checkpoints), key=lambda v: v.step)),
            exports=tuple(exports),
            records=records,
            requests=requests,
            commands=commands,
            drafts=drafts,
            free_bytes=self._store.free_bytes(),
        )

    def look_closely(self) -> None:
        """The next look is a close one."""
        self._close_at = None

    # ---- which folders, and which of them anew ----

    def _look(self, now: float, drafts: Sequence[Draft]) -> None:
        is_close = self._close_at is None or not 0 <= now - self._close_at < CLOSE_EVERY_S
        marks = marks_of(self._store, _under_way(drafts))
        changed = {f for f, mark in marks.items() if is_close or not self._is_as_seen(f, mark)}
        listed = self._list_all(changed) if is_close else self._list_each(changed)
        infos = {
            folder: listed[folder].manifest if folder in changed else self._seen[folder].manifest
            for folder in marks
        }
        told = self._manifests.read(info for info in infos.values() if info is not None)
        pins = self._pins(listed)
        seen: dict[str, _Seen] = {}
        for folder, mark in marks.items():
            if folder not in changed:
                seen[folder] = self._seen[folder]
                continue
            info = infos[folder]
            view = _view(
                folder,
                told.get(info.key) if info else None,
                listed[folder],
                has_begun=bool(mark.begun),
                aside=_elsewhere(folder, mark, seen, drafts),
            )
            if isinstance(view, CheckpointView) and view.state is CheckpointState.COMMITTED:
                view = replace(view, pins=pins.get(folder, ()))
            seen[folder] = _seen(mark, info, view)
        self._seen = seen
        self._close_at = now if is_close else self._close_at

    def _is_as_seen(self, folder: str, mark: Mark) -> bool:
        seen = self._seen.get(folder)
        return seen is not None and seen.is_settled and seen.mark == mark

    # ---- their files ----

    def _pins(self, listed: Mapping[str, _Listed]) -> dict[str, tuple[Pin, ...]]:
        """Of each step in place; only where a file of that name lies is anything read."""
        steps = {folder: own.sizes for folder, own in listed.items() if "/" not in folder}
        pinned = [folder for folder, files in steps.items() if any(map(names.parse_pin, files))]
        read = at_once(lambda f: read_pins(self._store, f, steps[f]), pinned)
        return dict(zip(pinned, read, strict=True))

    def _list_each(self, folders: Iterable[str]) -> dict[str, _Listed]:
        """One listing a folder: for a few of them."""
        folders = list(folders)
        found = at_once(lambda folder: list(self._store.list_objects(folder)), folders)
        return {f: _listed(f, infos) for f, infos in zip(folders, found, strict=True)}

    def _list_all(self, folders: Iterable[str]) -> dict[str, _Listed]:
        """One listing for everything below each parent."""
        listed = dict.fromkeys(folders, _Listed())
        for parent, depth in _DEPTHS.items():
            prefix = "" if parent else names.STEP_PREFIX
            if any(_parent(folder) == parent for folder in listed):
                infos = self._store.list_objects(parent, prefix=prefix)
                for folder, own in itertools.groupby(infos, lambda i, d=depth: _head(i.key, d)):
                    if folder in listed:
                        listed[folder] = _listed(folder, own)
        return listed


def _listed(folder: str, infos: Iterable[ObjectInfo]) -> _Listed:
    files = {info.key.removeprefix(f"{folder}/"): info for info in infos}
    return _Listed(
        manifest=files.get(names.MANIFEST),
        sizes={name: info.size_bytes for name, info in files.items()},
    )


def _under_way(drafts: Sequence[Draft]) -> dict[str, frozenset[str]]:
    """Save ids of what may be committed any moment, by its folder."""
    found: dict[str, frozenset[str]] = {}
    for draft in drafts:
        if draft.ended is None:
            folder = names.step_dir(draft.step)
            found[folder] = found.get(folder, frozenset()) | {draft.save_id}
    return found


def _elsewhere(
    folder: str, mark: Mark, seen: Mapping[str, _Seen], drafts: Sequence[Draft]
) -> list[CheckpointView]:
    """What else there is of the step that the folder belongs to: set aside, or a draft."""
    aside = [seen[other].view for other in mark.aside]
    own = [draft_view(d.manifest) for d in drafts if names.step_dir(d.step) == folder]
    return [*(view for view in aside if isinstance(view, CheckpointView)), *own]


def _view(
    folder: str,
    told: Told,
    listed: _Listed,
    *,
    has_begun: bool,
    aside: Sequence[CheckpointView],
) -> CheckpointView | ExportView | None:
    """What the folder is; None if it is nothing of ours."""
    parent, _, name = folder.rpartition("/")
    found = names.parse_set_aside(name)
    if parent in ASIDE and found is not None:
        return None if told is None else told_aside(found[0], folder, told)
    step = names.parse_step(name)
    assert step is not None, "only folders of steps are looked at"
    if parent:
        return _export_view(parent.rpartition("/")[2], step, told)
    return view_in_place(step, told, listed.sizes, has_begun=has_begun, aside=aside)


def _export_view(name: str, step: int, told: Told) -> ExportView | None:
    if isinstance(told, IntegrityError):
        log.warning("the export %s of step-%d does not count: %s", name, step, told)
        return None
    return None if told is None else ExportView(name=name, step=step, manifest=told)


def _seen(mark: Mark, info: ObjectInfo | None, view: CheckpointView | ExportView | None) -> _Seen:
    verify_key = None
    if isinstance(view, CheckpointView) and view.state is CheckpointState.COMMITTED:
        verify_key = verify_action(view).key
    save_id = view.manifest.save_id if view is not None and view.manifest else None
    twice = any(folder.endswith(f".{save_id}") for folder in mark.aside)
    return _Seen(
        mark=mark,
        manifest=info,
        view=view,
        verify_key=verify_key,
        # the same save in two places, or a note: somebody is half-way on a store without renames
        is_settled=not mark.begun and not mark.drafts and not twice,
    )


def with_verdict(view: CheckpointView, record: ActionRecord | None) -> CheckpointView:
    """COMMITTED becomes VERIFIED where a record says that this very content was verified."""
    is_verified = record is not None and record.state is ActionState.SUCCEEDED
    if is_verified and view.state is CheckpointState.COMMITTED and view.problem is None:
        return replace(view, state=CheckpointState.VERIFIED)
    return view


def _light_manifest(text: bytes, where: str) -> Manifest | IntegrityError:
    """What it says, without its tensors: nobody decides by them."""
    try:
        return Manifest.without_tensors(text, where)
    except IntegrityError as error:
        return error


def _parent(folder: str) -> str:
    """Which entry of `_DEPTHS` lists the folder."""
    return next((parent for parent in _DEPTHS if parent and folder.startswith(f"{parent}/")), "")


def _head(key: str, depth: int) -> str:
    return "/".join(key.split("/", depth)[:depth])
