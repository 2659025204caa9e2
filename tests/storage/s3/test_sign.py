"""Our signatures are botocore's, letter for letter."""

from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import quote

import pytest
from botocore import auth, awsrequest, credentials
from botocore.config import Config

from ray_ckpt.storage.s3.sign import Keys, Request, signed


def request(key: str, query: str = "", **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(
        method="PUT",
        path=quote(f"/bucket/{key}", safe="/~"),
        query=query,
        headers={"host": "127.0.0.1:9000", **named},
    )


@pytest.mark.parametrize("token", [None, "a/session+token=="])
@pytest.mark.parametrize(
    "asked",
    [
        request("step-5/__0_0.distcp"),
        request("step-5/a b+c~ü%/(1)"),
        request("a", "partNumber=7&uploadId=ab%2Bc%3D"),
        request("a", content_length="12", x_amz_checksum_crc64nvme="AAAAAAAAAAA="),
        Request(method="GET", path="/a", query="", headers={"host": "b.s3.amazonaws.com"}),
    ],
)
def test_every_request_is_signed_as_botocore_signs_it(asked: Request, token: str | None) -> None:
    keys = Keys(access_key="AKIA", secret_key="se/cr+et", token=token, region="eu-west-3")
    ours = signed(asked, keys, datetime.now(UTC))
    assert ours["authorization"] == theirs(asked, keys, ours)
    assert ours["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert ours.get("x-amz-security-token") == token


def theirs(asked: Request, keys: Keys, told: dict[str, str]) -> str:
    """What botocore writes for these very headers at that very time."""
    target = f"{asked.path}?{asked.query}" if asked.query else asked.path
    sent = {n: v for n, v in told.items() if n != "authorization"}
    made: Any = cast(Any, awsrequest).AWSRequest(
        method=asked.method, url=f"http://{asked.headers['host']}{target}", headers=sent
    )
    made.context["client_config"] = Config(s3={"payload_signing_enabled": False})
    made.context["timestamp"] = told["x-amz-date"]
    own = credentials.ReadOnlyCredentials(keys.access_key, keys.secret_key, keys.token, None)
    signer: Any = cast(Any, auth).S3SigV4Auth(own, "s3", keys.region)
    text: str = signer.string_to_sign(made, signer.canonical_request(made))
    signer._inject_signature_to_request(made, signer.signature(text, made))
    return str(made.headers["Authorization"])
