"""Files of an export that go to where it will be copied while the other files are being made.

    a file is finished   ->   sent, and seen by nobody   ->   the copy's one commit finds it there

What is sent too early costs nothing but its bytes: a copy that fails, or that nobody wants any
more, shows none of them. What could not be sent is sent with the copy; the export never fails
because of it, and waits at its end for the one file that is under way.
"""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

from ray_ckpt.core import names
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.hub.upload import send_to_hub
from ray_ckpt.storage.parts import ExportParts, Part

log = logging.getLogger("ray_ckpt")
_LOOK_EVERY_S = 1.0

Send = Callable[[Store, Part, str], None]
SENDERS: Mapping[str, Send] = {"hf": send_to_hub}
"""By scheme: places that take files before they are shown."""


@contextmanager
def handing_over(store: Store, parts: ExportParts, destinations: Sequence[str]) -> Generator[None]:
    """Inside, whatever is finished is sent to those destinations that take it early."""
    early = [
        place
        for place in destinations
        if place.partition("://")[0] in SENDERS and not place.startswith(names.BUCKETS)
    ]
    if not early:
        yield
        return
    hand_over = _HandOver(store, parts, early)
    thread = threading.Thread(target=hand_over.run, name="ray_ckpt hand over", daemon=True)
    thread.start()
    try:
        yield
    finally:
        hand_over.stop()
        thread.join()


class _HandOver:
    """One thread's work."""

    def __init__(self, store: Store, parts: ExportParts, destinations: Sequence[str]) -> None:
        self._store = store
        self._parts = parts
        self._destinations = list(destinations)
        self._sent: set[str] = set()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """No further file is begun."""
        self._stopped.set()

    def run(self) -> None:
        """Until it is stopped, or no destination takes anything."""
        while self._destinations and not self._stopped.wait(_LOOK_EVERY_S):
            try:
                self._send_finished()
            except RayCkptError as error:
                log.warning("finished files cannot be looked at, they are sent later\n%s", error)

    def _send_finished(self) -> None:
        for file, part in sorted(self._parts.finished().items()):
            if file in self._sent:
                continue
            for place in list(self._destinations):
                if self._stopped.is_set():
                    return
                self._send(part, place)
            self._sent.add(file)

    def _send(self, part: Part, place: str) -> None:
        try:
            SENDERS[place.partition("://")[0]](self._store, part, place)
            log.info("handed over %s to %s bytes=%d", part.entry.path, place, part.entry.size_bytes)
        except RayCkptError as error:
            self._destinations.remove(place)
            log.warning("%s takes no file early, it is sent with the copy\n%s", place, error)
