"""Whether what a store gives is what was handed to it: every byte is read from there once more."""

import os

from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import find_damage
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.progress import UNTOLD, Progress


def read_back(
    store: Store, folder: str, manifest: Manifest, *, progress: Progress = UNTOLD
) -> list[str]:
    """Sentences about every file below `folder` that is not as the manifest says."""
    if isinstance(store, LocalStore):
        for entry in manifest.files:
            _leave_cache(store, f"{folder}/{entry.path}")
    return find_damage(store, folder, manifest, progress=progress)


def _leave_cache(store: LocalStore, key: str) -> None:
    """What is read next comes from the device, where the system can be asked for that."""
    path = store.path(key)
    if not hasattr(os, "posix_fadvise") or not path.is_file():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
