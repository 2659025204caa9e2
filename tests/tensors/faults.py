"""Every change of storage that a process makes, numbered, and what happens to one of them.

    open for writing, write, fsync, mkdir, rename, link, unlink, rmdir      below one root
    write, create, upload, copy, take_over, delete                          of an S3 store

The process dies right before the change, leaving half of a write behind, or the operating system
refuses it. Each attempt is a process of its own, forked from a server that has torch loaded.
"""

import builtins
import io
import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ray_ckpt.core import names
from tests.forks import fork_server

DIED = 9
SURVIVED = 0
MAX_CHANGES = 300
NUM_AHEAD = 3
_AUDITED = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"}
_BACKGROUND = {Path(key).name for key in (names.LEASES, names.READERS, names.EVENTS, names.RUNNING)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die() -> None:
    """Like SIGKILL: nothing is flushed, nobody is told."""
    os._exit(DIED)


class Refuse:
    """The operating system says no, once."""

    def __init__(self, code: int) -> None:
        self._code = code
        self.was_asked = False

    def __call__(self) -> None:
        self.was_asked = True
        raise OSError(self._code, os.strerror(self._code))


class Countdown:
    """Calls `act` at the change with this number; the first one has number 0."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._left = number
        self._act = act

    def change(self) -> bool:
        """Whether the next change is the one; when daemon threads make theirs, nobody knows."""
        if threading.current_thread().daemon:
            return False
        self._left -= 1
        return self._left == -1

    def stop(self) -> None:
        """Nothing happens any more."""
        self._left = -1

    def tick(self) -> None:
        """A change is about to be made."""
        if self.change():
            self._act()

    def write(self, write: Callable[[Any], int], data: Any) -> int:
        """Half of the data, if this is the change."""
        if self.change():
            view = memoryview(data).cast("B")
            write(view[: view.nbytes // 2])
            self._act()
        return write(data)


def arm(root: Path, number: int, act: Callable[[], None]) -> Countdown:
    """From now on every change below `root` counts; what threads of their own write does not."""
    countdown = Countdown(number, act)
    _Watch(root, countdown).begin()
    return countdown


class _Watch:
    """Sees the changes below one root before they are made; for the rest of the process's life."""

    def __init__(self, root: Path, countdown: Countdown) -> None:
        self._root = root
        self._countdown = countdown
        self._open, self._fsync = io.open, os.fsync
        self._write, self._pwrite = os.write, os.pwrite

    def begin(self) -> None:
        io.open = builtins.open = self._opened
        os.fsync = self._synced
        os.write, os.pwrite = self._written, self._written_at
        sys.addaudithook(self._audited)

    def _opened(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "wb" or not self._counts(path):
            return self._open(path, mode, *args, **kwargs)
        return io.BufferedWriter(_File(path, self._countdown))

    def _synced(self, descriptor: int) -> None:
        if self._counts(_path_of(descriptor)):
            self._countdown.tick()
        self._fsync(descriptor)

    def _written(self, descriptor: int, data: Any) -> int:
        if not self._counts(_path_of(descriptor)):
            return self._write(descriptor, data)
        return self._countdown.write(partial(self._write, descriptor), data)

    def _written_at(self, descriptor: int, data: Any, offset: int) -> int:
        def write(data: Any) -> int:
            return self._pwrite(descriptor, data, offset)

        return (
            self._countdown.write(write, data)
            if self._counts(_path_of(descriptor))
            else write(data)
        )

    def _audited(self, event: str, args: tuple[Any, ...]) -> None:
        is_opened = event == "open" and isinstance(args[2], int) and bool(args[2] & _WRITING)
        has_folder = event in ("os.mkdir", "os.remove", "os.rmdir")
        if is_opened or event in _AUDITED:
            path, folder = args[0], args[-1] if has_folder else -1
            if self._counts(path if folder < 0 else _path_of(folder) / path):
                self._countdown.tick()

    def _counts(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        path = Path(path)
        return self._root in path.parents and not _BACKGROUND & set(path.parts)


class _File(io.FileIO):
    """A file whose writes count."""

    def __init__(self, path: Any, countdown: Countdown) -> None:
        super().__init__(path, "wb")
        self._countdown = countdown

    def write(self, data: Any) -> int:
        return self._countdown.write(super().write, data)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def arm_s3(_: Path, number: int, act: Callable[[], None]) -> None:
    """From now on every change that an S3 store makes counts, except by threads of their own."""
    from ray_ckpt.storage.s3.store import S3Store

    countdown = Countdown(number, act)

    def counted(verb: str) -> Callable[..., Any]:
        method = getattr(S3Store, verb)

        def call(self: S3Store, *args: Any, **kwargs: Any) -> Any:
            if not any(f"{names.PRIVATE}/{part}" in str(args) for part in _BACKGROUND):
                countdown.tick()
            return method(self, *args, **kwargs)

        return call

    for verb in ("write", "create", "upload", "copy", "take_over", "delete"):
        setattr(S3Store, verb, counted(verb))


def attempts(
    target: Callable[..., None], roots: Iterator[str], *args: Any
) -> Iterator[tuple[int, str]]:
    """Number and root of each attempt in which `target(root, number, *args)` met its fault.

    Some run ahead of the one that is looked at, each on a root of its own.
    """
    numbered = zip(range(MAX_CHANGES), roots, strict=False)
    begun = (_begun(target, args, number, root) for number, root in numbered)
    running = deque(itertools.islice(begun, NUM_AHEAD))
    try:
        while running:
            number, root, process = running.popleft()
            process.join()
            if process.exitcode == SURVIVED:
                assert number > 2, "there must be changes to be tried"
                return
            assert process.exitcode == DIED, f"attempt {number} ended with {process.exitcode}"
            running.extend(itertools.islice(begun, 1))
            yield number, root
    finally:
        for _, _, process in running:
            process.join()
    raise AssertionError("it makes more changes than anybody counted")


def _begun(
    target: Callable[..., None], args: tuple[Any, ...], number: int, root: str
) -> tuple[int, str, ForkServerProcess]:
    process = fork_server().Process(
        target=_run, args=(dict(os.environ), target, root, number, args)
    )
    process.start()
    return number, root, process


def _run(
    environment: dict[str, str],
    target: Callable[..., None],
    root: str,
    number: int,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # the server that forks has one of its own
    target(root, number, *args)
