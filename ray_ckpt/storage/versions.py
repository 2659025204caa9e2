"""Whether files of a folder were written anew, by what the store says of them; none is read."""

import hashlib
from collections.abc import Mapping

from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import ObjectInfo, Store


def infos_in(store: Store, folder: str) -> dict[str, ObjectInfo]:
    """Every file below a folder, by its name there; one listing."""
    return {info.key.removeprefix(f"{folder}/"): info for info in store.list_objects(folder)}


def fingerprint_of(infos: Mapping[str, ObjectInfo], manifest: Manifest) -> str:
    """Another text once a file that the manifest lists was written anew, or is gone."""
    known = ((entry.path, infos.get(entry.path)) for entry in manifest.files)
    told = sorted(f"{path}\0{i.size_bytes}\0{i.version}\n" for path, i in known if i is not None)
    return hashlib.sha256("".join(told).encode()).hexdigest()
