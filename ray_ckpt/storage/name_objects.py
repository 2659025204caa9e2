"""An object whose text is the name of what lies beside it: a link, where a store has none."""

from ray_ckpt.core.errors import ObjectExistsError
from ray_ckpt.storage.base import Store

_NAME_BYTES = 256


def point_by_object(store: Store, key: str, name: str) -> None:
    """`key` leads to `name`, instead of where such an object led before.

    Raises:
        ObjectExistsError: something is there that is no such object; it is untouched.
    """
    pointed_by_object(store, key)
    store.write(key, name.encode())


def pointed_by_object(store: Store, key: str) -> str | None:
    """The name; None if nothing is there. A larger object than a name needs is not read.

    Raises:
        ObjectExistsError: something is there that leads nowhere.
    """
    info = store.stat(key)
    if info is None:
        return None
    text = store.read(key).decode(errors="replace") if info.size_bytes < _NAME_BYTES else ""
    if len(text.split()) != 1:
        raise ObjectExistsError("an object is here whose text is no name", f"{store.uri}/{key}")
    return text.strip()
