"""What s3fs, botocore and aiohttp raise, as ours: by S3's own code, else by status or by class.

s3fs turns S3's answer into an OSError and keeps the answer as its cause; the codes are those of
AWS, MinIO and Ceph. What is no answer at all is known by the name of its class.
"""

import contextlib
import errno
from collections.abc import Generator, Mapping
from typing import Any, TypeAlias, cast

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    IntegrityError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.storage.retry_after import retry_after_s
from ray_ckpt.storage.secrets import without_secrets

Kind: TypeAlias = type[StorageError] | type[IntegrityError]

_KEYS_REFUSED = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "400",  # HEAD has no text; this is what S3 says there once a token has expired
    "403",
)
"""Codes after which newer keys may lie where the ones that were refused came from."""

_BY_CODE: Mapping[str, Kind] = {
    **dict.fromkeys(_KEYS_REFUSED, AuthorizationError),
    **dict.fromkeys(
        (
            "AccessDenied",
            "AccountProblem",
            "AllAccessDisabled",
            "AuthorizationHeaderMalformed",
            "InvalidSecurity",
            "NotSignedUp",
            "RequestTimeTooSkewed",
        ),
        AuthorizationError,
    ),
    **dict.fromkeys(
        (
            "BandwidthLimitExceeded",
            "RequestLimitExceeded",
            "ServiceUnavailable",
            "SlowDown",
            "SlowDownRead",
            "SlowDownWrite",
            "Throttling",
            "ThrottlingException",
            "TooManyRequestsException",
        ),
        ThrottledError,
    ),
    **dict.fromkeys(
        ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"), StorageFullError
    ),
    **dict.fromkeys(
        ("ConditionalRequestConflict", "OperationAborted", "PreconditionFailed"), ConflictError
    ),
    **dict.fromkeys(
        (
            "BadDigest",  # the bytes that arrived are not those that left, and were thrown away
            "IncompleteBody",
            "InternalError",
            "NoSuchUpload",  # somebody ended it, or an answer was lost: to be begun anew
            "RequestTimeout",
            "XAmzContentChecksumMismatch",
            "XAmzContentSHA256Mismatch",
        ),
        TransientError,
    ),
    **dict.fromkeys(("NoSuchBucket", "NoSuchKey", "NoSuchVersion"), ObjectNotFoundError),
}
_BY_STATUS: Mapping[int, Kind] = {
    **dict.fromkeys((401, 403), AuthorizationError),
    404: ObjectNotFoundError,
    **dict.fromkeys((409, 412), ConflictError),
    **dict.fromkeys((429, 503), ThrottledError),
    507: StorageFullError,
    **dict.fromkeys((408, 500, 502, 504), TransientError),
}
_NOT_KNOWN = (400, 405, 501)
"""Statuses of requests that the store does not have, where no code says what else is wrong."""
_BY_CLASS: Mapping[str, Kind] = {
    "FlexibleChecksumError": IntegrityError,  # what was read is not what was stored once
    **dict.fromkeys(
        (
            "CredentialRetrievalError",
            "NoCredentialsError",
            "PartialCredentialsError",
            "ProfileNotFound",
            "SSOError",
            "TokenRetrievalError",
        ),
        AuthorizationError,
    ),
    **dict.fromkeys(
        (
            "ClientError",  # aiohttp's: botocore's have been answered above
            "ConnectionError",
            "HTTPClientError",
            "IncompleteReadError",
            "ResponseParserError",  # some servers throttle with an answer that is no XML
        ),
        TransientError,
    ),
    "BotoCoreError": StorageError,
}
_BY_ERRNO: Mapping[int | None, Kind] = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StorageFullError)
"""Of the disk of this host, where an object is brought to."""
_WORDS: Mapping[Kind, str] = {
    AuthorizationError: "the store says no",
    IntegrityError: "what was read is not what was stored",
    ObjectNotFoundError: "not there",
    StorageFullError: "the store is full",
    ThrottledError: "the store asks to be asked less often",
}
_TRY_AGAIN = "run the same command again; what was sent already is not sent twice"
_NOBODY_THERE = (
    "check the address: AWS_ENDPOINT_URL, AWS_REGION, and that the server is up; then the same "
    "command again"
)
_CURES: Mapping[Kind, str] = {
    AuthorizationError: "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, the "
    "bucket's policy and this host's clock, then the same command again",
    ConflictError: _TRY_AGAIN,
    IntegrityError: "ray-ckpt verify says whether it is the store or was the way from it",
    ObjectNotFoundError: "check bucket and prefix",
    StorageFullError: "free space there, or have the quota raised; then the same command again",
    ThrottledError: _TRY_AGAIN,
    TransientError: _TRY_AGAIN,
}


@contextlib.contextmanager
def translated(where: str) -> Generator[None]:
    """Turns what comes from the store into ours, once; what is no error of a store passes."""
    try:
        yield
    except RayCkptError:
        raise
    except Exception as error:
        answer = _answer(error)
        kind = _kind(error, answer)
        if kind is None:
            raise
        code = _code(answer)
        told = f" ({code})" if code and code not in str(error) else ""
        text = f"{_WORDS.get(kind, 'the store failed')}: {without_secrets(str(error))}{told}"
        cure = _NOBODY_THERE if _is_a(error, "EndpointConnectionError") else _CURES.get(kind, "")
        if kind is ThrottledError:
            wait_s = retry_after_s(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
            raise ThrottledError(text, where, do=cure, retry_after_s=wait_s) from error
        raise kind(text, where, do=cure) from error


def raise_refusal(code: str, text: str, where: str) -> None:
    """The error for one object of several, of which S3 tells in an answer that is none.

    Raises:
        StorageError: always.
    """
    kind = _BY_CODE.get(code, TransientError)
    raise kind(f"the store failed: {without_secrets(text)}", where, do=_CURES.get(kind, ""))


def may_have_newer_keys(error: StorageError) -> bool:
    """Whether it was the keys that were refused, and not what was to be done with them."""
    return _code_of(error) in _KEYS_REFUSED


def is_gone(error: StorageError) -> bool:
    """Whether what was asked about is not there, an upload that somebody has ended included."""
    return isinstance(error, ObjectNotFoundError) or _code_of(error) == "NoSuchUpload"


def is_unknown(error: StorageError) -> bool:
    """Whether the store does not know such a request, or not in this form."""
    answer = _answer(error.__cause__) if error.__cause__ else {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return type(error) is StorageError and status in _NOT_KNOWN


def has_broken_off(error: StorageError) -> bool:
    """Whether an answer had begun and did not end; botocore lets such a one stand."""
    return error.__cause__ is not None and _is_a(error.__cause__, "ClientPayloadError")


def _code_of(error: StorageError) -> str:
    return _code(_answer(error.__cause__)) if error.__cause__ else ""


def _is_a(error: BaseException, name: str) -> bool:
    return any(base.__name__ == name for base in type(error).__mro__)


def _answer(error: BaseException) -> dict[str, Any]:
    """What S3 answered, as botocore gives it; empty where nothing was."""
    for each in (error, error.__cause__, error.__context__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            return cast(dict[str, Any], answer)
    return {}


def _code(answer: Mapping[str, Any]) -> str:
    return str(answer.get("Error", {}).get("Code", ""))


def _kind(error: Exception, answer: Mapping[str, Any]) -> Kind | None:
    if answer:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _BY_CODE.get(_code(answer)) or _BY_STATUS.get(status, StorageError)
    if isinstance(error, FileNotFoundError):  # s3fs has looked itself
        return ObjectNotFoundError
    for base in type(error).__mro__:
        is_theirs = base.__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
        if is_theirs and base.__name__ in _BY_CLASS:
            return _BY_CLASS[base.__name__]
    if isinstance(error, PermissionError):
        return AuthorizationError
    if isinstance(error, OSError):
        return _BY_ERRNO.get(error.errno, TransientError)
    return None
