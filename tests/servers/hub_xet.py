"""Xet for the Hub double: the conversation of hf_xet 1.8.0 with the Hub and with a Xet server.

    the Hub's address      a token, and where the Xet server is
    the Xet server's       CAS_ROUTES: xorbs and shards come, reconstructions go

Refuses to know what is in a xorb or a shard (xet_store.py does).
"""

import io
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from tests.servers.hub_repo import HubFile, LargeFile, RefusedError
from tests.servers.hub_wire import Hub, Request, Response, json_response
from tests.servers.xet_store import ACCESS_TOKEN, LIFETIME_S, Term, XetStore, chunk_edges

# ---- the Hub's part: where the Xet server is, and who may use it ----


def token(hub: Hub, request: Request, *, name: str, revision: str = "main") -> Response:
    hub.repository(request, name)
    return token_for(hub.xet)


def token_for(store: XetStore) -> Response:
    expires = int(time.time()) + LIFETIME_S
    headers = {
        "X-Xet-Cas-Url": store.url,
        "X-Xet-Access-Token": ACCESS_TOKEN,
        "X-Xet-Token-Expiration": str(expires),
    }  # huggingface_hub reads the headers, hf_xet the body
    body = {"casUrl": store.url, "exp": expires, "accessToken": ACCESS_TOKEN}
    return json_response(body, headers=headers)


def whereabouts(hub: Hub, file: HubFile, *, name: str, commit: str) -> dict[str, str]:
    """The headers by which a client that speaks Xet fetches the file; none if it came otherwise."""
    found = hub.xet.find(file) if isinstance(file, LargeFile) else None
    if found is None:
        return {}
    route = f"{hub.url}/api/models/{name}/xet-read-token/{commit}"
    return {"X-Xet-Hash": found.hash, "Link": f'<{route}>; rel="xet-auth"'}


# ---- the Xet server's part ----


def known_chunk(store: XetStore, request: Request, *, name: str) -> Response:
    """Other clients' chunks are never told of: each client knows what it has sent itself."""
    raise RefusedError(HTTPStatus.NOT_FOUND, f"no shard for chunk {name}")


def grant(store: XetStore, request: Request, *, name: str) -> Response:
    """An answer without a grant says that the xorb is here; 404, that it is to be sent to us."""
    if not store.has_xorb(name):
        raise RefusedError(HTTPStatus.NOT_FOUND, "no grants here")
    return json_response({})


def put_xorb(store: XetStore, request: Request, *, name: str) -> Response:
    return json_response({"was_inserted": store.put_xorb(name, request.body.read())})


def put_shard(store: XetStore, request: Request) -> Response:
    store.put_shard(request.body.read())
    return json_response({"result": 1})


def reconstruction(store: XetStore, request: Request, *, name: str) -> Response:
    """Which chunks make the file, or the part that a Range header asks for, and where they are."""
    file = store.file(name)
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    first, last = (int(asked[1]), int(asked[2])) if asked else (0, file.size_bytes - 1)
    if first >= file.size_bytes:
        raise RefusedError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "beyond the end")
    terms, skipped, start = [], 0, 0
    for term in file.terms:
        if start + term.size_bytes > first and start <= last:
            terms.append(term)
        elif start + term.size_bytes <= first:
            skipped = start + term.size_bytes
        start += term.size_bytes
    fetch: dict[str, list[dict[str, Any]]] = {}
    for term in dict.fromkeys(terms):
        fetch.setdefault(term.xorb, []).append(_whereabouts(store, term))
    told = [
        {
            "hash": term.xorb,
            "unpacked_length": term.size_bytes,
            "range": {"start": term.first, "end": term.end},
        }
        for term in terms
    ]
    answer = {"offset_into_first_range": first - skipped, "terms": told, "fetch_info": fetch}
    return json_response(answer)


def _whereabouts(store: XetStore, term: Term) -> dict[str, Any]:
    edges = chunk_edges(store.xorb(term.xorb).read_bytes())
    return {
        "range": {"start": term.first, "end": term.end},
        "url": f"{store.url}/xorb-bytes/{term.xorb}",
        "url_range": {"start": edges[term.first], "end": edges[term.end] - 1},
    }


def read_xorb(store: XetStore, request: Request, *, name: str) -> Response:
    """The bytes that a Range header asks for; on the Hub the URL itself is signed."""
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"]).groups()  # type: ignore[union-attr]
    with store.xorb(name).open("rb") as file:
        file.seek(int(first))
        content = file.read(int(last) - int(first) + 1)
    return Response(
        status=HTTPStatus.PARTIAL_CONTENT, body=io.BytesIO(content), length_bytes=len(content)
    )


def telemetry(store: XetStore, request: Request) -> Response:
    return json_response({})


NAME = "(?P<name>[0-9a-f]{64})"
CAS_ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", f"/v1/chunks/default/{NAME}", known_chunk),
    ("POST", f"/v1/xorb-grants/default/{NAME}", grant),
    ("POST", f"/v1/xorbs/default/{NAME}", put_xorb),
    ("POST", "/v1/shards", put_shard),
    ("GET", f"/v1/reconstructions/{NAME}", reconstruction),
    ("GET", f"/xorb-bytes/{NAME}", read_xorb),
    ("POST", "/v1/telemetry", telemetry),
)
"""What it has none of, as the second version of some calls, it answers with 404."""


def respond(store: XetStore, request: Request) -> Response:
    """The answer of the one route that fits, to who has the access token."""
    for method, pattern, endpoint in CAS_ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found and method == request.method:
            _check_token(request)
            return endpoint(store, request, **found.groupdict())
    raise RefusedError(HTTPStatus.NOT_FOUND, f"no {request.method} {request.path}")


def _check_token(request: Request) -> None:
    is_signed = request.path.startswith("/xorb-bytes/")
    if not is_signed and request.headers.get("authorization") != f"Bearer {ACCESS_TOKEN}":
        raise RefusedError(HTTPStatus.UNAUTHORIZED, "Unauthorized")
