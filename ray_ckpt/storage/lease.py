"""Who may write to a root in one role: a row of epochs, each won by one conditional create.

    .ray_ckpt/lease/trainer-7.json     the highest epoch owns; its holder rewrites it to show life
                                       and, with its last word, that it is released

No two hosts' clocks are ever compared: a challenger takes over only when it has itself watched the
same heartbeat for longer than the holder may pause, or when it can see that the holder is dead.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    LeaseHeldError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
)
from ray_ckpt.storage.base import Store

TRAINER = "trainer"
MANAGER = "manager"
BEAT_S = 2.0
PATIENCE_S = 20.0
"""A holder that has not been heard of for so long has lost its lease."""
Guard = Callable[[], None]
"""Raises LeaseHeldError once whoever was given it does not count any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One heartbeat of one holder."""

    owner: str
    """Equal for all incarnations of one writer: a restarted job takes its own lease at once."""
    token: str
    """Unlike any other holder's, even on the same host."""
    host: str
    pid: int
    beat: int
    is_released: bool = False
    """The last word of a holder that ended well: an epoch is never used twice."""


class Lease:
    """Held from `acquire` until `release`, kept alive by a thread."""

    def __init__(self, store: Store, role: str, *, owner: str) -> None:
        self._store = store
        self._role = role
        self._holder = Holder(
            owner=owner, token=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), beat=0
        )
        self.epoch = 0
        """The one that is ours; 0 until `acquire`."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """The lease is ours.

        Raises:
            LeaseHeldError: another writer is alive, seen by its heartbeat.
        """
        epoch = self.wait_until_free()
        try:
            self._store.create(names.lease_key(self._role, epoch + 1), self._text())
        except ObjectExistsError as error:
            raise _held(self._store, self._role, "another writer took it a moment ago") from error
        self.epoch = epoch + 1
        self._store.delete([names.lease_key(self._role, epoch)] if epoch else [])
        self._thread = threading.Thread(target=self._keep_alive, name="ray_ckpt lease", daemon=True)
        self._thread.start()

    def wait_until_free(self) -> int:
        """The last epoch, which nobody holds any more; the lease itself is not taken.

        Raises:
            LeaseHeldError: another writer is alive, seen by its heartbeat.
        """
        epoch, holder = self._current()
        if holder is not None:
            self._watch(epoch, holder)
        return epoch

    def check(self) -> None:
        """Nothing, as long as the lease is ours; called before anything becomes visible.

        Raises:
            LeaseHeldError: another writer has taken over since.
        """
        self.guard()()

    def guard(self) -> "LeaseGuard":
        """:meth:`check` as a value that another process can be given."""
        return LeaseGuard(store=self._store, role=self._role, epoch=self.epoch)

    def release(self) -> None:
        """The next writer need not wait."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._is_ours():
                # must stay: without it an earlier holder, taken over, would be the highest again
                self._holder = replace(self._holder, is_released=True)
                self._store.write(names.lease_key(self._role, self.epoch), self._text())

    def _current(self) -> tuple[int, Holder | None]:
        return _current(self._store, self._role)

    def _is_ours(self) -> bool:
        """By one look; a root that was made anew has our epoch's number and another token in it."""
        epoch, holder = self._current()
        return epoch == self.epoch and holder is not None and holder.token == self._holder.token

    def _watch(self, epoch: int, holder: Holder) -> None:
        """Watches the heartbeat; a beat within PATIENCE_S means that the holder lives."""
        if holder.is_released or holder.owner == self._holder.owner or is_dead(holder):
            return
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 4)
            now_epoch, now = self._current()
            if now is None or (now_epoch == epoch and now.is_released):
                return
            if now_epoch != epoch or now.beat != holder.beat:
                why = f"held by process {now.pid} on {now.host} ({now.owner})"
                raise _held(self._store, self._role, why)

    def _keep_alive(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if not self._is_ours():
                    return  # taken over: check() tells the writer before it shows anything
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._store.write(names.lease_key(self._role, self.epoch), self._text())
            except StorageError:
                continue  # the next beat may pass; missing too many costs the lease

    def _text(self) -> bytes:
        return json.dumps(asdict(self._holder), sort_keys=True).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGuard:
    """Knows which epoch was ours, and can ask whether it still is; keeps nothing alive."""

    store: Store
    role: str
    epoch: int

    def __call__(self) -> None:
        """Nothing, as long as the lease is ours.

        Raises:
            LeaseHeldError: another writer has taken over since.
        """
        epoch, holder = _current(self.store, self.role)
        if holder is None or holder.is_released or epoch != self.epoch:
            why = f"epoch {epoch} has taken over from our epoch {self.epoch}"
            raise _held(self.store, self.role, why)


def holder_of(store: Store, role: str) -> Holder | None:
    """Who writes in this role, as far as one look tells: neither released nor seen to be dead."""
    _, holder = _current(store, role)
    return None if holder is None or holder.is_released or is_dead(holder) else holder


def last_heard_of(store: Store, role: str) -> tuple[Holder, float] | None:
    """Who held the role last, and when it was heard of, by the store's clock; None for nobody."""
    epoch, holder = _current(store, role)
    info = store.stat(names.lease_key(role, epoch)) if holder is not None else None
    return (holder, info.modified_at) if holder is not None and info is not None else None


def has_ended(store: Store, role: str) -> bool:
    """Whether the last one who wrote in this role has ended well; False also before the first."""
    _, holder = _current(store, role)
    return holder is not None and holder.is_released


def _current(store: Store, role: str) -> tuple[int, Holder | None]:
    """The highest epoch and who holds it."""
    epochs = [0]
    for info in store.list_objects(names.LEASES):
        parsed = names.parse_lease(info.key.rpartition("/")[2])
        if parsed is not None and parsed[0] == role:
            epochs.append(parsed[1])
    try:
        return max(epochs), parse_holder(store.read(names.lease_key(role, max(epochs))))
    except ObjectNotFoundError:
        return max(epochs), None


def parse_holder(text: bytes) -> Holder:
    """The holder; one whose file cannot be read is somebody who never beats."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return Holder(owner="an unreadable file", token="", host="", pid=0, beat=-1)


def _held(store: Store, role: str, why: str) -> LeaseHeldError:
    return LeaseHeldError(
        f"another {role} writes to this root: {why}",
        store.uri,
        "nothing was changed; the other one goes on",
        "stop it first, or give this run a root of its own",
    )


def is_dead(holder: Holder) -> bool:
    """Whether the holder ran on this host and its process is gone."""
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
