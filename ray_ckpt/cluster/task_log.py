"""What an attempt says in the log of its task, where the Ray dashboard shows it.

run-faa22f: export step-30 hf-bf16 begins
run-faa22f: export step-30 hf-bf16: exports hf-bf16 63 %, 121 MB/s, 40 s left
run-faa22f: export step-30 hf-bf16 is done
"""

import contextlib
import logging
import time
from collections.abc import Generator

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.core.beats import Beat, Watch
from ray_ckpt.core.names import run_name
from ray_ckpt.storage.secrets import without_secrets

log = logging.getLogger("ray_ckpt")
SAY_EVERY_S = 10.0


def speak(prefix: str = "") -> None:
    """What ray_ckpt says is in this process's log from now on, each line after `prefix`.

    Not what other libraries say: they print addresses, which may be signed.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


class TaskLog:
    """Of one attempt; heard by the thread that tells its beats."""

    def __init__(self, root: str, attempt: Attempt) -> None:
        self._title = f"{run_name(root)}: {attempt.title}"
        self._watch = Watch(begun_at=time.monotonic())
        self._said_at = time.monotonic()
        self._said: Beat | None = None

    @contextlib.contextmanager
    def lines(self) -> Generator[None]:
        """The first line, and the last one: how the block has ended."""
        log.info("%s begins", self._title)
        try:
            yield
        except BaseException as error:
            # who started it warns, or tells a person: both may sit in one process
            log.info("%s failed: %s", self._title, without_secrets(str(error)))
            raise
        log.info("%s is done", self._title)

    def heard(self, beat: Beat) -> None:
        """A line now and then, if it has come further since the last one."""
        now = time.monotonic()
        self._watch = self._watch.after(beat, now)
        before, self._said = self._said, self._said or beat
        if before is None or now - self._said_at < SAY_EVERY_S:
            return
        if (before.doing, before.done_bytes) != (beat.doing, beat.done_bytes):
            self._said, self._said_at = beat, now
            log.info("%s: %s", self._title, how_far(self._watch))


def how_far(watch: Watch) -> str:
    """What an attempt does, and as far as anybody knows: how far it is, how fast, how long still.

    Nothing was heard of it: `waits`.
    """
    beat = watch.last
    if beat is None:
        return "waits"
    share = f"{beat.doing} {beat.percent} %" if beat.percent is not None else beat.doing
    speed = f"{watch.bytes_per_s / 1e6:.0f} MB/s" if watch.bytes_per_s else None
    left = f"{watch.eta_s:.0f} s left" if watch.eta_s is not None else None
    return ", ".join(filter(None, (share, speed, left)))
