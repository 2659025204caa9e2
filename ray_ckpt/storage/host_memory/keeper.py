"""A small process that holds one trainer's copies in memory, and outlives the trainer for a while.

    owner      --- names, and the descriptors of the memory -->  keeper
    a reader   --- connects by the name of a file ------------>  the descriptors

Of what it holds it looks at one byte: whether the copies are good. It ends with its owner's word;
once the owner is dead, if they are not good, with a reader's word, when nobody has asked for so
many seconds, or when memory runs short. Nothing has a name in a file system: whatever ends the
keeper frees the memory and leaves nothing behind.

Run as a file, without this package: it starts in milliseconds and is as small as Python is.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

MOST_DESCRIPTORS = 250
"""In one message; Linux carries 253."""
MESSAGE_BYTES = 64 << 10
GOOD, SPOILT = b"\1", b"\0"
"""First byte of the first descriptor: whether the copies are whole, or being overwritten."""
RELEASE = b"release"
"""A reader's word that nobody will need the copies again."""
_LOOK_S = 1.0
_SHORT_OF_MEMORY = 0.1
"""Of the host's or the container's memory: the copies go before anything else must."""
_CGROUP = Path("/sys/fs/cgroup")
_CREDENTIALS = struct.Struct("3i")


def uid_of_peer(connection: socket.socket) -> int:
    """User id of the process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(raw)[1]


class _Keeper:
    def __init__(self, owner: socket.socket, owner_pid_file: int, *, stays_s: float) -> None:
        self._stays_s = stays_s
        self._ends_at: float | None = None
        """Set once the owner is dead and no reader is connected."""
        self._is_orphan = False
        self._descriptors: list[int] = []
        self._listeners: list[socket.socket] = []
        self._readers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(owner, selectors.EVENT_READ, self._hear_owner)
        # a process that the owner has forked may keep its end of the socket open
        self._selector.register(owner_pid_file, selectors.EVENT_READ, self._lose_owner)

    def run(self) -> None:
        """Until it is to end."""
        while not self._is_over():
            for key, _ in self._selector.select(_LOOK_S if self._is_orphan else None):
                key.data(key.fileobj)

    def _is_over(self) -> bool:
        if not self._is_orphan:
            return False
        is_late = self._ends_at is not None and time.monotonic() >= self._ends_at
        return is_late or not self._has_good_copies() or is_short_of_memory()

    def _has_good_copies(self) -> bool:
        return bool(self._listeners) and os.pread(self._descriptors[0], 1, 0) == GOOD

    def _hear_owner(self, owner: socket.socket) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(owner, MESSAGE_BYTES, MOST_DESCRIPTORS)
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._lose_owner(owner)
            return
        request = json.loads(message)
        if request.get("ends"):
            sys.exit()
        self._let_go()
        self._descriptors = descriptors
        self._listen(request["names"])

    def _listen(self, names: list[str]) -> None:
        for name in names:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                listener.bind("\0" + name)
            except OSError:  # another keeper has a file of the same content
                listener.close()
                continue
            listener.listen()
            listener.setblocking(False)
            self._listeners.append(listener)
            self._selector.register(listener, selectors.EVENT_READ, self._welcome)

    def _let_go(self) -> None:
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._listeners, self._descriptors = [], []

    def _lose_owner(self, sign: socket.socket | int) -> None:
        self._selector.unregister(sign)  # what it has said last may still be on its way
        self._is_orphan = True
        self._wait()

    def _wait(self) -> None:
        """From now on somebody must ask, or it ends."""
        if self._is_orphan and not self._readers:
            self._ends_at = time.monotonic() + self._stays_s

    def _welcome(self, listener: socket.socket) -> None:
        try:
            reader, _ = listener.accept()
        except OSError:  # the owner has just given other files instead
            return
        if uid_of_peer(reader) != os.getuid():
            reader.close()
            return
        try:
            socket.send_fds(reader, [b"held"], self._descriptors)
        except OSError:
            reader.close()
            return
        self._readers.add(reader)
        self._ends_at = None
        self._selector.register(reader, selectors.EVENT_READ, self._hear_reader)

    def _hear_reader(self, reader: socket.socket) -> None:
        try:
            word = reader.recv(len(RELEASE))
        except OSError:
            word = b""
        if word == RELEASE and self._is_orphan:
            sys.exit()
        if not word:
            self._selector.unregister(reader)
            self._readers.discard(reader)
            reader.close()
            self._wait()


def is_short_of_memory() -> bool:
    """Whether the host or the container has next to nothing left."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        host = _numbers(Path("/proc/meminfo"))
        if host["MemAvailable:"] < _SHORT_OF_MEMORY * host["MemTotal:"]:
            return True
    with contextlib.suppress(OSError, ValueError, KeyError):
        most = int((_CGROUP / "memory.max").read_text())
        files = _numbers(_CGROUP / "memory.stat")
        used = int((_CGROUP / "memory.current").read_text())
        used -= files["inactive_file"] + files["active_file"]  # given back when asked for
        return used > (1 - _SHORT_OF_MEMORY) * most
    return False


def _numbers(path: Path) -> dict[str, int]:
    """First and second word of each line."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name: int(value) for name, value, *_ in words}


def main(descriptor: int, stays_s: float) -> None:
    """Serves the owner at the other end of the socket, apart from its session and its children."""
    owner_pid_file = os.pidfd_open(os.getppid())  # it waits for this process, hence lives
    if os.fork():  # its owner is not its parent: nobody ends it together with the owner's children
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # of all processes the one whose end costs least
        Path("/proc/self/oom_score_adj").write_text("1000")
    _Keeper(socket.socket(fileno=descriptor), owner_pid_file, stays_s=stays_s).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
