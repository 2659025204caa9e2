"""A Hugging Face Hub for tests: the conversation of the real client, over HTTP on 127.0.0.1.

Knows the endpoints that huggingface_hub 2.4.0 calls for buckets and model repositories, with and
without Xet, and how to fail on request. Refuses to know the Hub's policy (quotas, rate limits) and
every endpoint that is not in ROUTES, which it answers with 501.

    hub.py (faults, routes) -> hub_read.py, hub_write.py, hub_xet.py -> hub_wire.py -> hub_repo.py
                            -> hub_socket.py                                        -> xet_store.py

Left out: datasets and spaces, pull requests, multipart LFS uploads.
"""

import io
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote

from huggingface_hub import HfApi

from tests.servers import hub_buckets, hub_lfs, hub_read, hub_write, hub_xet
from tests.servers.faults import FOR_EVER, Fault, Faults, Wrong
from tests.servers.hub_repo import BlobStore, RefusedError
from tests.servers.hub_socket import Server
from tests.servers.hub_wire import (
    Access,
    Account,
    Hub,
    Request,
    Response,
    check_access,
    refusal,
)
from tests.servers.xet_store import XetStore

WRITE_TOKEN = "hf_test"
READ_ONLY_TOKEN = "hf_readonly"
ACCOUNTS = {
    WRITE_TOKEN: Account(user="ray", access=Access.WRITE),
    READ_ONLY_TOKEN: Account(user="ray", access=Access.READ),
}

Way = Literal["lfs", "xet"]

# A slash inside a name arrives as %2F, so one part of a path never holds one.
REPOSITORY = "(?P<name>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
REFERENCE = "(?P<reference>[^/]+)"
MODEL = f"/api/models/{REPOSITORY}"
BUCKET = f"/api/buckets/{REPOSITORY}"
LFS = f"/{REPOSITORY}[.]git/info/lfs/objects"

# (method, pattern of the path, least access, endpoint); named groups become its arguments.
ROUTES: tuple[tuple[str, str, Access, Callable[..., Response]], ...] = (
    ("GET", "/api/whoami-v2", Access.READ, hub_read.whoami),
    ("GET", MODEL, Access.ANYONE, hub_read.info),
    ("GET", f"{MODEL}/revision/{REVISION}", Access.ANYONE, hub_read.info),
    ("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?", Access.ANYONE, hub_read.tree),
    ("GET", f"{MODEL}/refs", Access.ANYONE, hub_read.references),
    ("GET", f"{MODEL}/commits/{REVISION}", Access.ANYONE, hub_read.history),
    ("GET", f"{MODEL}/auth-check", Access.ANYONE, hub_read.check_repository),
    ("GET", f"{MODEL}/auth-check/write", Access.WRITE, hub_read.check_repository),
    ("GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", Access.ANYONE, hub_read.download),
    ("POST", "/api/repos/create", Access.WRITE, hub_write.create_repository),
    ("DELETE", "/api/repos/delete", Access.WRITE, hub_write.delete_repository),
    ("POST", f"{MODEL}/branch/{REFERENCE}", Access.WRITE, hub_write.create_branch),
    ("DELETE", f"{MODEL}/branch/{REFERENCE}", Access.WRITE, hub_write.delete_branch),
    ("POST", f"{MODEL}/tag/{REFERENCE}", Access.WRITE, hub_write.create_tag),
    ("DELETE", f"{MODEL}/tag/{REFERENCE}", Access.WRITE, hub_write.delete_tag),
    ("POST", "/api/validate-yaml", Access.ANYONE, hub_write.validate_yaml),
    ("POST", f"{MODEL}/preupload/{REVISION}", Access.WRITE, hub_write.preupload),
    ("POST", f"{LFS}/batch", Access.WRITE, hub_write.lfs_batch),
    # The client sends no token here: on the Hub the URL itself is signed.
    ("PUT", "/lfs-blobs/(?P<sha256>[^/]+)", Access.ANYONE, hub_write.put_blob),
    ("POST", f"{LFS}/verify", Access.WRITE, hub_write.verify_blob),
    ("POST", f"{MODEL}/commit/{REVISION}", Access.WRITE, hub_write.commit),
    ("POST", f"{MODEL}/super-squash/{REFERENCE}", Access.WRITE, hub_write.super_squash),
    ("GET", f"{MODEL}/lfs-files", Access.WRITE, hub_lfs.list_files),
    ("POST", f"{MODEL}/lfs-files/batch", Access.WRITE, hub_lfs.delete_files),
    ("GET", "/api/buckets/(?P<owner>[^/]+)", Access.ANYONE, hub_buckets.of_owner),
    ("POST", BUCKET, Access.WRITE, hub_buckets.create),
    ("GET", BUCKET, Access.ANYONE, hub_buckets.info),
    ("DELETE", BUCKET, Access.WRITE, hub_buckets.delete),
    ("GET", f"{BUCKET}/tree(?:/(?P<prefix>[^/]+))?", Access.ANYONE, hub_buckets.tree),
    ("POST", f"{BUCKET}/paths-info", Access.ANYONE, hub_buckets.paths_info),
    ("POST", f"{BUCKET}/batch", Access.WRITE, hub_buckets.batch),
    ("GET", f"{BUCKET}/xet-read-token", Access.ANYONE, hub_buckets.token),
    ("GET", f"{BUCKET}/xet-write-token", Access.WRITE, hub_buckets.token),
    ("GET", f"/buckets/{REPOSITORY}/resolve/(?P<path>.+)", Access.ANYONE, hub_buckets.download),
    ("GET", f"{MODEL}/xet-read-token/{REVISION}", Access.ANYONE, hub_xet.token),
    ("GET", f"{MODEL}/xet-write-token/{REVISION}", Access.WRITE, hub_xet.token),
)


class HubDouble:
    """A Hub that answers inside its `with` block, on the port that `url` names.

    LFS files lie in `folder`/lfs, each under its SHA-256; those that came by Xet in `xet`.

    `requests` holds "METHOD path" of all requests so far, in order, the failed ones too, of the Hub
    and of its Xet server. Paths are as they were sent: percent-encoded, without the query.
    """

    def __init__(self, folder: Path, *, way: Way = "lfs") -> None:
        """`way`: how the clients of `environment()` are to send and fetch large files."""
        self.folder = folder
        self.way = way
        self.requests: list[str] = []
        self._faults = Faults()
        self._lock = threading.Lock()
        self._server = Server(lambda request: self._answer(request, self._respond))
        self._cas = Server(lambda request: self._answer(request, self._respond_as_cas))
        self.xet = XetStore(folder / "xet", url=self._cas.url)
        blobs = BlobStore(folder / "lfs")
        self._hub = Hub(
            url=self.url,
            accounts=ACCOUNTS,
            blobs=blobs,
            xet=self.xet,
            repositories={},
            buckets={},
        )

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def token(self) -> str:
        """The token of user `ray` that may change everything."""
        return WRITE_TOKEN

    @property
    def read_only_token(self) -> str:
        """The token of user `ray` whose changes are refused with 403."""
        return READ_ONLY_TOKEN

    def environment(self) -> dict[str, str]:
        """The variables by which huggingface_hub finds this server, and a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "0" if self.way == "xet" else "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        }

    def api(self) -> HfApi:
        """The real client of user `ray`."""
        return HfApi(endpoint=self.url, token=self.token)

    def fail(
        self,
        *,
        match: str,
        times: int = 1,
        status: int = 500,
        after: bool = False,
        text: str = "the test asked for it",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """The next `times` requests whose "METHOD path" `match` is found in are answered `status`.

        `after=True`: each is carried out first, and its answer lost. The client waits and retries
        most calls on 408, 429 and 5xx (1 s, 2 s, ...), but never the commit.
        """
        fault = Fault(
            match=re.compile(match),
            wrong=Wrong.LATE_ANSWER if after else Wrong.ANSWER,
            status=status,
            text=text,
            headers=headers or {},
            body=body,
        )
        self._faults.add(fault, times=times)

    def hang(self, *, match: str, times: int = FOR_EVER) -> None:
        """So many requests are never answered."""
        self._faults.add(Fault(match=re.compile(match), wrong=Wrong.SILENCE), times=times)

    @property
    def num_silent(self) -> int:
        """Requests so far that nobody answers."""
        return self._faults.num_silent

    def drop(self, *, match: str, after_bytes: int, times: int = 1) -> None:
        """The answers to so many requests break off after so many bytes of their bodies."""
        fault = Fault(match=re.compile(match), wrong=Wrong.BROKEN_BODY, after_bytes=after_bytes)
        self._faults.add(fault, times=times)

    def meanwhile(self, *, match: str, do: Callable[[], object]) -> None:
        """Right before the next request that matches is looked at, `do` is called, once."""
        self._faults.meanwhile(match=match, do=do)

    def recover(self) -> None:
        """All is well again."""
        self._faults.forget()

    def __enter__(self) -> Self:
        self._server.start()
        self._cas.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._faults.close()
        self._server.close()
        self._cas.close()

    def _respond(self, request: Request) -> Response:
        """One request at a time."""
        with self._lock:
            return _respond(self._hub, request)

    def _respond_as_cas(self, request: Request) -> Response:
        """Also while the Hub itself fetches a file that came by Xet."""
        try:
            return hub_xet.respond(self.xet, request)
        except RefusedError as reason:
            return refusal(reason)

    def _answer(self, request: Request, respond: Callable[[Request], Response]) -> Response:
        line = f"{request.method} {request.path}"
        fault = self._faults.take(line)
        self.requests.append(line)
        if fault is None:
            return respond(request)
        if fault.wrong is Wrong.BROKEN_BODY:
            return replace(respond(request), sent_bytes=fault.after_bytes)
        if fault.wrong is Wrong.LATE_ANSWER:
            respond(request).body.close()
        if fault.wrong is Wrong.SILENCE:
            self._faults.stay_silent()
        return _answer_of(fault, line)


def _answer_of(fault: Fault, line: str) -> Response:
    if fault.body:
        body = io.BytesIO(fault.body)
        return Response(status=fault.status, body=body, length_bytes=len(fault.body))
    return refusal(RefusedError(fault.status, f"{fault.text}: {line}", fault.headers))


def _respond(hub: Hub, request: Request) -> Response:
    """The answer of the one route that fits; a refusal is an answer too."""
    # A HEAD is a GET whose body is not sent.
    method = "GET" if request.method == "HEAD" else request.method
    try:
        for route_method, pattern, needs, endpoint in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and route_method == method:
                check_access(hub, request, needs=needs)
                return endpoint(hub, request, **_arguments(found))
        raise RefusedError(
            HTTPStatus.NOT_IMPLEMENTED, f"the Hub double has no {request.method} {request.path}"
        )
    except RefusedError as reason:
        return refusal(reason)


def _arguments(found: re.Match[str]) -> dict[str, str]:
    return {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
