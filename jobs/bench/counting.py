"""A store that counts what it is asked: as requests to an object store, or to the file system."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

from ray_ckpt.storage.base import ObjectInfo, Store

T = TypeVar("T")
PAGE = 1000
_KINDS = {"read": "GET", "stat": "HEAD", "write": "PUT", "create": "PUT"}


class CountingStore:
    """Every verb of `store`; `calls` knows how many of which kind."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()

    def take(self) -> dict[str, int]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return {kind: count for kind, count in calls.items() if count}

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """As many LISTs as there are pages."""
        return iter(self._counted(list(self._store.list_objects(folder, prefix=prefix))))

    def list_folders(self, folder: str) -> list[str]:
        """As many LISTs as there are pages."""
        return self._counted(self._store.list_folders(folder))

    def mark(self, key: str) -> str | None:
        """A STAT, where there are marks."""
        mark = self._store.mark(key)
        self.calls["STAT"] += mark is not None
        return mark

    def _counted(self, found: list[T]) -> list[T]:
        self.calls["LIST"] += max(1, -(-len(found) // PAGE))
        return found

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls[_KINDS[verb]] += 1
            return getattr(self._store, verb)(*args)

        return call if verb in _KINDS else getattr(self._store, verb)
