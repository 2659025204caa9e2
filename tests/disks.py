"""A file system of a size that a test chooses, so that it is really full when it is."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_file_system(folder: Path, *, size: str) -> Iterator[Path]:
    """Mounted at `folder` while the block runs; skips the test where nobody may mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, but_bytes: int = 0) -> Path:
    """The disk is full but for so many bytes, until the file that is returned is removed."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    with filler.open("rb+") as file:
        file.truncate(max(0, filler.stat().st_size - but_bytes))
    return filler
