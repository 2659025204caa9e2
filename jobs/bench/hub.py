"""A model, one large file and many small ones, goes to the Hub: ours, and huggingface_hub's own.

Both send to the endpoint and with the token that the environment names. Every time all bytes are
new. Ours is given the SHA-256 of each file, which an export has from when it was written; it
compares them while it sends. The other one computes them first.
"""

import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import HfApi

from jobs.bench.rows import OURS, Sent, rows_of
from ray_ckpt.core import names
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_file
from ray_ckpt.storage.hub.client import parse_hub
from ray_ckpt.storage.hub.repository import publish_to_hub

SMALL_BYTES = 16_384
_NAME = "bench"


def measure_hub(
    folder: Path, destination: str, *, size_mb: int, num_small: int, repeats: int
) -> list[Sent]:
    """Rows for a repository that is there, which holds the last of these models afterwards."""
    models = _Models(folder, size_mb=size_mb, num_small=num_small)
    repository, branch = parse_hub(destination)
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: publish_to_hub(models.store, models.export(), destination),
        "HfApi.upload_folder": lambda: HfApi().upload_folder(
            repo_id=repository, revision=branch, folder_path=models.path
        ),
    }
    size_bytes = size_mb * 1_000_000 + num_small * SMALL_BYTES
    return rows_of("model up", ways, repeats, size_bytes, prepare=models.make_another)


class _Models:
    """One after the other in the same folder, of the same size, no two alike."""

    def __init__(self, folder: Path, *, size_mb: int, num_small: int) -> None:
        self.store = open_catalog(str(folder)).store
        self._folder = folder
        self._size_mb = size_mb
        self._num_small = num_small
        self._step = int(time.time())  # a tag that no earlier run has made
        self._files: tuple[FileEntry, ...] = ()

    @property
    def path(self) -> Path:
        """Where the one that was made last lies."""
        return self._folder / names.export_dir(_NAME, self._step)

    def make_another(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._step += 1
        self.path.mkdir(parents=True)
        with (self.path / "model.safetensors").open("wb") as file:
            for _ in range(self._size_mb):
                file.write(os.urandom(1_000_000))
        for number in range(self._num_small):
            (self.path / f"{number:04d}.bin").write_bytes(os.urandom(SMALL_BYTES))
        paths = sorted(self.path.iterdir())
        self._files = tuple(describe_file(p, p.name, STRONG_ALGORITHM) for p in paths)

    def export(self) -> ExportView:
        """The same one, as our manager sees it."""
        manifest = Manifest(
            step=self._step,
            save_id=f"{self._step}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            lineage=Lineage(run_id=_NAME),
            files=self._files,
        )
        return ExportView(name=_NAME, step=self._step, manifest=manifest)
