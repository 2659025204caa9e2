"""What a disk holds after a power cut: what was synced, under names that were synced, alone.

Every `fsync` of this process is watched. Between two of them nothing becomes durable, so that the
states after each are all that a cut at any moment can leave, if the disk drops all it may.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

Names = dict[str, int]
"""Inode of each entry of a folder."""


@dataclass
class Disk:
    """A folder that is durable as it is now, and what becomes durable below it from now on."""

    folder: Path
    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, Names] = field(default_factory=dict)
    states: list[tuple[dict[int, bytes], dict[int, Names]]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Open descriptors: the number of an inode that is still open is not given to another one."""

    def sync(self, descriptor: int) -> None:
        """What the file, or the names in the folder, survives a cut from now on."""
        self.held.append(os.dup(descriptor))
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self.folders[status.st_ino] = {e.name: e.inode() for e in os.scandir(path)}
        else:
            self.files[status.st_ino] = path.read_bytes()
        self.states.append((dict(self.files), dict(self.folders)))

    def restore(self, number: int, target: Path) -> Path:
        """What is there after a cut behind sync `number`, as a folder of its own."""
        files, folders = self.states[number]

        def put(inode: int, path: Path) -> None:
            if inode in folders:
                path.mkdir()
                for name, child in folders[inode].items():
                    put(child, path / name)
            elif inode in files:
                path.write_bytes(files[inode])
            elif inode not in self.known_folders:
                path.write_bytes(b"")  # a name without its bytes
            else:
                path.mkdir()

        put(self.folder.stat().st_ino, target)
        return target

    @property
    def known_folders(self) -> set[int]:
        """Folders that exist now and were never synced."""
        return {path.stat().st_ino for path in self.folder.rglob("*") if path.is_dir()}


@contextlib.contextmanager
def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """All that lies in `folder` is durable; what the block does there is watched."""
    disk = Disk(folder)
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        disk.sync(descriptor)
        os.close(descriptor)
    del disk.states[:-1]
    fsync = os.fsync

    def sync(file: object) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        fsync(descriptor)
        disk.sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        yield disk
    for descriptor in disk.held:
        os.close(descriptor)
