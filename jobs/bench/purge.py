"""A step is taken away: ours, which hides it first, and the plain removal of its files.

out of sight    no reader sees it any more; it can be brought back
gone            what lies in the trash is removed
"""

import os
import shutil
import uuid
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from jobs.bench.timing import Taken, Timing, in_turn, stopwatch, timing_of
from ray_ckpt.core import names
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, digest_of


def measure_purges(root: str, *, size_mb: int, num_files: int, repeats: int) -> list[Timing]:
    """Rows for a step of so many files; what was written below `root` is removed."""
    steps = _Steps(f"{root.rstrip('/')}/ray_ckpt-bench-{uuid.uuid4().hex[:8]}", size_mb, num_files)
    ways: dict[str, Callable[[], Taken]] = {
        "ray_ckpt: out of sight": lambda: _taken(steps.make(), steps.hide),
        "ray_ckpt: gone": lambda: _taken(steps.hide(steps.make()), steps.erase),
        steps.peer: lambda: _taken(steps.make(), steps.remove),
    }
    try:
        return [timing_of(what, each) for what, each in in_turn(ways, repeats).items()]
    finally:
        steps.close()


def _taken(step: int, act: Callable[[int], object]) -> Taken:
    taken = stopwatch()
    act(step)
    return taken()


class _Steps:
    """Committed steps of one root, all alike."""

    def __init__(self, root: str, size_mb: int, num_files: int) -> None:
        self._root = root
        self._catalog = open_catalog(root)
        self._numbers = count(1)
        self._data = os.urandom(size_mb * 1_000_000 // num_files)
        self._files = tuple(
            FileEntry(
                path=names.shard_prefix(rank, "bench") + ".distcp",
                size_bytes=len(self._data),
                digest=digest_of(self._data, SHARD_ALGORITHM),
            )
            for rank in range(num_files)
        )

    @property
    def peer(self) -> str:
        """What others do."""
        return "s3fs.rm" if self._is_bucket else "shutil.rmtree"

    @property
    def _is_bucket(self) -> bool:
        return self._root.startswith("s3://")

    def make(self) -> int:
        """One more step, by its number."""
        step = next(self._numbers)
        folder, store = names.step_dir(step), self._catalog.store
        at_once(lambda entry: store.write(f"{folder}/{entry.path}", self._data), self._files)
        manifest = Manifest(
            step=step,
            save_id="bench",
            created_at="2026-11-27T00:00:00+00:00",
            lineage=Lineage(run_id="bench"),
            files=self._files,
            tensors=(),
            world_size=len(self._files),
        )
        store.create(names.manifest_key(folder), manifest.to_json())
        return step

    def hide(self, step: int) -> int:
        """It is in the trash."""
        self._catalog.trash(step)
        return step

    def erase(self, step: int) -> None:
        """It is not in the trash any more."""
        aside = names.set_aside_dir(names.TRASH, step, "bench")
        self._catalog.commit.erase(aside, names.step_dir(step))

    def remove(self, step: int) -> None:
        """As people do it who have nothing else."""
        folder = f"{self._root}/{names.step_dir(step)}"
        if not self._is_bucket:
            shutil.rmtree(folder)
            return
        import s3fs  # pyright: ignore[reportMissingTypeStubs]

        files: Any = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        files.rm(folder, recursive=True)

    def close(self) -> None:
        """Nothing is left."""
        store = self._catalog.store
        store.delete([info.key for info in store.list_objects("")])
        if not self._is_bucket:
            shutil.rmtree(Path(self._root), ignore_errors=True)
