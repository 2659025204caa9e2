"""A save that has begun and may not be a checkpoint yet: another type, so nobody loads from it."""

import threading
from collections.abc import Callable

from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.core.errors import RayCkptError, SaveError
from ray_ckpt.tensors.ranks import ours, sentence


class PendingSave:
    """Runs one save, in this thread or in one of its own, and remembers how it ended."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        self.step = step
        self._write = write
        self._error: RayCkptError | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Saves now; returns when the step is committed.

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

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the step is committed.

        Raises:
            RayCkptError: the save failed; nothing of it is visible.
        """
        error = self.error()
        if error is not None:
            raise error

    def error(self) -> RayCkptError | None:
        """How the save ended: None for committed. Waits for the end."""
        if self._thread is not None:
            self._thread.join()
        return self._error

    def _attempt(self) -> None:
        try:
            self._write()
        # CheckpointException derives from BaseException; kept for wait(): a thread has no caller
        except (Exception, CheckpointException) as error:  # noqa: BLE001
            self._error = _cause(error, self.step)


def _cause(error: BaseException, step: int) -> RayCkptError:
    """The error that was meant: ours if any rank raised one, else a SaveError that names it."""
    if isinstance(error, RayCkptError):
        return error
    text = repr(error)
    if isinstance(error, CheckpointException):
        meant = ours(error)
        if meant is not None:
            return meant
        text = sentence(error)
    return SaveError(
        f"the save of step-{step} failed: {text}",
        f"step-{step}",
        "nothing of it is visible; older steps are untouched",
        "look at the storage of the rank that is named; the next save tries anew",
    )
