"""Tasks after a save give way to training: for the CPU, for the disk and in the number of threads.

nice 19        the scheduler prefers everybody else's threads: trainers run at Ray's own 15
idle I/O       the disk serves them when nobody else asks (Linux, where the file system heeds it)
two threads    of torch's own, in worker processes that run nothing but such tasks

What a kernel does not allow is left as it is: a task that disturbs is better than one that fails.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Mapping

NICENESS = 19
ENVIRONMENT: Mapping[str, str] = {"OMP_NUM_THREADS": "2"}
"""Of the worker processes; Ray gives a process only to tasks that ask for the same environment, so
that no training task ever inherits the low priority of one of these."""
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""Number of the system call, by machine: libc has no name for it."""
_THIS_THREAD = 1, 0
_IDLE = 3 << 13


def give_way() -> None:
    """The calling thread, and all that it starts, come last from now on; twice is harmless.

    On Linux both priorities belong to a thread: the ones by which Ray talks to this process stay.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    number = _IOPRIO_SET.get(platform.machine())
    if sys.platform.startswith("linux") and number is not None:
        ctypes.CDLL(None).syscall(number, *_THIS_THREAD, _IDLE)
