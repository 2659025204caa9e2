"""The endpoints of the Hub double that only read: accounts, listings, references, downloads.

Knows the JSON fields and headers that huggingface_hub 2.4.0 reads. Refuses to change anything.
Listings come in one page, and LFS files from this host, where the Hub redirects to another one.
"""

import io
import re
from http import HTTPStatus
from typing import IO, Any

from tests.servers import hub_xet
from tests.servers.hub_repo import (
    DEFAULT_BRANCH,
    Commit,
    HubFile,
    LargeFile,
    RefusedError,
    RegularFile,
    entry_not_found,
)
from tests.servers.hub_wire import Hub, Request, Response, json_response, timestamp


def whoami(hub: Hub, request: Request) -> Response:
    caller = hub.caller(request)
    assert caller is not None, "the route needs a token"
    access_token = {"displayName": "test", "role": caller.access.name.lower()}
    return json_response(
        {
            "type": "user",
            "name": caller.user,
            "fullname": caller.user,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": access_token},
        }
    )


def check_repository(hub: Hub, request: Request, *, name: str) -> Response:
    hub.repository(request, name)
    return json_response({})


def info(hub: Hub, request: Request, *, name: str, revision: str = DEFAULT_BRANCH) -> Response:
    repository = hub.repository(request, name)
    commit = repository.resolve(revision)
    describe = _sibling_with_blob if "blobs" in request.query else _sibling
    return json_response(
        {
            "_id": name,
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit.oid,
            "lastModified": timestamp(commit.moment),
            "createdAt": timestamp(repository.created),
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [describe(path, file) for path, file in sorted(commit.files.items())],
        }
    )


def _sibling(path: str, _file: HubFile) -> dict[str, object]:
    return {"rfilename": path}


def _sibling_with_blob(path: str, file: HubFile) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path, "size": file.size, "blobId": file.git_oid}
    if isinstance(file, LargeFile):
        pointer_size = len(file.pointer)
        entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer_size}
    return entry


def tree(hub: Hub, request: Request, *, name: str, revision: str, folder: str = "") -> Response:
    commit = hub.repository(request, name).resolve(revision)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    below = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
    if folder and not below:
        raise entry_not_found(folder)
    folders = {path[:end] for path in below for end in _slashes(path) if end > len(prefix)}
    entries = [_folder_entry(path) for path in folders]
    entries += [_file_entry(hub, path, file) for path, file in below.items()]
    if request.query.get("recursive", "").lower() not in ("true", "1"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    return json_response(sorted(entries, key=lambda entry: entry["path"]))


def _slashes(path: str) -> list[int]:
    return [position for position, character in enumerate(path) if character == "/"]


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def _file_entry(hub: Hub, path: str, file: HubFile) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
    if isinstance(file, LargeFile):
        pointer_size = len(file.pointer)
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer_size}
        if found := hub.xet.find(file):
            entry["xetHash"] = found.hash
    return entry


def references(hub: Hub, request: Request, *, name: str) -> Response:
    repository = hub.repository(request, name)
    return json_response(
        {
            "branches": _reference_entries("refs/heads", repository.branches),
            "tags": _reference_entries("refs/tags", repository.tags),
            "converts": [],
            "pullRequests": [],
        }
    )


def _reference_entries(folder: str, oids: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"{folder}/{name}", "targetCommit": oid} for name, oid in oids.items()
    ]


def history(hub: Hub, request: Request, *, name: str, revision: str) -> Response:
    commits = hub.repository(request, name).history(revision)
    owner = name.split("/")[0]
    return json_response([_commit_entry(commit, owner=owner) for commit in commits])


def _commit_entry(commit: Commit, *, owner: str) -> dict[str, object]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": timestamp(commit.moment),
        "authors": [{"user": owner}],
    }


def download(hub: Hub, request: Request, *, name: str, revision: str, path: str) -> Response:
    """The file, or the part of it that a Range header asks for; it tells its commit either way."""
    commit = hub.repository(request, name).resolve(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    file = commit.files.get(path)
    if file is None:
        missing = entry_not_found(path)
        raise RefusedError(missing.status, missing.message, {**missing.headers, **headers})
    if isinstance(file, LargeFile) and not hub.has(file):
        raise entry_not_found(path)
    headers |= _file_headers(file) | hub_xet.whereabouts(hub, file, name=name, commit=commit.oid)
    asked = request.headers.get("range")
    wanted = range(file.size) if asked is None else wanted_range(asked, size=file.size)
    status = HTTPStatus.OK if asked is None else HTTPStatus.PARTIAL_CONTENT
    if asked is not None:
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{file.size}"
    body = _open(hub, file)
    body.seek(wanted.start)
    return Response(status=status, headers=headers, body=body, length_bytes=len(wanted))


def _file_headers(file: HubFile) -> dict[str, str]:
    etag = f'"{file.etag}"'
    if isinstance(file, RegularFile):
        return {"ETag": etag}
    return {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(file.size)}


def _open(hub: Hub, file: HubFile) -> IO[bytes]:
    return io.BytesIO(file.content) if isinstance(file, RegularFile) else hub.open(file)


def wanted_range(header: str, *, size: int) -> range:
    """The positions of the bytes that `bytes=first-last` or `bytes=first-` asks for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if asked is None or int(asked[1]) >= size:
        status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        raise RefusedError(
            status, f"{header} of {size} bytes", {"Content-Range": f"bytes */{size}"}
        )
    last = int(asked[2]) if asked[2] else size - 1
    return range(int(asked[1]), min(last + 1, size))
