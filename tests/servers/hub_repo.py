"""The state behind the Hub double: repositories in memory, the bytes of LFS files on disk.

Knows commits, branches, tags and the two kinds of file the Hub has, and what the Hub refuses.
Refuses to know HTTP and JSON: a refusal carries a status, and that is all.

    Repository
      branches  main -> oid, ...
      tags      v1   -> oid, ...
      commits   oid  -> Commit(files: path -> RegularFile(content) | LargeFile(sha256, size))
    BlobStore
      <folder>/<sha256>   content of a LargeFile, present only when its hash was checked
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import IO

DEFAULT_BRANCH = "main"
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class RefusedError(Exception):
    """The Hub says no; `headers` tell the client's library which of its errors to raise."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def revision_not_found(revision: str) -> RefusedError:
    headers = {"X-Error-Code": "RevisionNotFound"}
    return RefusedError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", headers)


def entry_not_found(path: str) -> RefusedError:
    headers = {"X-Error-Code": "EntryNotFound"}
    return RefusedError(
        HTTPStatus.NOT_FOUND, f"A file with this name doesn't exist: {path}", headers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularFile:
    """A file that git itself holds."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def git_oid(self) -> str:
        return _git_blob_oid(self.content)

    @property
    def etag(self) -> str:
        """The name of the content that the client compares with: here that of the git blob."""
        return self.git_oid


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeFile:
    """A file of which git holds a pointer, and the blob store the content."""

    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_oid(self) -> str:
        return _git_blob_oid(self.pointer)

    @property
    def etag(self) -> str:
        """The name of the content that the client compares with: here its SHA-256."""
        return self.sha256


HubFile = RegularFile | LargeFile


@dataclass(frozen=True, slots=True, kw_only=True)
class PutFile:
    path: str
    file: HubFile


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteFile:
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteFolder:
    path: str


Change = PutFile | DeleteFile | DeleteFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A commit as the client asks for it; `parent` is the head it must find, None for any."""

    title: str
    message: str
    parent: str | None
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A whole tree and how it came about; never changed once made."""

    oid: str
    parent: str | None
    title: str
    message: str
    moment: datetime
    files: Mapping[str, HubFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A large file of a repository, and since when; `path` is one of those it was committed as."""

    path: str
    file: LargeFile
    moment: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketEntry:
    """A file of a bucket: what the Xet server has under this name."""

    xet_hash: str
    size: int
    moment: datetime


@dataclass(slots=True, kw_only=True)
class Bucket:
    """Files without a history."""

    private: bool
    moment: datetime
    files: dict[str, BucketEntry] = field(default_factory=dict[str, BucketEntry])


class Repository:
    """One model repository; as on the Hub its `main` is born with a `.gitattributes`."""

    def __init__(self, name: str, *, private: bool, moment: datetime) -> None:
        self.name = name
        self.private = private
        self.created = moment
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.large: dict[str, HeldFile] = {}
        """By SHA-256: what counts as the repository's storage."""
        self._commits: dict[str, Commit] = {}
        attributes = PutFile(path=".gitattributes", file=RegularFile(content=GIT_ATTRIBUTES))
        first = Proposal(title="initial commit", message="", parent=None, changes=(attributes,))
        self.branches[DEFAULT_BRANCH] = self._record(first, parent=None, moment=moment).oid

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a whole commit hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self._commits:
            raise revision_not_found(revision)
        return self._commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self._commits[commits[-1].parent])
        return commits

    def commit(self, branch: str, proposal: Proposal, *, moment: datetime) -> Commit:
        """The new head of `branch`, with all the changes; on a refusal with none of them."""
        if branch not in self.branches:
            raise revision_not_found(branch)
        head = self._commits[self.branches[branch]]
        if proposal.parent not in (None, head.oid):
            raise RefusedError(
                HTTPStatus.PRECONDITION_FAILED,
                "A commit has happened since. Please refresh and try again.",
            )
        made = self._record(proposal, parent=head, moment=moment)
        self.branches[branch] = made.oid
        return made

    def squash(self, branch: str, proposal: Proposal, *, moment: datetime) -> None:
        """The branch's head has the same files and no parent; what tags lead to stays."""
        if branch in self.tags and branch not in self.branches:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{branch} is a tag: only branches")
        if branch not in self.branches:
            raise revision_not_found(branch)
        files = self._commits[self.branches[branch]].files
        changes = tuple(PutFile(path=path, file=file) for path, file in files.items())
        made = self._record(replace(proposal, changes=changes), parent=None, moment=moment)
        self.branches[branch] = made.oid

    def hold(self, path: str, file: LargeFile, *, moment: datetime) -> None:
        """The repository has the file, whether or not a commit names it; counted once."""
        known = self.large.get(file.sha256)
        if known is None or not known.path:
            self.large[file.sha256] = HeldFile(path=path, file=file, moment=moment)

    def create_branch(self, name: str, *, start: str) -> None:
        if name in self.branches:
            raise RefusedError(HTTPStatus.CONFLICT, f"Reference already exists: refs/heads/{name}")
        self.branches[name] = self.resolve(start).oid

    def delete_branch(self, name: str) -> None:
        if name == DEFAULT_BRANCH:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"Cannot delete the default branch {name}")
        if name not in self.branches:
            raise revision_not_found(name)
        del self.branches[name]

    def create_tag(self, name: str, *, revision: str) -> None:
        if name in self.tags:
            raise RefusedError(HTTPStatus.CONFLICT, f"Reference already exists: refs/tags/{name}")
        self.tags[name] = self.resolve(revision).oid

    def delete_tag(self, name: str) -> None:
        if name not in self.tags:
            raise revision_not_found(name)
        del self.tags[name]

    def _record(self, proposal: Proposal, *, parent: Commit | None, moment: datetime) -> Commit:
        files = dict(parent.files) if parent else {}
        for change in proposal.changes:
            _apply(change, files)
        parent_oid = parent.oid if parent else None
        contents = sorted((path, file.etag) for path, file in files.items())
        # Without the moment two Hubs would give one name to two commits, and a client that
        # talks to one after the other would serve the wrong one from its cache.
        identity = (self.name, parent_oid, proposal.title, moment.isoformat(), contents)
        made = Commit(
            oid=hashlib.sha1(repr(identity).encode()).hexdigest(),
            parent=parent_oid,
            title=proposal.title,
            message=proposal.message,
            moment=moment,
            files=files,
        )
        self._commits[made.oid] = made
        return made


class BlobStore:
    """The contents of LFS files, each under its SHA-256."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def has(self, file: LargeFile) -> bool:
        """Whether the content is here, in the size that `file` claims."""
        path = self._path(file.sha256)
        return path.exists() and path.stat().st_size == file.size

    def put(self, sha256: str, content: IO[bytes]) -> None:
        """The blob is there, whole; a second put of it changes nothing. 400 if the hash differs."""
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as arriving:
            shutil.copyfileobj(content, arriving)
        path = Path(arriving.name)
        with path.open("rb") as arrived:
            found = hashlib.file_digest(arrived, "sha256").hexdigest()
        if found != sha256:
            path.unlink()
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"expected sha256 {sha256}, got {found}")
        path.replace(self._path(sha256))

    def forget(self, sha256: str) -> None:
        """It is gone."""
        self._path(sha256).unlink(missing_ok=True)

    def open(self, file: LargeFile) -> IO[bytes]:
        return self._path(file.sha256).open("rb")

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"not a sha256: {sha256!r}")
        return self._folder / sha256


def _git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _apply(change: Change, files: dict[str, HubFile]) -> None:
    match change:
        case PutFile(path=path, file=file):
            files[path] = file
        case DeleteFile(path=path):
            if path not in files:
                raise entry_not_found(path)
            del files[path]
        case DeleteFolder(path=path):
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise entry_not_found(path)
            for name in inside:
                del files[name]
