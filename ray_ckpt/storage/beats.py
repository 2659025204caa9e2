"""An attempt tells that it lives and how far it is; whoever manages the root listens.

    .ray_ckpt/running/<key>-a<n>.json     rewritten every few seconds by a thread of the attempt's
                                          process, removed by it at the end

What an attempt that died has left is swept by the manager. No attempt fails because a beat could
not be written.
"""

import contextlib
import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.errors import ObjectNotFoundError, RayCkptError
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.memory import peak_rss_bytes
from ray_ckpt.storage.progress import Progress

_START_FIELD = 19
"""Of /proc/<pid>/stat, counted after the program's name: clock ticks from boot to its start."""


def nobody(beat: Beat) -> None:
    """Nobody else hears it."""


@contextlib.contextmanager
def beating(
    store: Store,
    key: str,
    *,
    first: Beat,
    every_s: float,
    heard: Callable[[Beat], None] = nobody,
) -> Generator[Progress]:
    """What the block counts there is told under `key`, every `every_s` seconds, while it runs.

    `heard` is called with each beat, in the thread that tells.
    """
    progress, ended = Progress(), threading.Event()

    def tell() -> None:
        for count in itertools.count():
            beat = _beat(replace(first, count=count), progress)
            with contextlib.suppress(RayCkptError):  # the next beat may pass
                store.write(key, beat.to_json())
            heard(beat)
            if ended.wait(every_s):
                return

    thread = threading.Thread(target=tell, name="ray_ckpt beat", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(RayCkptError):  # the manager sweeps it
            store.delete([key])


def first_beat(*, attempt_started_at: float, node: str | None) -> Beat:
    """What this process says of itself before it has done anything."""
    return Beat(
        attempt_started_at=attempt_started_at,
        host=socket.gethostname(),
        node=node,
        pid=os.getpid(),
        process_born=process_born(os.getpid()) or "",
    )


def process_born(pid: int) -> str | None:
    """When a process of this host began, in its kernel's words; None if it is gone.

    Empty where the kernel does not say: such a process is never taken for another one's.
    """
    if not sys.platform.startswith("linux"):
        return ""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the program's name, in brackets, may hold blanks and brackets
    return text.rpartition(")")[2].split()[_START_FIELD]


def read_beat(store: Store, key: str) -> Beat | None:
    """The last beat under `key`; None if there is none, or it cannot be read. One read."""
    with contextlib.suppress(ObjectNotFoundError, ValueError, TypeError):
        return Beat.from_json(store.read(key))
    return None


def read_beats(store: Store, keys: Iterable[str]) -> dict[str, Beat]:
    """The last beat under each key that has one; several at a time."""
    keys = list(keys)
    beats = zip(keys, at_once(lambda key: read_beat(store, key), keys), strict=True)
    return {key: beat for key, beat in beats if beat is not None}


def all_beats(store: Store) -> dict[tuple[str, int], Beat]:
    """By action's key and attempt, the last beat of what runs, or died; for people to look at."""
    keys = {info.key: names.parse_running(info.key) for info in store.list_objects(names.RUNNING)}
    found = read_beats(store, (key for key, attempt in keys.items() if attempt is not None))
    return {attempt: found[key] for key, attempt in keys.items() if attempt and key in found}


def sweep_beats(store: Store, *, except_for: Iterable[str]) -> list[str]:
    """Keys of the beats that are gone now: all but these."""
    kept = set(except_for)
    left = sorted(i.key for i in store.list_objects(names.RUNNING) if i.key not in kept)
    store.delete(left)
    return left


def _beat(beat: Beat, progress: Progress) -> Beat:
    doing, done_bytes, total_bytes = progress.seen()
    return replace(
        beat,
        doing=doing,
        done_bytes=done_bytes,
        total_bytes=total_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )
