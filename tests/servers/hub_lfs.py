"""The endpoints of the Hub double about the storage that a repository's large files take.

A file counts from its upload on, until it is deleted here: no commit and no squash frees it.
"""

from http import HTTPStatus

from tests.servers.hub_repo import HeldFile, RefusedError
from tests.servers.hub_wire import Hub, Request, Response, json_response, timestamp


def list_files(hub: Hub, request: Request, *, name: str) -> Response:
    return json_response([_entry(held) for held in hub.repository(request, name).large.values()])


def _entry(held: HeldFile) -> dict[str, object]:
    return {
        "fileOid": held.file.sha256,
        "filename": held.path,
        "oid": held.file.git_oid,
        "pushedAt": timestamp(held.moment),
        "size": held.file.size,
    }


def delete_files(hub: Hub, request: Request, *, name: str) -> Response:
    """Their contents are gone, also where a commit names them: its downloads end with 404."""
    asked = request.json()["deletions"]
    if asked["rewriteHistory"]:
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "the Hub double rewrites no commit")
    repository = hub.repository(request, name)
    for sha256 in asked["sha"]:
        repository.large.pop(sha256, None)
        if not any(sha256 in other.large for other in hub.repositories.values()):
            hub.blobs.forget(sha256)
            hub.xet.forget(sha256)
    return json_response({})
