"""Places that fsspec reaches: what is half written there is nobody's, and their errors are ours."""

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ray_ckpt.core.errors import (
    AuthorizationError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
    UsageError,
)
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.disk.file_blocks import TEMPORARY
from ray_ckpt.storage.fsspec_store import FsspecStore


class Answered(Exception):  # noqa: N818  as packages name theirs
    """What packages for stores behind HTTP raise."""

    def __init__(self, code: Any) -> None:
        super().__init__(f"the server said {code}")
        self.code = code


class Failing(MemoryFileSystem):
    protocol = "failing"
    error: Exception

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value[: len(value) // 2], mode, **kwargs)
        raise self.error


class Unmoving(LocalFileSystem):
    """Moves onto nothing only, like SFTP's own rename."""

    protocol = "unmoving"

    def mv(self, path1: str, path2: str, recursive: bool = True, **kwargs: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(errno.EEXIST, "there", path2)
        super().mv(path1, path2, recursive, **kwargs)


@pytest.fixture(autouse=True)
def known() -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    fsspec.register_implementation("unmoving", Unmoving, clobber=True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Answered(401), AuthorizationError),
        (Answered("403"), AuthorizationError),
        (Answered(404), ObjectNotFoundError),
        (Answered(429), ThrottledError),
        (Answered(500), TransientError),
        (Answered(507), StorageFullError),
        (OSError(errno.EACCES, "no"), AuthorizationError),
        (OSError(errno.ENOSPC, "full"), StorageFullError),
        (OSError(errno.ECONNRESET, "reset"), TransientError),
        (NotADirectoryError(errno.ENOTDIR, "a file"), UsageError),
        (NotImplementedError("pipe"), StorageError),
        (RuntimeError("who knows"), TransientError),
    ],
)
def test_what_fails_is_one_of_our_errors(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "error", error, raising=False)
    store = FsspecStore(f"failing://{os.urandom(4).hex()}")
    with pytest.raises(kind) as caught:
        store.write("a", b"0123456789")
    assert type(caught.value) is kind
    assert caught.value.where == f"{store.uri}/a"
    assert store.stat("a") is None  # half of it had arrived, under another name
    assert list(store.list_objects("")) == []
    assert store.list_unfinished("") == []


def test_what_a_dead_process_left_half_is_seen_by_nobody(tmp_path: Path) -> None:
    store = FsspecStore(f"local://{tmp_path}/run")
    store.write("a/1", b"x")
    left = tmp_path / "run" / "a" / f"{TEMPORARY}dead"
    left.write_bytes(b"half")
    assert [info.key for info in store.list_objects("")] == ["a/1"]
    [unfinished] = store.list_unfinished("a")
    assert (unfinished.key, unfinished.size_bytes) == (f"a/{left.name}", 4)
    store.abandon([unfinished])
    assert not left.exists()


def test_where_nothing_can_be_moved_onto_the_old_object_goes_first(tmp_path: Path) -> None:
    store = FsspecStore(f"unmoving://{tmp_path}/run")
    store.write("a", b"old")
    store.write("a", b"new")
    assert store.read("a") == b"new"


@pytest.mark.parametrize("key", ["../a", "a/../../b"])
def test_no_key_leaves_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match="leaves the root"):
        FsspecStore(f"local://{tmp_path}/run").delete([key])


@pytest.mark.parametrize("uri", ["gs://bucket/run", "abfs://container/run"])
def test_a_package_that_is_missing_is_named(uri: str) -> None:
    with pytest.raises(UsageError, match="its package is missing") as caught:
        open_catalog(uri)
    assert "nstall" in str(caught.value)


@pytest.mark.parametrize("uri", ["https://host/a", "tape://1", ""])
def test_what_is_no_place_for_a_root_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="no backend"):
        open_catalog(uri)


def test_a_server_that_is_not_there_is_worth_another_try() -> None:
    with pytest.raises(TransientError) as caught:
        open_catalog("ftp://127.0.0.1:1/run")
    assert caught.value.where == "ftp://127.0.0.1:1/run"
