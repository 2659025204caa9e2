"""Private folders on this host's disk, from which files are sent to an object store.

    <temp>/ray_ckpt-<attempt>-<random>/    locked by its process for as long as that lives

A folder that nobody has locked is of a process that died: the kernel gives a lock back, whoever
else uses the number of the process, and in whichever container.
"""

import fcntl
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.storage.disk.store import changed_at, size_of

_NAME = re.compile(r"ray_ckpt-(save|export|publish)-[A-Za-z0-9._-]+-[A-Za-z0-9_]+")
_locks: dict[Path, int] = {}
"""Open descriptors of the folders that this process has locked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadScratch:
    """A folder whose process is gone."""

    path: Path
    size_bytes: int
    changed_at: float
    """When something in it changed last, in seconds since the epoch."""


def make_scratch(attempt: str) -> Path:
    """A new folder for the files of `attempt`, ours until `remove_scratch` or until we die."""
    folder = Path(tempfile.mkdtemp(prefix=f"ray_ckpt-{attempt}-"))
    _locks[folder] = _open(folder)
    fcntl.flock(_locks[folder], fcntl.LOCK_SH)
    return folder


def remove_scratch(folder: Path) -> None:
    """The folder is gone. Twice is harmless."""
    shutil.rmtree(folder, ignore_errors=True)
    descriptor = _locks.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def dead_scratches() -> list[DeadScratch]:
    """What processes of this user that died have left on this host."""
    folders = (Path(entry) for entry in os.scandir(tempfile.gettempdir()) if _is_ours(entry))
    return [
        DeadScratch(path=folder, size_bytes=size_of(folder), changed_at=changed_at(folder))
        for folder in sorted(folders)
        if _is_dead(folder)
    ]


def _is_ours(entry: "os.DirEntry[str]") -> bool:
    is_folder = _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    return bool(is_folder) and entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _is_dead(folder: Path) -> bool:
    """Whether no process has it locked; one that cannot be asked lives."""
    try:
        descriptor = _open(folder)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
