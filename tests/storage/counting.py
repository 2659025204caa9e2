"""A store that counts what it is asked, as requests to an object store."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ray_ckpt.storage.base import ObjectInfo, Store

PAGE = 1000
_KINDS = {"read": "GET", "stat": "HEAD", "write": "PUT", "create": "PUT", "list_folders": "LIST"}


class CountingStore:
    """Every verb of `store`; `calls` knows how many of which kind."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()

    def take(self) -> dict[str, int]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return dict(calls)

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(self._store.list_objects(folder, prefix=prefix))
        self.calls["LIST"] += max(1, -(-len(found) // PAGE))
        return iter(found)

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls[_KINDS[verb]] += 1
            return getattr(self._store, verb)(*args)

        return call if verb in _KINDS else getattr(self._store, verb)
