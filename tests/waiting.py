"""Waiting for something to become true, with a deadline instead of a sleep of a guessed length."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 300.0
"""Longer than anything takes that works, also on a machine with much else to do."""


def wait_for(look: Callable[[], T | None], *, timeout_s: float = PATIENCE_S) -> T:
    """The first thing `look` returns that is not None or False."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.005
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)
    raise AssertionError(f"{look} had nothing to show within {timeout_s} s; last: {found!r}")
