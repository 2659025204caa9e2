"""The endpoints of the Hub double that change it, in the order in which an upload calls them.

Knows the JSON fields that huggingface_hub 2.4.0 sends. Refuses to judge who may call
(the route says that) and what a repository accepts (the repository says that).

    preupload -> LFS batch -> PUT of each blob -> verify -> commit
    preupload -> what hub_xet.py answers                   -> commit
"""

import base64
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import yaml

from tests.servers.hub_repo import (
    DEFAULT_BRANCH,
    Change,
    DeleteFile,
    DeleteFolder,
    HubFile,
    LargeFile,
    Proposal,
    PutFile,
    RefusedError,
    RegularFile,
    Repository,
)
from tests.servers.hub_wire import Hub, Request, Response, json_response

LICENSES = frozenset({"apache-2.0", "mit", "llama3.1", "openrail", "other"})
"""Some of those that the Hub knows."""
LARGE_FILE_SUFFIX = ".safetensors"
REGULAR_FILE_LIMIT_BYTES = 10 * 1024 * 1024


def create_repository(hub: Hub, request: Request) -> Response:
    asked = request.json()
    if asked.get("type", "model") != "model":
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "the Hub double has model repositories only")
    caller = hub.caller(request)
    assert caller is not None, "the route needs a token"
    namespace = asked["organization"] or caller.user
    if namespace != caller.user:
        raise RefusedError(HTTPStatus.FORBIDDEN, f"no right to create under {namespace}")
    name = f"{namespace}/{asked['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        # With exist_ok the client reads the URL from this refusal.
        error = {"error": "You already created this model repo", **answer}
        return json_response(error, status=HTTPStatus.CONFLICT)
    private = asked.get("visibility") == "private"
    hub.repositories[name] = Repository(name, private=private, moment=datetime.now(UTC))
    return json_response(answer)


def delete_repository(hub: Hub, request: Request) -> Response:
    asked = request.json()
    caller = hub.caller(request)
    assert caller is not None, "the route needs a token"
    name = f"{asked['organization'] or caller.user}/{asked['name']}"
    hub.repository(request, name)
    del hub.repositories[name]
    return json_response({})


def create_branch(hub: Hub, request: Request, *, name: str, reference: str) -> Response:
    start = request.json().get("startingPoint", DEFAULT_BRANCH)
    hub.repository(request, name).create_branch(reference, start=start)
    return json_response({})


def delete_branch(hub: Hub, request: Request, *, name: str, reference: str) -> Response:
    hub.repository(request, name).delete_branch(reference)
    return json_response({})


def create_tag(hub: Hub, request: Request, *, name: str, reference: str) -> Response:
    tag = request.json()["tag"]
    hub.repository(request, name).create_tag(tag, revision=reference)
    return json_response({})


def delete_tag(hub: Hub, request: Request, *, name: str, reference: str) -> Response:
    hub.repository(request, name).delete_tag(reference)
    return json_response({})


def super_squash(hub: Hub, request: Request, *, name: str, reference: str) -> Response:
    title, _, message = str(request.json()["message"]).partition("\n\n")
    proposal = Proposal(title=title, message=message, parent=None, changes=())
    hub.repository(request, name).squash(reference, proposal, moment=datetime.now(UTC))
    return json_response({})


def preupload(hub: Hub, request: Request, *, name: str, revision: str) -> Response:
    present = hub.repository(request, name).resolve(revision).files
    return json_response(
        {"files": [_upload_mode(asked, present) for asked in request.json()["files"]]}
    )


def _upload_mode(asked: Mapping[str, Any], present: Mapping[str, HubFile]) -> dict[str, object]:
    """How to send one file, and what is there now: the client drops a file that is unchanged."""
    path = asked["path"]
    large = path.endswith(LARGE_FILE_SUFFIX) or asked["size"] > REGULAR_FILE_LIMIT_BYTES
    answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if path in present:
        answer["oid"] = present[path].etag
    return answer


def lfs_batch(hub: Hub, request: Request, *, name: str) -> Response:
    hub.repository(request, name)
    objects = [_lfs_object(hub, asked, name=name) for asked in request.json()["objects"]]
    return json_response({"transfer": "basic", "objects": objects})


def _lfs_object(hub: Hub, asked: Mapping[str, Any], *, name: str) -> dict[str, object]:
    """What to do for one blob; an answer without `actions` says that it is here already."""
    answer = {"oid": asked["oid"], "size": asked["size"]}
    if not hub.has(LargeFile(sha256=asked["oid"], size=asked["size"])):
        verify = f"{hub.url}/{name}.git/info/lfs/objects/verify"
        answer["actions"] = {
            "upload": {"href": f"{hub.url}/lfs-blobs/{asked['oid']}", "header": {}},
            "verify": {"href": verify, "header": {}},
        }
    return answer


def put_blob(hub: Hub, request: Request, *, sha256: str) -> Response:
    hub.blobs.put(sha256, request.body)
    return json_response({})


def verify_blob(hub: Hub, request: Request, *, name: str) -> Response:
    repository = hub.repository(request, name)
    asked = request.json()
    file = LargeFile(sha256=asked["oid"], size=asked["size"])
    _check_blob(hub, file)
    repository.hold("", file, moment=datetime.now(UTC))
    return json_response({})


def _check_blob(hub: Hub, file: LargeFile) -> None:
    if not hub.has(file):
        message = f"LFS object of {file.size} bytes is missing: {file.sha256}"
        raise RefusedError(HTTPStatus.BAD_REQUEST, message)


def commit(hub: Hub, request: Request, *, name: str, revision: str) -> Response:
    if "create_pr" in request.query:
        raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "the Hub double has no pull requests")
    repository = hub.repository(request, name)
    proposal = _proposal([json.loads(line) for line in request.body.read().splitlines()])
    for change in proposal.changes:
        if isinstance(change, PutFile) and isinstance(change.file, LargeFile):
            _check_blob(hub, change.file)
            repository.hold(change.path, change.file, moment=datetime.now(UTC))
    made = repository.commit(revision, proposal, moment=datetime.now(UTC))
    return json_response(
        {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{hub.url}/{name}/commit/{made.oid}",
            "hookOutput": "",
        }
    )


def _proposal(lines: list[Mapping[str, Any]]) -> Proposal:
    header = lines[0]["value"]
    return Proposal(
        title=header["summary"],
        message=header["description"],
        parent=header.get("parentCommit"),
        changes=tuple(_change(line["key"], line["value"]) for line in lines[1:]),
    )


def _change(key: str, value: Mapping[str, Any]) -> Change:
    path = value["path"]
    match key:
        case "file":
            content = base64.b64decode(value["content"], validate=True)
            return PutFile(path=path, file=RegularFile(content=content))
        case "lfsFile":
            return PutFile(path=path, file=LargeFile(sha256=value["oid"], size=value["size"]))
        case "deletedFile":
            return DeleteFile(path=path)
        case "deletedFolder":
            return DeleteFolder(path=path)
    raise RefusedError(HTTPStatus.BAD_REQUEST, f"unknown operation {key}")


def validate_yaml(_hub: Hub, request: Request) -> Response:
    """What is wrong with the front matter of a card, as far as our cards can get it wrong."""
    found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    errors = [] if found is None else _errors_in(found[1])
    status = HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK
    messages = [{"message": message} for message in errors]
    return json_response({"errors": messages, "warnings": []}, status=status)


def _errors_in(front_matter: str) -> list[str]:
    try:
        data = yaml.safe_load(front_matter)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    errors = []
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "gpt2")):
        errors.append('"base_model" must be a repository')
    return errors
