"""Who reads a step at this moment: whoever purges looks here first.

    .ray_ckpt/readers/500.<token>.json     rewritten every few seconds while step 500 is read,
                                           removed by its reader at the end

No two hosts' clocks are compared: who wants to purge watches the counter in the file itself. A
reader whose process on this host is gone is dead at once; one that has not counted on for
`lease.PATIENCE_S` seconds is dead as well. Nothing here can fail a load: a root that can only be
read is read without a heartbeat.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from dataclasses import asdict, replace

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectNotFoundError, RayCkptError
from ray_ckpt.storage import lease
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.lease import Holder, parse_holder

log = logging.getLogger("ray_ckpt")


@contextlib.contextmanager
def reading(store: Store, step: int, *, who: str) -> Generator[None]:
    """While the block runs, no purge takes the step, as long as this process lives.

    `who` is told to a person whose purge has to wait: `load`, `export hf-bf16`. The block must read
    the manifest anew: a purge may have come before.
    """
    token = uuid.uuid4().hex
    holder = Holder(owner=who, token=token, host=socket.gethostname(), pid=os.getpid(), beat=0)
    key, ended = names.reader_key(step, token), threading.Event()
    is_told = _tell(store, key, holder)
    beating = threading.Thread(
        target=_beat, args=(store, key, holder, ended), name="ray_ckpt reader", daemon=True
    )
    if is_told:
        beating.start()
    try:
        yield
    finally:
        ended.set()
        if is_told:
            beating.join()
            with contextlib.suppress(RayCkptError):  # who purges finds out that it is dead
                store.delete([key])


def _tell(store: Store, key: str, holder: Holder) -> bool:
    """Whether the first heartbeat is there."""
    try:
        store.write(key, _text(holder))
    except RayCkptError as error:
        log.info("%s is read without a sign that keeps a purge away: %s", store.uri, error.what)
        return False
    return True


def readers_by_step(store: Store) -> dict[int, list[str]]:
    """For each step that is read, sentences about its readers; as far as one look tells."""
    found: dict[int, list[str]] = {}
    for key, holder in sorted(_look(store).items()):
        step = names.parse_reader(key)
        if step is not None and not lease.is_dead(holder):
            found.setdefault(step, []).append(_sentence(holder))
    return found


def living_readers(store: Store, step: int) -> list[str]:
    """Sentences about everyone who was seen to read the step; what the dead left is removed.

    Takes no time without readers, else until each has shown life, or for `PATIENCE_S` seconds.
    """
    first = _look(store, step)
    silent = {key: holder for key, holder in first.items() if not lease.is_dead(holder)}
    dead = sorted(first.keys() - silent.keys())
    alive: dict[str, Holder] = {}
    deadline = time.monotonic() + lease.PATIENCE_S
    while silent and time.monotonic() < deadline:
        time.sleep(lease.BEAT_S / 4)
        now = _look(store, step)
        alive.update((k, h) for k, h in now.items() if k not in first or h.beat != first[k].beat)
        silent = {key: holder for key, holder in silent.items() if key in now and key not in alive}
    store.delete([*dead, *sorted(silent)])
    return sorted(_sentence(holder) for holder in alive.values())


def _look(store: Store, step: int | None = None) -> dict[str, Holder]:
    """Every reader by its key, dead ones too; of one step or of all."""
    found: dict[str, Holder] = {}
    for info in list(store.list_objects(names.READERS)):
        read = names.parse_reader(info.key)
        if read is not None and step in (None, read):
            with contextlib.suppress(ObjectNotFoundError):  # it has ended meanwhile
                found[info.key] = parse_holder(store.read(info.key))
    return found


def _beat(store: Store, key: str, holder: Holder, ended: threading.Event) -> None:
    while not ended.wait(lease.BEAT_S):
        holder = replace(holder, beat=holder.beat + 1)
        with contextlib.suppress(RayCkptError):  # the next beat may pass
            store.write(key, _text(holder))


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), sort_keys=True).encode()


def _sentence(holder: Holder) -> str:
    return f"{holder.owner}, process {holder.pid} on {holder.host}"
