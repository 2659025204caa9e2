"""What a server is asked to do wrong, planned by the test, taken by the server as requests come.

    fail    an answer of the test's choice, instead of the real one or after it
    hang    no answer, ever
    drop    the answer breaks off in the middle of its body
    spoil   its bytes are others

Knows neither HTTP nor which server it is: a request is a line "METHOD path".
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

FOR_EVER = 1 << 30
"""More requests than a test can make."""


class Wrong(Enum):
    ANSWER = auto()
    LATE_ANSWER = auto()
    """The request is carried out first, and its answer lost."""
    SILENCE = auto()
    BROKEN_BODY = auto()
    OTHER_BODY = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    match: re.Pattern[str]
    wrong: Wrong
    status: int = 500
    code: str = ""
    """S3's word for it, or the Hub's."""
    text: str = "the test asked for it"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    """Of the answer, where the server has no words of its own for it."""
    after_bytes: int = 0


class Faults:
    """The faults that are still to happen, each as often as it was planned."""

    def __init__(self) -> None:
        self._faults: list[tuple[Fault, int]] = []
        self._meanwhile: list[tuple[re.Pattern[str], Callable[[], object]]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.num_silent = 0
        """Requests so far that nobody answers."""

    def add(self, fault: Fault, *, times: int) -> None:
        with self._lock:
            self._faults.append((fault, times))

    def meanwhile(self, *, match: str, do: Callable[[], object]) -> None:
        """Right before the next request that matches is looked at, `do` is called, once."""
        with self._lock:
            self._meanwhile.append((re.compile(match), do))

    def take(self, line: str) -> Fault | None:
        """What is to go wrong with this request, after what was to happen meanwhile."""
        for do in self._due(line):
            do()
        with self._lock:
            for position, (fault, times) in enumerate(self._faults):
                if fault.match.search(line):
                    left = [(fault, times - 1)] if times > 1 else []
                    self._faults[position : position + 1] = left
                    return fault
        return None

    def forget(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._faults.clear()

    def stay_silent(self) -> None:
        """Until the server is closed."""
        self.num_silent += 1
        self._closing.wait()

    def close(self) -> None:
        """Whoever is silent gives up."""
        self._closing.set()

    def _due(self, line: str) -> list[Callable[[], object]]:
        with self._lock:
            due = [do for match, do in self._meanwhile if match.search(line)]
            self._meanwhile = [each for each in self._meanwhile if each[1] not in due]
        return due
