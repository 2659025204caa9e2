"""Reading that goes on while what was read before is worked on. Knows nothing of what is read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    threads: ThreadPoolExecutor, read: Callable[[T], R], items: Iterable[T], *, count: int
) -> Iterator[R]:
    """`read` of each item, in order; so many of them are read before somebody asks."""
    waiting = iter(items)
    begun: deque[Future[R]] = deque(threads.submit(read, item) for item in islice(waiting, count))
    while begun:
        result = begun.popleft().result()
        begun.extend(threads.submit(read, item) for item in islice(waiting, 1))
        yield result
