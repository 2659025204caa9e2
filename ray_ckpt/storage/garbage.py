"""What nobody needs any more, in a root and around it: found, shown, removed.

    attempts that died           staging folders, objects and uploads that were never committed
    the trash                    whose grace time is over
    writes that never ended      below .ray_ckpt/, which is ours alone
    heartbeats                   of readers and of attempts that died
    claims and probes            of who died while it created an object
    notes about finished files   of exports that nobody goes on with
    records and logs             of checkpoints that are nowhere any more
    copies that were begun       at destinations, by publishes that died there
    scratch folders              on this host, of processes that died

Only names of ours are looked at, symbolic links are never followed, and whatever is younger than
its grace stays. To remove twice is harmless: whoever dies in between, the next one ends it.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.copies import folder_of
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.garbage import ABANDONED_AFTER_S, GRACE_S, duration, spent_records, why_dead
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.retention import CLOCK_SKEW_S
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import ObjectInfo, Store, UnfinishedWrite
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.commit import Remains
from ray_ckpt.storage.disk.scratch import dead_scratches
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.trash import Trash


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """One thing that can go."""

    what: str
    where: str
    size_bytes: int
    why: str
    remove: Callable[[], object]
    """Once it has returned the thing is gone; twice is harmless."""


def find_garbage(catalog: Catalog, observed: Observation, *, now: float) -> list[Garbage]:
    """Everything that can go, in an order in which it may; `observed` shows the root as it was.

    On an object store it takes one LIST a folder of ours, two more for each attempt that has not
    ended, and one HEAD for each copy that was not made.
    """
    return [
        *_attempts(catalog, observed, now),
        *_trash(catalog, observed, now),
        *_writes(catalog.store, now),
        *_heartbeats(catalog.store, now),
        *_claims(catalog.store, now),
        *_parts(catalog.store, now),
        *_records(catalog, observed, now),
        *_copies(catalog, observed, now),
        *_scratches(now),
    ]


def remove_garbage(
    found: Sequence[Garbage], *, guard: Callable[[], None]
) -> list[tuple[Garbage, str]]:
    """What could not be removed, and why; the rest is gone.

    `guard` is called before each removal, and raises once another has taken over: that ends it.
    """
    failed: list[tuple[Garbage, str]] = []
    for garbage in found:
        guard()
        try:
            garbage.remove()
        except RayCkptError as error:
            failed.append((garbage, error.what))
    return failed


def _attempts(catalog: Catalog, observed: Observation, now: float) -> Iterator[Garbage]:
    """What is brought for a staged save waits as long as that does."""
    waiting = {names.gather_attempt(draft.save_id) for draft in observed.drafts}
    found = [r for r in catalog.commit.remains() if r.attempt not in waiting]
    # must be asked after: whatever was begun before that is no work of a trainer that came later
    holder = holder_of(catalog.store, TRAINER) if found else None
    trainer = f"process {holder.pid} on {holder.host}" if holder else None
    for remains in found:
        why = why_dead(remains.attempt, now - remains.changed_at, trainer=trainer)
        if why is not None:
            yield _attempt(catalog, remains, why)


def _attempt(catalog: Catalog, remains: Remains, why: str) -> Garbage:
    return Garbage(
        what=f"attempt {remains.attempt}",
        where=f"{catalog.uri}/{remains.folder}",
        size_bytes=remains.size_bytes,
        why=f"{remains.what}; {why}",
        remove=lambda: catalog.commit.give_up(remains),
    )


def _trash(catalog: Catalog, observed: Observation, now: float) -> Iterator[Garbage]:
    """The clock of whoever purged may be behind."""
    trash = Trash(catalog.store, catalog.commit, catalog.records)
    grace_s = observed.policy.keep.trash_grace_s + CLOCK_SKEW_S
    for trashed in trash.expired(older_than_s=grace_s, now=now):
        yield Garbage(
            what=f"trashed step-{trashed.step}",
            where=f"{catalog.uri}/{trashed.folder}",
            size_bytes=trashed.size_bytes,
            why=trashed.why,
            remove=lambda trashed=trashed: trash.erase(trashed),
        )


def _writes(store: Store, now: float) -> Iterator[Garbage]:
    for write in store.list_unfinished(names.PRIVATE):
        idle_s = now - write.changed_at
        is_an_attempts = write.key.startswith(f"{names.STAGING}/")
        if idle_s >= GRACE_S and not is_an_attempts:
            yield _write(store, write, idle_s)


def _write(store: Store, write: UnfinishedWrite, idle_s: float) -> Garbage:
    return Garbage(
        what="unfinished write",
        where=f"{store.uri}/{write.key}",
        size_bytes=write.size_bytes,
        why=f"untouched for {duration(idle_s)}",
        remove=lambda: store.abandon([write]),
    )


def _heartbeats(store: Store, now: float) -> Iterator[Garbage]:
    """Whoever reads, or carries out an action, rewrites its heartbeat every few seconds."""
    for info in (*store.list_objects(names.READERS), *store.list_objects(names.RUNNING)):
        idle_s, what = now - info.modified_at, _whose_heartbeat(info.key)
        if what is not None and idle_s >= GRACE_S:
            yield _object(store, info, what=what, why=f"no beat for {duration(idle_s)}")


def _claims(store: Store, now: float) -> Iterator[Garbage]:
    """Of those who died while they created an object, or while they found out how to."""
    for info in (*store.list_objects(names.ELECTIONS), *store.list_objects(names.PROBES)):
        idle_s = now - info.modified_at
        if idle_s >= GRACE_S:
            is_claim = info.key.startswith(f"{names.ELECTIONS}/")
            what = "claim of a dead process" if is_claim else "probe of a dead process"
            yield _object(store, info, what=what, why=f"untouched for {duration(idle_s)}")


def _parts(store: Store, now: float) -> Iterator[Garbage]:
    """Notes of an export of which no file was finished for a long time."""
    notes: dict[str, list[ObjectInfo]] = {}
    for info in store.list_objects(names.PARTS):
        export_id = names.parse_part_note(info.key)
        if export_id is not None:
            notes.setdefault(export_id, []).append(info)
    for export_id, infos in sorted(notes.items()):
        idle_s = now - max(info.modified_at for info in infos)
        if idle_s >= ABANDONED_AFTER_S:
            what = f"note about a finished file of export {export_id}"
            for info in infos:
                yield _object(store, info, what=what, why=f"untouched for {duration(idle_s)}")


def _whose_heartbeat(key: str) -> str | None:
    step, attempt = names.parse_reader(key), names.parse_running(key)
    if step is not None:
        return f"heartbeat of a reader of step-{step}"
    return f"heartbeat of attempt {attempt[1]} of action {attempt[0]}" if attempt else None


def _records(catalog: Catalog, observed: Observation, now: float) -> Iterator[Garbage]:
    """Logs first: without its record nobody can tell any more whose a log is."""
    spent = {record.action.key: record.action.title for record in spent_records(observed, now=now)}
    listed = {info.key: info for info in list(catalog.store.list_objects(names.ACTIONS))}
    kept = listed.keys() - {names.action_key(key) for key in spent}
    for info in list(catalog.store.list_objects(names.LOGS)):
        key = names.parse_log(info.key)
        if key is None or names.action_key(key) in kept or now - info.modified_at < GRACE_S:
            continue
        what = f"log of {spent.get(key, f'action {key}')}"
        yield _object(catalog.store, info, what=what, why="no record that stays tells of it")
    for key, title in spent.items():
        info = listed.get(names.action_key(key))
        if info is not None:
            what, why = f"record of {title}", "its checkpoint is nowhere any more"
            yield _object(catalog.store, info, what=what, why=why)


def _object(store: Store, info: ObjectInfo, *, what: str, why: str) -> Garbage:
    return Garbage(
        what=what,
        where=f"{store.uri}/{info.key}",
        size_bytes=info.size_bytes,
        why=why,
        remove=lambda: store.delete([info.key]),
    )


def _copies(catalog: Catalog, observed: Observation, now: float) -> Iterator[Garbage]:
    """At destinations that are roots like this one, of copies that were never finished."""
    folders: dict[str, set[str]] = {}
    for record in observed.records.values():
        action = record.action
        is_begun = action.kind is ActionKind.PUBLISH and record.attempts > 0
        if is_begun and record.state is not ActionState.SUCCEEDED:
            folders.setdefault(action.destination or "", set()).add(folder_of(action))
    for destination, begun in sorted(folders.items()):
        if not names.is_repository(destination):
            yield from _at(destination, begun, now)


def _at(destination: str, folders: Collection[str], now: float) -> Iterator[Garbage]:
    """Nothing where the destination cannot be looked at: whoever publishes there hears of it."""
    try:
        target = open_catalog(destination)
        found = target.commit.remains()
    except RayCkptError:
        return
    for remains in found:
        why = why_dead(remains.attempt, now - remains.changed_at, trainer=None)
        if why is not None and (names.is_copy(remains.attempt) or remains.folder in folders):
            yield _attempt(target, remains, why)


def _scratches(now: float) -> Iterator[Garbage]:
    for scratch in dead_scratches():
        if now - scratch.changed_at >= GRACE_S:
            yield Garbage(
                what="scratch folder",
                where=str(scratch.path),
                size_bytes=scratch.size_bytes,
                why=f"its process is gone; untouched for {duration(now - scratch.changed_at)}",
                remove=lambda path=scratch.path: shutil.rmtree(path, ignore_errors=True),
            )
