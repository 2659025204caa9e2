"""How much is free on the disk under a folder of this host."""

import shutil
import socket
from pathlib import Path

from ray_ckpt.core.room import Room, refuse_without_room
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.disk.posix import translated


def room_at(folder: Path) -> Room:
    """What is free there; one place for all folders of this host on the same file system."""
    with translated(folder):
        host = socket.gethostname()
        return Room(
            place=f"{host}:{folder.stat().st_dev}",
            where=f"{folder} on {host}",
            free_bytes=shutil.disk_usage(folder).free,
        )


def room_in(store: Store) -> Room | None:
    """What is free where a store writes; None where nobody can say."""
    free_bytes = store.free_bytes()
    if free_bytes is None:
        return None
    return Room(place=store.uri, where=store.uri, free_bytes=free_bytes)


def expect_room_in(store: Store, needed_bytes: int, *, what: str) -> None:
    """Nothing, if so many bytes can be written there, as far as anybody can say.

    Raises:
        StorageFullError: they cannot; nothing was written.
    """
    room = room_in(store)
    if room is not None:
        refuse_without_room(what, [(room, needed_bytes)])


def expect_room(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Nothing, if so many bytes can be written to the folder.

    Raises:
        StorageFullError: they cannot; nothing was written.
    """
    refuse_without_room(what, [(room_at(folder), needed_bytes)])
