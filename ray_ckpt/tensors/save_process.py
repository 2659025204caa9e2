"""One more process per rank, which saves what the rank has staged, away from the trainer's GIL.

    trainer (rank r)                                    its child
    SaveProcess      --- socket: job, notes, answer ---   save_child
    Stager's memory  --- mapped, never copied ---------   SaveProtocol, CommittingWriter
    Ranks' group                                          a gloo group of the children alone

The children carry out the whole save among themselves; the parents only agree on how it ended, and
on starting all children anew when one is lost. A child is a fresh interpreter: it runs none of the
user's code, sees no GPU, imports no ray, and ends when its parent does.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from enum import Enum, auto
from functools import partial
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError, SaveError
from ray_ckpt.core.events import Volume
from ray_ckpt.storage.host_memory.copies import FileInMemory
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.save_wire import Join, Noted, OpenStore, Segments, packed, portable
from ray_ckpt.tensors.staging import Segment, Stager
from ray_ckpt.tensors.writer import SaveJob

log = logging.getLogger("ray_ckpt")

_PROGRAM = (
    "import sys; from ray_ckpt.tensors.save_child import serve; serve(*map(int, sys.argv[1:]))"
)
Remark = Noted | Volume
"""What a child says before it answers."""
_LOOK_S = 0.5
"""How often a parent looks whether its child is alive, should the socket not tell."""
_END_S = 10.0
"""How long a child may take to end."""


class SaveProcess:
    """One child of this rank; with those of the other ranks it saves. Collective, one at a time."""

    def __init__(self, ranks: Ranks, stager: Stager, *, timeout_s: float) -> None:
        """The child is on its way: its imports run beside training.

        `ranks` is for the thread that calls `save` alone, `stager` has `HostMemory.SHARED`;
        children wait for each other for `timeout_s`.
        """
        self._ranks = ranks
        self._stager = stager
        self._timeout_s = timeout_s
        self._child = _Child(ranks.rank)

    @property
    def pid(self) -> int:
        """The child's process id; another one after a child was lost."""
        return self._child.pid

    def save(self, job: SaveJob, staged: dict[str, Any]) -> list[FileInMemory]:
        """The step is committed; `staged`, which `stager` returned, may be overwritten.

        Returns what this rank has written and where it lies in the stager's memory, if the job
        says that it is kept.

        Raises the same on every rank: what a child raised, or SaveError for a child that died;
        the next save then starts all of them anew.
        """
        during = f"the save of step-{job.draft.step}"
        request = self._ranks.together(lambda: packed(job, staged, self._stager))
        self._make_ready()
        files: list[FileInMemory] = []
        errors = self._ranks.gather(
            _error_of(lambda: files.extend(self._write(job, request, during)))
        )
        # rank 0 commits, last of all: what another rank heard later changes nothing
        if errors[0] is not None:
            raise _meant(errors)
        return files

    def close(self) -> None:
        """The child has ended."""
        self._child.close()

    def _make_ready(self) -> None:
        """Every rank has a child, and the children know each other."""
        states = self._ranks.gather(self._child.state())
        if all(state is _State.READY for state in states):
            return
        # must be for all or none: who is half introduced on one rank is a stranger on another
        if not all(state is _State.FRESH for state in states):
            self._child.close()
            self._child = _Child(self._ranks.rank)
        self._all(self._child.greet)
        if self._ranks.group is not None:
            self._introduce()
        self._child.is_introduced = True

    def _introduce(self) -> None:
        """The children are one group; a group of one is one, too, and writes the same bytes."""
        address = self._ranks.on_coordinator(
            lambda: (_own_address(), self._child.ask(pickle.dumps(OpenStore()), "its start"))
        )
        join = Join(
            address=address,
            rank=self._ranks.rank,
            size=self._ranks.size,
            timeout_s=self._timeout_s,
        )
        self._all(lambda: self._child.ask(pickle.dumps(join), "its start"))

    def _all(self, function: Callable[[], None]) -> None:
        """The call has returned on every rank; if not, all raise the error that says most."""
        errors = self._ranks.gather(_error_of(function))
        if any(error is not None for error in errors):
            raise _meant(errors)

    def _write(self, job: SaveJob, request: bytes, during: str) -> list[FileInMemory]:
        try:
            self._child.share(self._stager.segments)
            return self._child.ask(request, during, partial(_pass_on, job))
        except BaseException as error:
            if not self._ranks.is_coordinator:
                raise
            # the child has answered or is dead: nobody can commit any more
            if not job.is_done():
                _discard(job)
                raise
            log.warning("step-%d is saved, although %r", job.draft.step, error)
            return []


def _error_of(function: Callable[[], None]) -> BaseException | None:
    """What the call raised, fit for the other ranks."""
    try:
        function()
    except (Exception, CheckpointException) as error:  # noqa: BLE001  every rank hears of it
        return portable(error)
    return None


def _meant(errors: list[BaseException | None]) -> BaseException:
    """The error that says most: one of ours, else that of the lowest rank."""
    raised = [error for error in errors if error is not None]
    return next((error for error in raised if isinstance(error, RayCkptError)), raised[0])


def _discard(job: SaveJob) -> None:
    """Nothing of the attempt is left where all ranks write; a killed child could not see to it."""
    with contextlib.suppress(RayCkptError):
        job.goes_to.discard(job.goes_to.staging(job.attempt))


def _own_address() -> str:
    """Where the other ranks reach this host."""
    if "MASTER_ADDR" in os.environ:  # by convention the host of rank 0
        return os.environ["MASTER_ADDR"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing, only chooses an interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _ignore(remark: Remark) -> None:
    """Nobody waits."""


def _pass_on(job: SaveJob, remark: Remark) -> None:
    """What a child says on its way is known where the save was begun."""
    if isinstance(remark, Volume):
        job.wrote(remark)
    else:
        job.note(remark.save, remark.phase)


class _State(Enum):
    """Of a child."""

    FRESH = auto()
    """Started; nobody has spoken with it."""
    READY = auto()
    """It lives and knows the other ranks' children; no broken collective is behind it."""
    SPENT = auto()
    """Dead, or lost on the way from one to the other."""


class _Child:
    """One child as its parent sees it: a request, notes on the way, one answer."""

    def __init__(self, rank: int) -> None:
        self.is_introduced = False
        """Whether it has met the other ranks' children."""
        self._rank = rank
        self._has_greeted = False
        self._shared: tuple[Segment, ...] = ()
        self._connection, theirs = multiprocessing.Pipe()
        numbers = (theirs.fileno(), os.getpid())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, numbers)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def state(self) -> _State:
        """What the next save can do with it."""
        if self._process.poll() is not None:
            return _State.SPENT
        if self.is_introduced:
            return _State.READY
        return _State.SPENT if self._has_greeted else _State.FRESH

    def greet(self) -> None:
        """It has imported what it needs."""
        self._has_greeted = True
        self.hear("its start")

    def share(self, segments: tuple[Segment, ...]) -> None:
        """The child has mapped these segments and no others."""
        with self._told_if_dead("the mapping of memory"):
            sizes = {segment.number: segment.num_bytes for segment in segments}
            self._connection.send_bytes(pickle.dumps(Segments(num_bytes=sizes)))
            for segment in segments:
                if segment not in self._shared:
                    send_handle(self._connection, segment.descriptor, self.pid)
        self._shared = segments
        self.hear("the mapping of memory")

    def ask(self, request: bytes, during: str, heard: Callable[[Remark], None] = _ignore) -> Any:
        """What the child answers to the request; see :meth:`hear`."""
        with self._told_if_dead(during):
            self._connection.send_bytes(request)
        return self.hear(during, heard)

    def hear(self, during: str, heard: Callable[[Remark], None] = _ignore) -> Any:
        """What the child answers.

        Raises:
            SaveError: it died.
            CheckpointException: every rank has heard of it; the child can go on.
            Exception: whatever else the child raised; its group is broken, and it is gone.
        """
        with self._told_if_dead(during):
            answer = self._receive()
            while isinstance(answer, Noted | Volume):
                heard(answer)
                answer = self._receive()
        if answer.error is not None and not isinstance(answer.error, CheckpointException):
            self._kill()
        if answer.error is not None:
            raise answer.error
        return answer.value

    def close(self) -> None:
        """The child has ended: by itself, or killed if it is late."""
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _receive(self) -> Any:
        while not self._connection.poll(_LOOK_S):
            # a process that was forked at the wrong moment may keep the child's end open
            if self._process.poll() is not None and not self._connection.poll():
                raise EOFError
        return self._connection.recv()

    @contextlib.contextmanager
    def _told_if_dead(self, during: str) -> Generator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            raise self._death(during) from error
        except BaseException:  # interrupted: it must not go on and read what is staged next
            self._kill()
            raise

    def _death(self, during: str) -> SaveError:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            code = self._kill()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return SaveError(
            f"the process that saves for rank {self._rank} ended {how} during {during}",
            f"process {self.pid} on {socket.gethostname()}",
            "nothing of it is visible; older steps are untouched",
            "if memory ran out (`dmesg`), use mode='async'; the next save starts a new process",
        )

    def _kill(self) -> int:
        self._process.kill()
        return self._process.wait()


def _environment() -> dict[str, str]:
    """Of a child: this interpreter's modules, no GPU, no threads of torch's own."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
