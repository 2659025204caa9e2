"""Ctrl-C that nobody can swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a destructor or a
callback of another library it is printed, if at all, and lost, and a loop goes on for ever.
"""

import contextlib
import signal
from collections.abc import Callable, Generator
from types import FrameType


@contextlib.contextmanager
def kept_interrupt() -> Generator[Callable[[], None]]:
    """A call that raises KeyboardInterrupt if Ctrl-C was pressed, also if that was swallowed.

    Only in the main thread.
    """
    is_pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        is_pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if is_pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
