"""The vocabulary of the Hub double: requests, answers, tokens, and what the endpoints act on.

Knows who may see and change what. Refuses to know any single endpoint, and sockets.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from http import HTTPStatus
from typing import IO, Any

from tests.servers.hub_repo import BlobStore, Bucket, LargeFile, RefusedError, Repository
from tests.servers.xet_store import XetStore


class Access(IntEnum):
    """What a token allows; a request needs at least the level of its route."""

    ANYONE = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    user: str
    access: Access


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request: `path` still percent-encoded, header names in lower case, `body` unread."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: IO[bytes]

    def json(self) -> Any:
        return json.load(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One HTTP answer: `length_bytes` bytes of `body`, from where it stands."""

    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)
    body: IO[bytes]
    length_bytes: int
    sent_bytes: int | None = None
    """So many are sent before the connection ends; None for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """All that the endpoints act on."""

    url: str
    accounts: Mapping[str, Account]
    blobs: BlobStore
    xet: XetStore
    repositories: dict[str, Repository]
    buckets: dict[str, Bucket]

    def has(self, file: LargeFile) -> bool:
        """Whether the content is here, whichever way it came."""
        return self.blobs.has(file) or self.xet.find(file) is not None

    def open(self, file: LargeFile) -> IO[bytes]:
        found = None if self.blobs.has(file) else self.xet.find(file)
        return self.blobs.open(file) if found is None else self.xet.open(found)

    def caller(self, request: Request) -> Account | None:
        """Who sent the request, None without a token; 401 for a token that nobody has."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise RefusedError(
                HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header"
            )
        return account

    def repository(self, request: Request, name: str) -> Repository:
        """The repository, if the sender may know of it; a stranger gets 401 for all others."""
        caller = self.caller(request)
        repository = self.repositories.get(name)
        if repository and (caller or not repository.private):
            return repository
        status = HTTPStatus.NOT_FOUND if caller else HTTPStatus.UNAUTHORIZED
        raise RefusedError(status, "Repository not found", {"X-Error-Code": "RepoNotFound"})


def json_response(
    payload: object, *, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    content = json.dumps(payload).encode()
    return Response(
        status=status,
        headers={"Content-Type": "application/json", **(headers or {})},
        body=io.BytesIO(content),
        length_bytes=len(content),
    )


def refusal(reason: RefusedError) -> Response:
    """The answer by which the client's library recognises `reason`."""
    error = {"error": reason.message}
    return json_response(error, status=reason.status, headers=reason.headers)


def check_access(hub: Hub, request: Request, *, needs: Access) -> None:
    """The sender may do what needs `needs`; else 401 without a token, 403 with a lesser one."""
    if needs is Access.ANYONE:
        return
    caller = hub.caller(request)
    if caller is None:
        raise RefusedError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
    if caller.access < needs:
        raise RefusedError(HTTPStatus.FORBIDDEN, "Forbidden: this token lacks the write role")


def timestamp(moment: datetime) -> str:
    """`moment`, which is in UTC, in the one form that the client parses."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
