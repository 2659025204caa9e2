"""A save that has begun and may not be a checkpoint yet: another type, so nobody loads from it."""

import threading
import time
from collections.abc import Callable

from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError, SaveError, StorageError
from ray_ckpt.core.events import Becomes, Volume
from ray_ckpt.tensors.ranks import causes, ours, sentence


class PendingSave:
    """Runs one save, in this thread or in one of its own, and remembers how it ended."""

    def __init__(
        self,
        step: int,
        write: Callable[[], None],
        *,
        missing: Callable[[], str],
        ended: Callable[["PendingSave"], None],
        becomes: Becomes = "committed",
    ) -> None:
        self.step = step
        self.becomes: Becomes = becomes
        """What it is once it has ended well."""
        self.volume = Volume()
        """Bytes of its files, once rank 0 knows them."""
        self.seconds = 0.0
        """From the beginning to the end, once it has ended."""
        self._write = write
        self._missing = missing
        self._ended = ended
        self._error: RayCkptError | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Saves now; returns when the step is what it becomes.

        Raises:
            RayCkptError: the save failed; nothing of it is visible.
        """
        self._attempt()
        self.wait()

    def start(self) -> None:
        """Saves in a thread; returns at once."""
        self._thread = threading.Thread(
            target=self._attempt, name=f"ray_ckpt save step-{self.step}"
        )
        self._thread.start()

    @property
    def is_in_background(self) -> bool:
        """Whether a thread of its own saves."""
        return self._thread is not None

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the step is what it becomes: committed, or staged on its nodes.

        Raises:
            RayCkptError: the save failed; nothing of it is visible.
        """
        error = self.error()
        if error is not None:
            raise error

    def error(self) -> RayCkptError | None:
        """How the save ended: None if well. Waits for the end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        return self._error

    def _attempt(self) -> None:
        started = time.perf_counter()
        try:
            self._write()
        # CheckpointException derives from BaseException; kept for wait(): a thread has no caller
        except (Exception, CheckpointException) as error:  # noqa: BLE001
            self._error = _cause(error, self.step, self._missing)
        self.seconds = time.perf_counter() - started
        self._ended(self)


def _of_a_rank(meant: StorageError, step: int, error: CheckpointException) -> StorageError:
    """What one rank's storage refused, as all ranks tell it."""
    rank = next(rank for rank, cause in causes(error).items() if cause is meant)
    return type(meant)(
        f"the save of step-{step} failed on rank {rank}: {meant.what}",
        meant.where,
        "nothing of it is visible; older steps are untouched",
        f"{meant.do}; the next save tries by itself",
    )


def _cause(error: BaseException, step: int, missing: Callable[[], str]) -> RayCkptError:
    """The error that was meant: ours if any rank raised one, else a SaveError that names it."""
    safe = "nothing of it is visible; older steps are untouched"
    if isinstance(error, RayCkptError):
        return error
    if isinstance(error, CheckpointException):
        meant = ours(causes(error))
        if isinstance(meant, StorageError):
            return _of_a_rank(meant, step, error)
        if meant is not None:
            return meant
        text = sentence(causes(error))
    else:  # a collective failed: some rank is dead, or slower than the timeout
        text = f"{missing()} ({error!r})" if isinstance(error, RuntimeError) else repr(error)
        safe = "it is whole if rank 0 went on alone, else not visible; older steps are untouched"
    failed = SaveError(
        f"the save of step-{step} failed: {text}",
        f"step-{step}",
        safe,
        "look at the storage of the rank that is named; the next save tries anew",
    )
    failed.__cause__ = error  # nobody foresaw it: where it happened is in its traceback
    return failed
