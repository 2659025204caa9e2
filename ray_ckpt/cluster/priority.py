"""Tasks after a save give way to training: for the CPU and for the disk.

nice 19        the scheduler prefers everybody else's threads: trainers run at Ray's own 15
idle I/O       the disk serves them when nobody else asks (Linux, where the file system heeds it)

On Linux both belong to a thread. A task works in one of its own, so that whatever Ray runs next in
the same process is as before; a process for each environment would cost seconds a task. Of threads
for torch Ray gives a task that asks for no CPU one. What a kernel does not allow is left as it is:
a task that disturbs is better than one that fails.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
NICENESS = 19
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""Number of the system call, by machine: libc has no name for it."""
_THIS_THREAD = 1, 0
_IDLE = 3 << 13


def giving_way(work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread that comes last; the caller's stays as it is."""
    with ThreadPoolExecutor(1, "ray_ckpt action", initializer=give_way) as threads:
        return threads.submit(work).result()


def give_way() -> None:
    """The calling thread, and all that it starts, come last from now on; twice is harmless."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    number = _IOPRIO_SET.get(platform.machine())
    if sys.platform.startswith("linux") and number is not None:
        ctypes.CDLL(None).syscall(number, *_THIS_THREAD, _IDLE)
