"""Looks for what will hurt a run, at its root and where its copies go; leaves nothing behind.

a place        may be read, written, created in, deleted from; its clock; its room; what the
store does; what its bucket does by itself (`storage.s3_checkup`)
hf://          token, right to write, branch (`storage.hub_checkup`)
a root         others that delete in it (`storage.second_deleters`), its manager, what waits
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, RayCkptError
from ray_ckpt.core.findings import Finding, has_problem, ok, problem, warning
from ray_ckpt.core.garbage import duration
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.retention import CLOCK_SKEW_S
from ray_ckpt.core.room import room_problem
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.hub.checkup import look_at_repository
from ray_ckpt.storage.lease import MANAGER, PATIENCE_S, is_dead, last_heard_of
from ray_ckpt.storage.s3.checkup import look_at_bucket, look_at_store
from ray_ckpt.storage.s3.store import S3Store
from ray_ckpt.storage.second_deleters import look_for_second_deleters

_NOTABLE_SKEW_S = 60.0


def look_at_root(catalog: Catalog) -> list[Finding]:
    """Everything about the root of a run that can be seen from this host."""
    uri = catalog.uri
    found = look_at_place(catalog.store)
    found += _told(uri, lambda: look_for_second_deleters(catalog.store))
    found += _told(uri, lambda: _of_the_run(catalog))
    return found


def look_at_destination(destination: str, *, copy_bytes: int) -> list[Finding]:
    """Everything about a place that copies of so many bytes go to."""
    if names.is_repository(destination):
        return _told(destination, lambda: look_at_repository(destination))
    try:
        store = open_catalog(destination).store
    except RayCkptError as error:
        return [_of_error(error, destination)]
    return [*look_at_place(store), *_told(store.uri, lambda: _room_for(store, copy_bytes))]


def look_at_place(store: Store) -> list[Finding]:
    """What can be done there, and what the store does by itself."""
    if isinstance(store, LocalStore) and not Path(store.uri).is_dir():
        return [_of_missing_folder(Path(store.uri))]
    found = _told(store.uri, lambda: _verbs(store))
    if isinstance(store, S3Store) and not has_problem(found):
        found += _told(store.uri, lambda: look_at_store(store))
        found += _told(store.uri, lambda: look_at_bucket(store, now=time.time()))
    return found


def _told(where: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What was found; what could not be looked at is a problem."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except RayCkptError as error:
        found.append(_of_error(error, where))
    return found


def _of_error(error: RayCkptError, where: str) -> Finding:
    do = error.do or "see to that first, then the same command again"
    return problem(error.what.partition("\n")[0], error.where or where, do)


def _of_missing_folder(folder: Path) -> Finding:
    if folder.exists():
        return problem("a file is here, and no folder", str(folder), "name another place")
    parent = next(parent for parent in folder.parents if parent.exists())
    if os.access(parent, os.W_OK | os.X_OK):
        return ok("not there yet; the first to write makes it", str(folder))
    return problem(
        f"not there, and this user may not make it in {parent}",
        str(folder),
        "make the folder, or write somewhere else",
    )


def _verbs(store: Store) -> Iterator[Finding]:
    """Every verb that matters, on two objects of its own."""
    folder = f"{names.PROBES}/{uuid.uuid4().hex}"
    keys = [f"{folder}/written", f"{folder}/created"]
    try:
        before = time.time()
        store.write(keys[0], b"ray-ckpt doctor")
        after = time.time()
        info = store.stat(keys[0])
        if info is None or store.read(keys[0]) != b"ray-ckpt doctor":
            yield problem("what was written is not read", store.uri, "use another store")
        store.create(keys[1], b"first")
        if not _is_refused(store, keys[1]):
            yield problem("an object is created twice", store.uri, "use another store")
        store.delete(keys)
        if store.stat(keys[0]) is not None:
            yield problem("what was deleted is still there", store.uri, "use another store")
        yield ok("can be read, written and deleted from", store.uri)
        if info is not None:
            yield _of_clocks(store, info.modified_at, before, after)
    finally:
        with suppress(RayCkptError):
            store.delete(keys)


def _is_refused(store: Store, key: str) -> bool:
    try:
        store.create(key, b"second")
    except ObjectExistsError:
        return True
    return False


def _of_clocks(store: Store, told_at: float, before: float, after: float) -> Finding:
    """Stores tell whole seconds."""
    skew_s = min(told_at + 1 - before, 0.0) + max(told_at - after, 0.0)
    text = f"its clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this host's"
    do = "let both follow a time server (chrony, systemd-timesyncd)"
    if abs(skew_s) >= CLOCK_SKEW_S:
        return problem(f"{text}: what is young may be taken for old, and removed", store.uri, do)
    if abs(skew_s) >= _NOTABLE_SKEW_S:
        return warning(text, store.uri, do)
    return ok("its clock and this host's agree", store.uri)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _room_for(store: Store, copy_bytes: int) -> Iterator[Finding]:
    free_bytes = store.free_bytes() if Path(store.uri).is_dir() else None
    if free_bytes is None:
        return
    if free_bytes < 2 * copy_bytes:
        text = f"{_gb(free_bytes)} are free, the largest copy has {_gb(copy_bytes)}"
        yield problem(f"no room for two copies: {text}", store.uri, "free space there")
    else:
        yield ok(f"{_gb(free_bytes)} are free", store.uri)


def _of_the_run(catalog: Catalog) -> Iterator[Finding]:
    """Its room, its manager, and what waits for one."""
    observed = catalog.observe().at(time.time())
    full = room_problem(observed)
    if full is not None:
        yield problem(full, catalog.uri, f"ray-ckpt gc {catalog.uri} --apply")
    elif observed.free_bytes is not None:
        yield ok(f"{_gb(observed.free_bytes)} are free", catalog.uri)
    yield _of_manager(catalog, observed)


def _of_manager(catalog: Catalog, observed: Observation) -> Finding:
    waiting = _waiting(observed)
    heard = last_heard_of(catalog.store, MANAGER)
    drain = f"start one with the run's jobs, or ray-ckpt drain {catalog.uri}"
    if heard is None or heard[0].is_released or is_dead(heard[0]):
        if waiting:
            return problem(f"{waiting}, and no manager is alive", catalog.uri, drain)
        return ok("no manager is alive, and nothing waits for one", catalog.uri)
    holder, beat_at = heard
    who = f"its manager, process {holder.pid} on {holder.host},"
    silent_s = time.time() - beat_at
    if silent_s > PATIENCE_S + _NOTABLE_SKEW_S:
        return problem(f"{who} was last heard of {duration(silent_s)} ago", catalog.uri, drain)
    return ok(f"{who} was heard of {max(silent_s, 0.0):.0f} s ago", catalog.uri)


def _waiting(observed: Observation) -> str:
    """What a manager would have to do, as the subject of a sentence; empty for nothing."""
    asked = len(observed.requests) + len(observed.commands)
    if asked:
        return f"{asked} requests wait"
    planned = plan(observed, now=time.time()).actions
    return f"{len(planned)} actions wait, first: {planned[0].title}" if planned else ""
