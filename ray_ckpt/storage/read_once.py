"""Objects that are read again only once they have changed. Knows nothing of what they say."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from ray_ckpt.core.errors import ObjectNotFoundError
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import ObjectInfo, Store

T = TypeVar("T")


class ReadOnce(Generic[T]):
    """What each object of one kind says, kept as long as a listing shows the version that was read.

    A pure memory: what it forgets is read again.
    """

    def __init__(self, store: Store, parse: Callable[[bytes, str], T]) -> None:
        self._store = store
        self._parse = parse
        """Gets an object's bytes and where it lies; must not raise."""
        self._known: dict[str, tuple[ObjectInfo, T]] = {}

    def read(self, listed: Iterable[ObjectInfo]) -> dict[str, T]:
        """By key, what each of the `listed` objects says; those removed meanwhile are left out.

        Whatever is not listed is forgotten.
        """
        infos = {info.key: info for info in listed}
        known = {key: one for key, one in self._known.items() if infos.get(key) == one[0]}
        changed = [info for key, info in infos.items() if key not in known]
        for info, said in zip(changed, at_once(self._ask, changed), strict=True):
            known.update({info.key: (info, said[0])} if said else {})
        self._known = known
        return {key: known[key][1] for key in infos if key in known}

    def __reduce__(self) -> tuple[type["ReadOnce[T]"], tuple[Any, ...]]:
        # what was read stays in its process: others get the means to read it
        return type(self), (self._store, self._parse)

    def _ask(self, info: ObjectInfo) -> tuple[T] | None:
        try:
            return (self._parse(self._store.read(info.key), f"{self._store.uri}/{info.key}"),)
        except ObjectNotFoundError:
            return None
