"""The endpoints of the Hub double for buckets: files without a history, which came by Xet.

A batch is no transaction: each operation succeeds or fails by itself, and 422 says that all failed.
No operation knows a condition.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from tests.servers.hub_read import wanted_range
from tests.servers.hub_repo import Bucket, BucketEntry, RefusedError, entry_not_found
from tests.servers.hub_wire import Hub, Request, Response, json_response, timestamp
from tests.servers.hub_xet import token_for


def create(hub: Hub, request: Request, *, name: str) -> Response:
    caller = hub.caller(request)
    assert caller is not None, "the route needs a token"
    if name.partition("/")[0] != caller.user:
        raise RefusedError(HTTPStatus.FORBIDDEN, "no right to create there")
    answer = {"url": f"{hub.url}/buckets/{name}"}
    if name in hub.buckets:
        # With exist_ok the client reads the URL from this refusal.
        error = {"error": "You already created this bucket", **answer}
        return json_response(error, status=HTTPStatus.CONFLICT)
    private = request.json().get("visibility") == "private"
    hub.buckets[name] = Bucket(private=private, moment=datetime.now(UTC))
    return json_response(answer)


def of_owner(hub: Hub, request: Request, *, owner: str) -> Response:
    caller = hub.caller(request)
    seen = (n for n, b in hub.buckets.items() if caller is not None or not b.private)
    return json_response([_info(hub, name) for name in seen if name.startswith(f"{owner}/")])


def info(hub: Hub, request: Request, *, name: str) -> Response:
    _bucket(hub, request, name)
    return json_response(_info(hub, name))


def _info(hub: Hub, name: str) -> dict[str, object]:
    bucket = hub.buckets[name]
    return {
        "id": name,
        "private": bucket.private,
        "createdAt": timestamp(bucket.moment),
        "size": sum(entry.size for entry in bucket.files.values()),
        "totalFiles": len(bucket.files),
    }


def delete(hub: Hub, request: Request, *, name: str) -> Response:
    _bucket(hub, request, name)
    del hub.buckets[name]
    return json_response({})


def tree(hub: Hub, request: Request, *, name: str, prefix: str = "") -> Response:
    """Files whose path starts with the prefix; without `recursive` what lies directly in it."""
    files = _bucket(hub, request, name).files
    if request.query.get("recursive", "").lower() in ("true", "1"):
        found = {path: entry for path, entry in files.items() if path.startswith(prefix)}
        return json_response([_described(path, entry) for path, entry in sorted(found.items())])
    start = f"{prefix}/" if prefix else ""
    inside = {p.removeprefix(start): e for p, e in files.items() if p.startswith(start)}
    folders = sorted({path.partition("/")[0] for path in inside if "/" in path})
    direct = sorted((path, entry) for path, entry in inside.items() if "/" not in path)
    return json_response(
        [
            *({"type": "directory", "path": start + path} for path in folders),
            *(_described(start + path, entry) for path, entry in direct),
        ]
    )


def paths_info(hub: Hub, request: Request, *, name: str) -> Response:
    files = _bucket(hub, request, name).files
    asked = request.json()["paths"]
    return json_response([_described(path, files[path]) for path in asked if path in files])


def batch(hub: Hub, request: Request, *, name: str) -> Response:
    bucket = _bucket(hub, request, name)
    operations = [json.loads(line) for line in request.body.read().splitlines()]
    failed = [
        {"path": operation["path"], "error": error}
        for operation in operations
        if (error := _apply(hub, bucket, operation)) is not None
    ]
    all_failed = len(failed) == len(operations)
    status = HTTPStatus.UNPROCESSABLE_ENTITY if all_failed else HTTPStatus.OK
    return json_response({"success": not failed, "failed": failed}, status=status)


def _apply(hub: Hub, bucket: Bucket, operation: Mapping[str, Any]) -> str | None:
    """Why it failed; None if it was carried out."""
    path = operation["path"]
    if operation["type"] == "deleteFile":
        return None if bucket.files.pop(path, None) else "no such file"
    try:
        file = hub.xet.file(operation["xetHash"])
    except RefusedError:
        return "no such content"
    bucket.files[path] = BucketEntry(
        xet_hash=file.hash, size=file.size_bytes, moment=datetime.now(UTC)
    )
    return None


def token(hub: Hub, request: Request, *, name: str) -> Response:
    _bucket(hub, request, name)
    return token_for(hub.xet)


def download(hub: Hub, request: Request, *, name: str, path: str) -> Response:
    entry = _bucket(hub, request, name).files.get(path)
    if entry is None:
        raise entry_not_found(path)
    route = f"{hub.url}/api/buckets/{name}/xet-read-token"
    headers = {
        "ETag": f'"{entry.xet_hash}"',
        "X-Linked-Size": str(entry.size),
        "X-Xet-Hash": entry.xet_hash,
        "Link": f'<{route}>; rel="xet-auth"',
    }
    asked = request.headers.get("range")
    wanted = range(entry.size) if asked is None else wanted_range(asked, size=entry.size)
    status = HTTPStatus.OK if asked is None else HTTPStatus.PARTIAL_CONTENT
    body = hub.xet.open(hub.xet.file(entry.xet_hash))
    body.seek(wanted.start)
    return Response(status=status, headers=headers, body=body, length_bytes=len(wanted))


def _bucket(hub: Hub, request: Request, name: str) -> Bucket:
    caller = hub.caller(request)
    bucket = hub.buckets.get(name)
    if bucket and (caller or not bucket.private):
        return bucket
    status = HTTPStatus.NOT_FOUND if caller else HTTPStatus.UNAUTHORIZED
    raise RefusedError(status, "Bucket not found", {"X-Error-Code": "RepoNotFound"})


def _described(path: str, entry: BucketEntry) -> dict[str, object]:
    at = timestamp(entry.moment)
    return {
        "type": "file",
        "path": path,
        "size": entry.size,
        "xetHash": entry.xet_hash,
        "mtime": at,
        "uploadedAt": at,
    }
