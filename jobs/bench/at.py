"""Where a benchmark saves: a folder of its own on a disk, or below a root that somebody names."""

import contextlib
import tempfile
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.storage.backends import open_catalog


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """One place for one benchmark."""

    root: str
    """Where checkpoints go: a path or a URI."""
    folder: Path
    """For what is always on a disk."""


@contextlib.contextmanager
def a_place(root: str | None, folder: Path | None) -> Generator[At]:
    """Nothing is there at first, and nothing is left."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=folder) as own:
        if root is None:
            yield At(root=own, folder=Path(own))
            return
        at = At(root=f"{root.rstrip('/')}/ray_ckpt-bench-{uuid.uuid4().hex[:8]}", folder=Path(own))
        try:
            yield at
        finally:
            remove(at.root, "")


def remove(root: str, *prefixes: str) -> None:
    """Objects whose keys begin like one of these are gone."""
    store = open_catalog(root).store
    store.delete([o.key for o in store.list_objects("") if o.key.startswith(prefixes)])
