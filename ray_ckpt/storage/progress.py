"""How far somebody is who works, for somebody else to look at. Knows nothing of who tells whom."""

import threading


class Progress:
    """Counted by the threads that work, read by the one that tells; every call returns at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doing = "begins"
        self._done_bytes = 0
        self._total_bytes: int | None = 0

    def begin(self, doing: str, total_bytes: int | None = None) -> None:
        """From now on it does this, to so many bytes; None where it cannot count them."""
        with self._lock:
            self._doing, self._done_bytes, self._total_bytes = doing, 0, total_bytes

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done_bytes += num_bytes

    def seen(self) -> tuple[str, int, int | None]:
        """What it does, bytes done, and bytes in all."""
        with self._lock:
            return self._doing, self._done_bytes, self._total_bytes


UNTOLD = Progress()
"""For work that nobody watches."""
