"""Which folders may hold a manifest of ours, and a mark for each that changes when it does.

                       the mark of a folder is made of
    a folder of files  what the file system says of the folder and of its manifest
    an object store    the note that a save has begun, what of the same step was set aside, and
                       drafts of it: its writers always leave one of the three. A manifest that is
                       set aside is listed

Nothing is read, and no file of a step is listed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ray_ckpt.core import names
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.listing import ASIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """As long as it stays the same, a folder need not be listed again."""

    folder: str | None
    manifest: str | None
    begun: str | None
    """Version of the note that a save has begun; nothing without one."""
    aside: frozenset[str] = frozenset()
    """Folders in the trash and the quarantine that hold saves of the same step."""
    drafts: frozenset[str] = frozenset()
    """Saves of the same step that are being brought from their nodes."""


def marks_of(store: Store, drafts: Mapping[str, frozenset[str]]) -> dict[str, Mark]:
    """The mark of every folder that may hold a manifest; what is set aside comes first.

    `drafts` are save ids by the folder that each is to become.
    """
    has_marks = store.mark("") is not None
    versions = {} if has_marks else _versions(store)
    aside = _folders_aside(store) if has_marks else _parents(versions)
    saves: dict[int, set[str]] = {}
    for folder in aside:
        found = names.parse_set_aside(folder.rpartition("/")[2])
        if found is not None:
            saves.setdefault(found[0], set()).add(folder)
    folders = (*(folder for of_step in saves.values() for folder in of_step), *_in_place(store))
    marks = {folder: _mark(store, folder, versions, saves) for folder in folders}
    found = {f: replace(marks[f], drafts=saves) for f, saves in drafts.items() if f in marks}
    return {**marks, **found}


def _mark(
    store: Store,
    folder: str,
    versions: Mapping[str, str],
    saves: Mapping[int, Collection[str]],
) -> Mark:
    manifest, note = names.manifest_key(folder), names.begun_key(folder)
    version = store.mark(manifest) or versions.get(manifest)
    step = names.parse_step(folder)
    return Mark(
        folder=store.mark(folder),
        manifest=version,
        begun=None if version else store.mark(note) or versions.get(note),
        aside=frozenset() if step is None else frozenset(saves.get(step, ())),
    )


def _in_place(store: Store) -> Iterator[str]:
    """Folders of steps and of exports."""
    found, exports = at_once(store.list_folders, ("", names.EXPORTS))
    yield from filter(_is_step, found)
    parents = [f"{names.EXPORTS}/{name}" for name in exports]
    for parent, children in zip(parents, at_once(store.list_folders, parents), strict=True):
        yield from (f"{parent}/{name}" for name in children if _is_step(name))


def _folders_aside(store: Store) -> list[str]:
    return [f"{parent}/{name}" for parent in ASIDE for name in store.list_folders(parent)]


def _parents(keys: Iterable[str]) -> list[str]:
    """By the objects in them: an object store may list folders that are just gone."""
    return sorted({key.rpartition("/")[0] for key in keys if key.startswith(tuple(ASIDE))})


def _versions(store: Store) -> dict[str, str]:
    """Version of each note that a save has begun and of each manifest that is set aside."""
    folders = (names.STAGING, *ASIDE)
    listed = at_once(lambda folder: list(store.list_objects(folder)), folders)
    return {info.key: info.version for infos in listed for info in infos}


def _is_step(name: str) -> bool:
    return names.parse_step(name) is not None
