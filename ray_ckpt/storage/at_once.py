"""The same work on many things, some of them at the same time."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")
REQUESTS = 16
"""So many wait for a store's answers at the same time."""


def at_once(
    work: Callable[[Item], T], items: Iterable[Item], *, num_threads: int = REQUESTS
) -> list[T]:
    """What `work` returns for each item, in order.

    After an error what has begun ends, the rest never begins. Each thread takes an item after the
    other: a future for each costs as much as sending a small file.
    """
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    found: dict[int, T] = {}
    left = _Left(items)

    def work_on() -> None:
        try:
            while (taken := left.take()) is not None:
                found[taken[0]] = work(taken[1])
        except BaseException:
            left.forget()
            raise

    with ThreadPoolExecutor(num_threads, "ray_ckpt at once") as threads:
        workers = [threads.submit(work_on) for _ in range(min(num_threads, len(items)))]
        try:
            for worker in workers:
                worker.result()
        finally:
            left.forget()  # also where whoever waits is interrupted
    return [found[index] for index in range(len(items))]


class _Left(Generic[Item]):
    """What nobody has begun."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(enumerate(items))
        self._lock = threading.Lock()

    def take(self) -> tuple[int, Item] | None:
        with self._lock:
            return next(self._items, None)

    def forget(self) -> None:
        with self._lock:
            self._items = iter(())
