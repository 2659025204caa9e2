"""Of several who create one object at once one succeeds, on a store that cannot see to that itself.

    .ray_ckpt/elections/<id of the key>/<token>.json    somebody is about to create that object

    1   the object is there                   lost
    2   a claim of one's own is put; then the claims are listed
    3   one with a lower token is there       own claim goes; from 1 on, once that one has ended
    4   others are there                      wait until they go, and list again
    5   one's own claim alone                 a last look, the object is put, the claim goes

Why one alone wins, without a clock: whoever puts the object has seen a list with nothing but its
own claim, and that claim stays until the object is there. Of any two, the one whose claim came
later listed after both had come: it saw the other claim or, where that had gone, the object. All
this needs is that a list shows what was written before it.

Why somebody wins: the claim with the lowest token never gives way, and all others do.

Who dies leaves its claim. It is dead when its process on this host is gone, or when it has been
seen for PATIENCE_S: the living hold a claim for HURRY_S and one PUT at most. So one who is stopped
between its last look and its PUT for longer than that can replace what another has put meanwhile.
It finds its claim gone, and is told that it has lost; the lease's token says that the other has
lost as well.
"""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, ObjectExistsError, ObjectNotFoundError, StorageError
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.lease import Holder, is_dead, parse_holder

POLL_S = 0.05
HURRY_S = 10.0
PATIENCE_S = 120.0
"""Longer than HURRY_S and than the client tries to send one small object."""


def create_by_election(store: Store, key: str, data: bytes, put: Callable[[], None]) -> None:
    """The object is there, put by this call; the very same bytes count as put by it.

    `put` writes it, and may replace what is there.

    Raises:
        ObjectExistsError: something is there, or somebody else was elected.
        ConflictError: nobody was elected in time, or this process stood still: look again.
    """
    _Election(store, key, data, put).run()


def claims_dir(key: str) -> str:
    """Where the claims of those lie who are about to create the object under `key`."""
    return names.election_dir(hashlib.sha256(key.encode()).hexdigest()[:16])


class _Election:
    def __init__(self, store: Store, key: str, data: bytes, put: Callable[[], None]) -> None:
        self._store = store
        self._key = key
        self._data = data
        self._put = put
        self._folder = claims_dir(key)
        self._seen: dict[str, float] = {}
        """When each claim of somebody else was seen first, by this process's own clock."""

    def run(self) -> None:
        ends_at = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < ends_at:
            if self._is_there() or self._stands():
                return
            time.sleep(POLL_S)
        raise self._undecided("nobody could be elected to create it")

    def _is_there(self) -> bool:
        """Whether these very bytes are.

        Raises:
            ObjectExistsError: others are.
        """
        try:
            present = self._store.read(self._key)
        except ObjectNotFoundError:
            return False
        if present != self._data:
            raise ObjectExistsError("something is there already", f"{self._store.uri}/{self._key}")
        return True

    def _stands(self) -> bool:
        """Whether this call was elected and the object is there; False: from the beginning."""
        if self._others():
            return False
        with self._claim() as mine:
            hurry_until = time.monotonic() + HURRY_S
            while others := self._others(than=mine):
                if min(others) < mine or time.monotonic() > hurry_until:
                    return False
                time.sleep(POLL_S)
            # must come after the list: who has gone from it may have put the object
            if self._is_there():
                return True
            if time.monotonic() > hurry_until:
                return False
            self._put()
            if self._store.stat(mine) is None:
                raise self._undecided("this process stood still while it created it")
            self._is_there()
        return True

    @contextmanager
    def _claim(self) -> Generator[str]:
        """The key of a claim that lies there while the block runs."""
        token = secrets.token_hex(8)
        mine = f"{self._folder}/{token}.json"
        host = socket.gethostname()
        holder = Holder(owner=self._key, token=token, host=host, pid=os.getpid(), beat=0)
        try:
            self._store.write(mine, json.dumps(asdict(holder), sort_keys=True).encode())
            yield mine
        finally:
            self._withdraw(mine)

    def _withdraw(self, mine: str) -> None:
        """One that cannot be removed counts as a dead one's, in time."""
        try:
            self._store.delete([mine])
        except StorageError:
            return

    def _others(self, *, than: str = "") -> set[str]:
        """Keys of the claims of others who may be alive; the claims of the dead are removed."""
        listed = {info.key for info in self._store.list_objects(self._folder)} - {than}
        now = time.monotonic()
        for key in listed - self._seen.keys():
            self._seen[key] = now - PATIENCE_S if self._is_dead(key) else now
        dead = sorted(key for key in listed if now - self._seen[key] >= PATIENCE_S)
        self._store.delete(dead)
        return listed - set(dead)

    def _is_dead(self, key: str) -> bool:
        try:
            return is_dead(parse_holder(self._store.read(key)))
        except ObjectNotFoundError:
            return False

    def _undecided(self, what: str) -> ConflictError:
        return ConflictError(
            what,
            f"{self._store.uri}/{self._key}",
            "whatever is there is whole",
            "run the same command again; it looks at what is there first",
        )
