"""An S3 server that does less than AWS: a proxy that hides from the real one what it is asked for.

    with LesserS3(seaweedfs_endpoint) as s3:
        s3.lacks |= {Lack.EXCLUSIVE_CREATES, Lack.CHECKSUMS}

It signs anew what it has changed. What a store does not know at all, `S3Proxy.fail` answers.
"""

import http.client
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from enum import Enum, auto
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.servers.s3_proxy import Answer, Handler, S3Proxy
from tests.servers.seaweed import S3Endpoint

RACE_S = 0.02
_SIGNED_ANEW = ("authorization", "x-amz-date", "date", "host")


class Lack(Enum):
    """One thing it does not do."""

    CREATES = auto()
    """If-None-Match is ignored, as by `rclone serve s3`."""
    EXCLUSIVE_CREATES = auto()
    """It is looked first and written later, as by OpenStack Swift."""
    CREATE_REQUESTS = auto()
    """If-None-Match is an error."""
    CHECKSUMS = auto()
    """They are ignored, as by Ceph 16."""


class LesserS3(S3Proxy):
    """As `S3Proxy`; `lacks` may change at any time."""

    def __init__(self, behind: S3Endpoint) -> None:
        super().__init__(behind)
        self.lacks: set[Lack] = set()
        self.clock_ahead_s = 0.0
        """Of this store's clock, against everybody else's."""
        self._behind_it = behind

    def pass_on(self, request: Handler, body: bytes) -> Answer:
        is_create = request.command == "PUT" and "If-None-Match" in request.headers
        if is_create and Lack.CREATE_REQUESTS in self.lacks:
            return _error(501, "NotImplemented")
        if is_create and Lack.EXCLUSIVE_CREATES in self.lacks:
            if self._is_there(request):
                return _error(412, "PreconditionFailed")
            threading.Event().wait(RACE_S)
        answer = super().pass_on(request, body)
        told_at = answer.headers.get("Last-Modified")
        if told_at is None or not self.clock_ahead_s:
            return answer
        ahead = parsedate_to_datetime(told_at) + timedelta(seconds=self.clock_ahead_s)
        headers = {**answer.headers, "Last-Modified": format_datetime(ahead, usegmt=True)}
        return replace(answer, headers=headers)

    def headers_of(self, request: Handler, body: bytes) -> Mapping[str, str]:
        asked = dict(request.headers.items())
        kept = {name: value for name, value in asked.items() if not self._hides(name.lower())}
        return asked if kept == asked else self._signed(request.command, request.path, kept, body)

    def _hides(self, name: str) -> bool:
        if name == "if-none-match":
            return bool(self.lacks & {Lack.CREATES, Lack.EXCLUSIVE_CREATES})
        is_checksum = name.startswith(("x-amz-checksum-", "x-amz-sdk-checksum-", "content-md5"))
        return is_checksum and Lack.CHECKSUMS in self.lacks

    def _is_there(self, request: Handler) -> bool:
        connection = http.client.HTTPConnection(urlsplit(self._behind_it.url).netloc, timeout=300)
        try:
            connection.request("HEAD", request.path, headers=self._signed("HEAD", request.path))
            return connection.getresponse().status == 200
        finally:
            connection.close()

    def _signed(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> dict[str, str]:
        own = {n: v for n, v in (headers or {}).items() if n.lower() not in _SIGNED_ANEW}
        request = AWSRequest(method, f"{self._behind_it.url}{path}", headers=own, data=body)
        keys = Credentials(self._behind_it.access_key, self._behind_it.secret_key)
        S3SigV4Auth(keys, "s3", self._behind_it.region).add_auth(request)
        return {**dict(request.headers.items()), "Host": urlsplit(self._behind_it.url).netloc}


def _error(status: int, code: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>as asked for</Message></Error>".encode()
    headers = {"Content-Type": "application/xml"}
    return Answer(status=status, headers=headers, body=body, length_bytes=len(body))
