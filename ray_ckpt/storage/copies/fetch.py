"""A checkpoint or an export from anywhere becomes a folder of this host: all of it or nothing.

    s3://bucket/run/exports/hf/step-5    every file proven by the manifest that lies there
    /path/...                            the same
    hf://org/repo[@revision]             every file proven by what the Hub says of it

Files arrive in a private folder beside the target, which is renamed once all are there and synced.
A killed one goes on: what has arrived whole stays.
"""

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, ObjectExistsError, UsageError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.backends import open_folder
from ray_ckpt.storage.digests import algorithm_of, describe_file
from ray_ckpt.storage.disk.posix import (
    make_folder,
    sync_file,
    sync_folder,
    translated,
    write_synced,
)
from ray_ckpt.storage.hub.download import download, pinned
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.proven import Origin, bring_all
from ray_ckpt.storage.room import expect_room


def fetch(source: str, target: Path, *, progress: Progress = UNTOLD) -> None:
    """`target` is a folder with every file that is at `source`, synced.

    Raises:
        ObjectExistsError: something is at `target`; it is untouched.
        UsageError: there is nothing at `source` that could be proven.
        IntegrityError: a file is not what was published.
        ConflictError: another fetch to `target` is at work.
    """
    if target.exists():
        raise ObjectExistsError(
            "something is there already", str(target), "it is untouched", "choose another folder"
        )
    with translated(target):
        make_folder(target.absolute().parent)
    with _attempt(target.absolute()) as attempt:
        if names.is_repository(source):
            progress.begin(f"fetches {source}")
            download(pinned(source), attempt)
        else:
            _fill(source, attempt, progress)
        for path in sorted(attempt.rglob("*"), reverse=True):
            sync_file(path)
        sync_folder(attempt)
        attempt.rename(target)
        sync_folder(target.absolute().parent)


@contextlib.contextmanager
def _attempt(target: Path) -> Generator[Path]:
    """The private folder, held by this process alone; it stays if the work inside fails."""
    attempt = target.with_name(f".{target.name}.fetching")
    with translated(target):
        attempt.mkdir(exist_ok=True)
    descriptor = os.open(attempt, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield attempt
    except BlockingIOError as error:
        raise ConflictError(
            "another process fetches to it",
            str(target),
            "nothing was changed",
            "wait for it, or choose another folder",
        ) from error
    finally:
        os.close(descriptor)


def _fill(source: str, attempt: Path, progress: Progress) -> None:
    catalog, folder = open_folder(source)
    store = catalog.store
    manifest = manifest_in(store, folder)
    if manifest is None:
        raise UsageError(
            f"there is no {names.MANIFEST}, by which what arrives could be proven",
            source,
            "nothing was fetched",
            "name a step or an export: s3://bucket/run/step-5, s3://bucket/run/exports/hf/step-5; "
            "of a folder that others wrote: ray-ckpt adopt",
        )
    missing = [e for e in manifest.files if not _is_there(attempt, e, progress)]
    expect_room(attempt, sum(entry.size_bytes for entry in missing), what=source)
    origin = Origin(
        store=store,
        folder=folder,
        safe="nothing is at the target; what is there was not changed",
        do="run the same command again; if it says the same, the copy there is damaged",
    )
    bring_all(origin, missing, attempt, progress=progress)
    write_synced(attempt / names.MANIFEST, manifest.to_json())


def _is_there(attempt: Path, entry: FileEntry, progress: Progress) -> bool:
    path = attempt / entry.path
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return False
    progress.begin(f"looks at {entry.path}", entry.size_bytes)
    return describe_file(path, entry.path, algorithm_of(entry), progress=progress) == entry
