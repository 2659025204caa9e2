"""A root's queue, worked off to its end: for clusters that go away with their job.

Where another manager holds the lease this waits for it; else it does the work itself.
"""

import time
import uuid
from collections.abc import Callable, Container

from ray_ckpt.cluster.executors import Executor, Threads
from ray_ckpt.cluster.reconciler import Reconciler, Round
from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.settling import unfinished
from ray_ckpt.storage.catalog import Catalog

POLL_S = 0.3
Told = Callable[[str], None]
"""Called with a sentence whenever there is something new to say."""


def drain(
    catalog: Catalog,
    executor: Executor,
    *,
    timeout_s: float | None = None,
    told: Told = lambda _: None,
) -> Observation:
    """What storage shows once nothing is left to do here; dead actions are done for.

    What only other hosts can do is left to them: `core.gathering.hosts_needed` tells which.

    Raises:
        TransientError: time is over; the message says what is left, and all of it is still asked
            for.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    reconciler = Reconciler(catalog, executor, owner=uuid.uuid4().hex)
    last = work(reconciler, until=_is_empty, deadline=deadline, told=told)
    left = unfinished(last.observed, now=time.time(), elsewhere=last.elsewhere)
    if left:
        raise TransientError(
            f"{len(left)} actions are left after {timeout_s:.0f} s, first: {left[0]}",
            catalog.uri,
            "all of them are still asked for; every committed step is safe",
            f"ray-ckpt drain {catalog.uri}    (again, with more time)",
        )
    return last.observed


def work_on(
    catalog: Catalog, keys: Container[str], *, until: Callable[[Round], bool], told: Told
) -> Round:
    """Like `work`, for the actions of these keys alone; whoever manages the root does them.

    Where nobody else does, this process does.
    """
    reconciler = Reconciler(
        catalog, Threads(), owner=uuid.uuid4().hex, wants=lambda action: action.key in keys
    )
    return work(reconciler, until=until, told=told)


def work(
    reconciler: Reconciler,
    *,
    until: Callable[[Round], bool],
    deadline: float | None = None,
    told: Told = lambda _: None,
) -> Round:
    """The round that is as `until` says, or the first after `deadline` by the monotonic clock.

    The reconciler is closed then.
    """
    said = ""
    try:
        while True:
            done = reconciler.round(time.time())
            sentence = _sentence(done)
            if sentence not in ("", said):
                told(sentence)
                said = sentence
            if until(done) or (deadline is not None and time.monotonic() > deadline):
                return done
            time.sleep(POLL_S)
    finally:
        reconciler.close()


def _is_empty(done: Round) -> bool:
    left = unfinished(done.observed, now=time.time(), elsewhere=done.elsewhere)
    return not done.running and not left


def _sentence(done: Round) -> str:
    if done.standing_by is not None:
        return f"waiting: {done.standing_by}"
    return "; ".join(f"running: {flight.attempt.title}" for flight in done.running)
