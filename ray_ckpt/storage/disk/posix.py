"""Files and folders that survive a power cut, and the operating system's errors as ours."""

import contextlib
import errno
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

from ray_ckpt.core.errors import (
    AuthorizationError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    TransientError,
    UsageError,
)

T = TypeVar("T")
_TIMES = 100
"""More often in a row nobody takes a folder away that was just made."""
_KINDS: dict[int, type[StorageError]] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), AuthorizationError),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StorageFullError),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN), TransientError),
    errno.ENOENT: ObjectNotFoundError,
}
_CURES: dict[type[StorageError], str] = {
    AuthorizationError: "check owner and mode of the folder, or choose another root",
    StorageFullError: "free space, then run the same command again",
    TransientError: "look at the disk or the mount, then run the same command again",
    ObjectNotFoundError: "check the path",
}


def kind_of(error: OSError, *, other: type[StorageError] = TransientError) -> type[StorageError]:
    """Which of ours an error of an operating system is, here or at a server."""
    return _KINDS.get(error.errno or 0, other)


def sync_file(path: Path) -> None:
    """The file's bytes are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file
"""The folder's entries are on the device: a new name in it survives a power cut."""


def sync_folder_if_there(folder: Path) -> None:
    """The same; nothing, if others have taken what was written there, and the folder with it."""
    with contextlib.suppress(FileNotFoundError):
        sync_folder(folder)


def made_in(folder: Path, make: Callable[[], T]) -> T:
    """What `make` has made in the folder, which is there, and stays there as long as that does.

    Others remove a folder that they leave empty, maybe at this moment: then it is made once more.
    """
    for _ in range(_TIMES):
        try:
            make_folder(folder)
            return make()
        except FileNotFoundError:
            continue
    make_folder(folder)
    return make()


def make_folder(folder: Path) -> None:
    """The folder is there, and survives a power cut with every folder that was made on its way.

    Raises:
        NotADirectoryError: a file is on the way.
    """
    if folder.is_dir():
        return
    if folder.exists() and not folder.is_dir():  # somebody may have made it this moment
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):  # others may make it at this moment, or remove it
        folder.mkdir()
    sync_folder(folder.parent)


@contextlib.contextmanager
def translated(where: Path) -> Generator[None]:
    """Turns the operating system's errors into ours, once."""
    try:
        yield
    except RayCkptError:
        raise
    except FileExistsError as error:
        raise ObjectExistsError("something is there already", str(where)) from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise UsageError(
            f"not usable as a place for checkpoints: {error.strerror}",
            str(where),
            "nothing was changed",
            "name a folder, or one that can be made",
        ) from error
    except OSError as error:
        kind = kind_of(error, other=StorageError)
        text = error.strerror or str(error)
        raise kind(text, str(where), do=_CURES.get(kind, "")) from error


def read_into(path: Path, offset: int, buffers: Sequence[memoryview]) -> None:
    """The file's bytes from there on are in one buffer after the other, which they fill.

    Raises:
        IntegrityError: the file ends before.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not fill(descriptor, offset, buffers):
            end = offset + sum(buffer.nbytes for buffer in buffers)
            raise IntegrityError(f"ends before byte {end}", str(path))
    finally:
        os.close(descriptor)


def fill(descriptor: int, offset: int, buffers: Sequence[memoryview]) -> bool:
    """Whether the file has bytes enough from there on to fill one buffer after the other."""
    left = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
    while left:
        num_bytes = os.preadv(descriptor, left, offset)
        if not num_bytes:
            return False
        offset += num_bytes
        while left and num_bytes >= left[0].nbytes:
            num_bytes -= left.pop(0).nbytes
        if num_bytes:
            left[0] = left[0][num_bytes:]
    return True


def write_synced(path: Path, data: bytes) -> None:
    """The file holds `data`, on the device."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left.nbytes:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
