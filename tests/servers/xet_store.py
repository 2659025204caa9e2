"""What a Xet server of the Hub double holds: large files as chunks, each chunk once.

Knows as much of hf_xet 1.8.0's two formats as that takes, and no HTTP:

    xorb     chunks one after the other, each behind 8 bytes: version, packed size, packing, size
    shard    which files there are: of each its Xet hash, its SHA-256, and terms (xorb, chunks)

Refuses to unpack a chunk: who wants a whole file, also the Hub double itself, asks hf_xet.
"""

import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO

from tests.servers.hub_repo import LargeFile, RefusedError

ACCESS_TOKEN = "xet-access"
LIFETIME_S = 3600
_HASH_BYTES = 32
_RECORD_BYTES = 48
_LAST_RECORD = b"\xff" * _HASH_BYTES
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_CHUNK_HEAD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A piece of a file: some chunks of a xorb, which have so many bytes once unpacked."""

    xorb: str
    first: int
    end: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class XetFile:
    """A file as a shard describes it."""

    hash: str
    sha256: str | None
    terms: tuple[Term, ...]

    @property
    def size_bytes(self) -> int:
        return sum(term.size_bytes for term in self.terms)


class XetStore:
    """What the Xet server holds: xorbs on disk, and the files that shards made of them."""

    def __init__(self, folder: Path, *, url: str) -> None:
        """`url` is where the server answers that holds this."""
        self.url = url
        self._xorbs = folder / "xorbs"
        self._rebuilt = folder / "rebuilt"
        for path in (self._xorbs, self._rebuilt):
            path.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, XetFile] = {}
        self.received_bytes = 0
        """Of xorbs that clients have sent, also of those that were here."""
        self._lock = threading.Lock()

    @property
    def stored_bytes(self) -> int:
        """Of all xorbs that are here."""
        return sum(path.stat().st_size for path in self._xorbs.iterdir())

    def has_xorb(self, name: str) -> bool:
        return self.xorb(name).exists()

    def xorb(self, name: str) -> Path:
        return self._xorbs / name

    def put_xorb(self, name: str, content: bytes) -> bool:
        """Whether it is new; it is there, whole."""
        self.received_bytes += len(content)
        if self.has_xorb(name):
            return False
        arriving = self._xorbs.parent / f"arriving-{name}"
        arriving.write_bytes(content)
        arriving.rename(self.xorb(name))
        return True

    def put_shard(self, content: bytes) -> None:
        """Its files are known; 400 if it names a xorb that nobody has sent."""
        files = list(_files(content))
        for name in {term.xorb for file in files for term in file.terms}:
            if not self.has_xorb(name):
                raise RefusedError(HTTPStatus.BAD_REQUEST, f"xorb {name} is missing")
        with self._lock:
            self._files.update({file.hash: file for file in files})

    def file(self, name: str) -> XetFile:
        if name not in self._files:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no file {name}")
        return self._files[name]

    def find(self, file: LargeFile) -> XetFile | None:
        """The file with that SHA-256 and size."""
        with self._lock:
            found = [each for each in self._files.values() if each.sha256 == file.sha256]
        return next((each for each in found if each.size_bytes == file.size), None)

    def open(self, found: XetFile) -> IO[bytes]:
        """The file's bytes, for clients that do not speak Xet."""
        path = self._rebuilt / found.hash
        if not found.terms:
            path.touch()
        if not path.exists():
            _download(self.url, found, path)
        return path.open("rb")

    def forget(self, sha256: str) -> None:
        """The file is gone, and every xorb that no other file has a piece of."""
        with self._lock:
            gone = [file for file in self._files.values() if file.sha256 == sha256]
            for file in gone:
                del self._files[file.hash]
                (self._rebuilt / file.hash).unlink(missing_ok=True)
            needed = {term.xorb for file in self._files.values() for term in file.terms}
            for term in (term for file in gone for term in file.terms):
                if term.xorb not in needed:
                    self.xorb(term.xorb).unlink(missing_ok=True)


def _download(url: str, found: XetFile, path: Path) -> None:
    from hf_xet import XetFileInfo, XetSession  # type: ignore[attr-defined]  # not in every version

    group = XetSession().new_file_download_group(
        endpoint=url, token=ACCESS_TOKEN, token_expiry_unix_secs=int(time.time()) + LIFETIME_S
    )
    arriving = path.with_suffix(".arriving")
    with group:
        group.start_download_file(XetFileInfo(found.hash, found.size_bytes), str(arriving))
    arriving.rename(path)


# ---- the two formats ----


def _files(shard: bytes) -> Iterator[XetFile]:
    """The files of a shard: a record each, one a term, and what the flags say."""
    position = _RECORD_BYTES
    while (name := shard[position : position + _HASH_BYTES]) != _LAST_RECORD:
        flags, num_terms = struct.unpack_from("<II", shard, position + _HASH_BYTES)
        position += _RECORD_BYTES
        terms = tuple(_term(shard, position + n * _RECORD_BYTES) for n in range(num_terms))
        position += num_terms * _RECORD_BYTES * (2 if flags & _WITH_VERIFICATION else 1)
        sha256 = None
        if flags & _WITH_SHA256:
            sha256 = _hex(shard[position : position + _HASH_BYTES])
            position += _RECORD_BYTES
        yield XetFile(hash=_hex(name), sha256=sha256, terms=terms)


def _term(shard: bytes, position: int) -> Term:
    _flags, size_bytes, first, end = struct.unpack_from("<IIII", shard, position + _HASH_BYTES)
    xorb = _hex(shard[position : position + _HASH_BYTES])
    return Term(xorb=xorb, first=first, end=end, size_bytes=size_bytes)


def _hex(name: bytes) -> str:
    """As Xet writes its names: four numbers of eight bytes, the lowest byte first."""
    return "".join(name[n : n + 8][::-1].hex() for n in range(0, _HASH_BYTES, 8))


def chunk_edges(xorb: bytes) -> list[int]:
    """Where each chunk begins, and where the last one ends."""
    edges = [0]
    while edges[-1] + _CHUNK_HEAD_BYTES <= len(xorb) and xorb[edges[-1]] == 0:
        packed_bytes = int.from_bytes(xorb[edges[-1] + 1 : edges[-1] + 4], "little")
        edges.append(edges[-1] + _CHUNK_HEAD_BYTES + packed_bytes)
    return edges
