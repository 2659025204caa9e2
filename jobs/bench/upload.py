"""One large file and many small ones go to an S3 store and come back: ours, and what others do.

Every way uses the endpoint and keys that the environment names. Peers that are not installed are
left out. The limit is a socket on this machine to a process that reads and keeps nothing: no store
answers sooner.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs.bench.rows import LIMIT, OURS, Sent, rows_of
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import describe_file
from ray_ckpt.storage.disk.posix import write_synced
from ray_ckpt.storage.marker import MarkerCommit
from ray_ckpt.storage.proven import Origin, bring_all
from ray_ckpt.storage.s3.store import S3Store

SMALL_BYTES = 16_384
_THREADS = 10
_BLOCK_BYTES = 8 << 20

Way = Callable[[], object]


def measure_uploads(
    folder: Path, root: str, *, size_mb: int, num_small: int, repeats: int
) -> list[Sent]:
    """Rows for a file of `size_mb` megabytes there and back, and for so many small ones."""
    large = _large_file(folder / "large", size_mb)
    small = _small_files(folder / "small", num_small)
    size_bytes = large.stat().st_size
    with _sink() as port:
        rows = rows_of("large up", _uploads(root, large, port), repeats, size_bytes)
    rows += rows_of("large down", _downloads(root, folder / "back"), repeats, size_bytes)
    scratch = folder / "scratch"
    prepare = partial(_linked, small, scratch)
    many = _many(root, small, scratch)
    rows += rows_of("many up", many, repeats, num_small * SMALL_BYTES, prepare=prepare)
    back = _NewFolders(folder / "many")
    many = _many_back(root, small, back)
    rows += rows_of("many down", many, repeats, num_small * SMALL_BYTES, prepare=back.make)
    return rows


def _uploads(root: str, path: Path, port: int) -> dict[str, Way]:
    bucket, key = _split(root, "large")
    ways: dict[str, Way] = {
        LIMIT: partial(_to_nobody, path, port),
        OURS: lambda: S3Store(root).upload(path, "large"),
        "s3fs.put_file": lambda: _s3fs().put_file(str(path), f"{bucket}/{key}"),
    }
    if aws := shutil.which("aws"):
        ways["aws s3 cp"] = lambda: _aws(aws, str(path), f"s3://{bucket}/{key}")
    if _has("boto3"):
        ways["boto3.upload_file"] = lambda: _boto3().upload_file(str(path), bucket, key)
    if _has("obstore"):
        ways["obstore.put"] = lambda: _obstore_put(bucket, {key: path})
    return ways


def _downloads(root: str, target: Path) -> dict[str, Way]:
    bucket, key = _split(root, "large")
    ways: dict[str, Way] = {
        OURS: lambda: S3Store(root).download("large", target),
        "s3fs.get_file": lambda: _s3fs().get_file(f"{bucket}/{key}", str(target)),
    }
    if aws := shutil.which("aws"):
        ways["aws s3 cp"] = lambda: _aws(aws, f"s3://{bucket}/{key}", str(target))
    if _has("boto3"):
        ways["boto3.download_file"] = lambda: _boto3().download_file(bucket, key, str(target))
    if _has("obstore"):
        ways["obstore.get"] = lambda: _obstore_get(bucket, key, target)
    return ways


def _many(root: str, small: Path, scratch: Path) -> dict[str, Way]:
    bucket, key = _split(root, "many")
    files = {f"{key}/{path.name}": path for path in sorted(small.iterdir())}
    ways: dict[str, Way] = {
        OURS: lambda: MarkerCommit(open_catalog(root).store).contribute(scratch, "many"),
        "s3fs.put": lambda: _s3fs().put(str(small), f"{bucket}/{key}", recursive=True),
    }
    if _has("boto3"):
        ways["boto3.upload_file, threads"] = lambda: _boto3_many(bucket, files)
    if _has("obstore"):
        ways["obstore.put, threads"] = lambda: _obstore_put(bucket, files)
    return ways


def _many_back(root: str, small: Path, back: "_NewFolders") -> dict[str, Way]:
    bucket, key = _split(root, "many")
    names = [path.name for path in sorted(small.iterdir())]
    entries = [describe_file(small / name, name, "crc64nvme") for name in names]
    ways: dict[str, Way] = {
        OURS: lambda: bring_all(_origin(root), entries, back.now),
        "s3fs.get": lambda: _s3fs().get(f"{bucket}/{key}", str(back.now / "all"), recursive=True),
    }
    if _has("boto3"):
        ways["boto3.download_file, threads"] = lambda: _boto3_back(bucket, key, names, back.now)
    if _has("obstore"):

        def bring(write: Callable[[Path, Any], object]) -> None:
            _obstore_back(bucket, key, names, back.now, write=write)

        ways["obstore.get, threads"] = lambda: bring(Path.write_bytes)
        ways["obstore.get, threads, synced"] = lambda: bring(write_synced)
    return ways


def _origin(root: str) -> Origin:
    return Origin(store=S3Store(root), folder="many", safe="", do="")


def _split(root: str, name: str) -> tuple[str, str]:
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/{name}"


def _s3fs() -> Any:
    import s3fs  # pyright: ignore[reportMissingTypeStubs]

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def _boto3() -> Any:
    return importlib.import_module("boto3").client("s3")


def _aws(command: str, source: str, target: str) -> None:
    subprocess.run([command, "s3", "cp", "--only-show-errors", source, target], check=True)


def _boto3_many(bucket: str, files: Mapping[str, Path]) -> None:
    client = _boto3()
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(lambda key: client.upload_file(str(files[key]), bucket, key), files):
            pass


def _boto3_back(bucket: str, key: str, names: Sequence[str], back: Path) -> None:
    client = _boto3()

    def bring(name: str) -> None:
        client.download_file(bucket, f"{key}/{name}", str(back / name))

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(bring, names):
            pass


def _obstore_back(
    bucket: str,
    key: str,
    names: Sequence[str],
    back: Path,
    *,
    write: Callable[[Path, Any], object],
) -> None:
    obstore, store = _obstore(bucket)

    def bring(name: str) -> None:
        write(back / name, obstore.get(store, f"{key}/{name}").bytes())

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(bring, names):
            pass


def _obstore_put(bucket: str, files: Mapping[str, Path]) -> None:
    obstore, store = _obstore(bucket)
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(lambda key: obstore.put(store, key, files[key]), files):
            pass


def _obstore_get(bucket: str, key: str, target: Path) -> None:
    obstore, store = _obstore(bucket)
    with target.open("wb") as file:
        for block in obstore.get(store, key).stream(min_chunk_size=_BLOCK_BYTES):
            file.write(block)


def _obstore(bucket: str) -> tuple[Any, Any]:
    obstore: Any = importlib.import_module("obstore")
    stores: Any = importlib.import_module("obstore.store")
    http = {"allow_http": True}
    return obstore, stores.S3Store(bucket, client_options=http)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _to_nobody(path: Path, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as there, path.open("rb") as file:
        there.sendfile(file)
        there.shutdown(socket.SHUT_WR)
        there.recv(1)  # it has read all


@contextmanager
def _sink() -> Iterator[int]:
    """A port, on which another process reads what one client after the other sends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = get_context("spawn").Process(target=_swallow, args=(listener,), daemon=True)
        process.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            process.terminate()
            process.join()


def _swallow(listener: socket.socket) -> None:
    buffer = bytearray(_BLOCK_BYTES)
    while True:
        connection, _ = listener.accept()
        with connection:
            while connection.recv_into(buffer):
                pass


def _large_file(path: Path, size_mb: int) -> Path:
    with path.open("wb") as file:
        for _ in range(size_mb):
            file.write(os.urandom(1_000_000))
    return path


def _small_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04d}").write_bytes(os.urandom(SMALL_BYTES))
    return folder


class _NewFolders:
    """One for each time: where ext4 has just deleted files, a new one costs ten times as much.

    It passes over every inode that became free a moment ago.
    """

    def __init__(self, below: Path) -> None:
        self._below = below
        self._numbers = count()
        self.now = below
        """The newest."""

    def make(self) -> None:
        """Nobody's syncs are to wait for what others have left to write."""
        self.now = self._below / str(next(self._numbers))
        self.now.mkdir(parents=True)
        os.sync()


def _linked(source: Path, target: Path) -> None:
    """Ours takes files away once they are sent: it gets links to them."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).hardlink_to(path)
