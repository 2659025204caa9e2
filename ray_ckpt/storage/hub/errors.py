"""What the Hub's client raises, as ours: by the Hub's word for it, else by status or by text.

HfHubHTTPError       an answer: X-Error-Code, then what it says of storage, then its status
RuntimeError         an upload that failed for good; its reason is its cause
ValueError           refusals of single files, in an answer that is none
ConnectionError      of the Xet client while it sends; its text alone names the status
RuntimeError         of the Xet client while it fetches, without a cause: the same text
httpx.TransportError no answer
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.storage.retry_after import retry_after_s
from ray_ckpt.storage.secrets import without_secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meaning:
    """What an answer comes to, and what a person is to do about it."""

    kind: type[StorageError]
    do: str


_AGAIN = "run the same command again; what was sent already is not sent twice"
_UNREACHABLE = _Meaning(kind=TransientError, do=_AGAIN)
_THROTTLED = _Meaning(kind=ThrottledError, do="nothing: it is tried again when the Hub allows it")
_CONFLICT = _Meaning(kind=ConflictError, do=_AGAIN)
_DENIED = _Meaning(
    kind=AuthorizationError,
    do="hf auth login (with a token that may write), then the same command again",
)
_GATED = _Meaning(
    kind=AuthorizationError,
    do="ask for access on the repository's page, then the same command again",
)
_FULL = _Meaning(
    kind=StorageFullError,
    do="free space on the Hub or have its limit raised, then the same command again",
)
_NO_REPOSITORY = _Meaning(
    kind=ObjectNotFoundError,
    do="add --create to have it made, a private one; or hf repos create ORG/REPO --private",
)
_NO_BUCKET = _Meaning(
    kind=ObjectNotFoundError,
    do="add --create to have it made, a private one; or hf buckets create ORG/NAME --private",
)
_NO_REVISION = _Meaning(
    kind=ObjectNotFoundError,
    do="hf repos branch create ORG/REPO BRANCH, then the same command again",
)
_NO_XET = _Meaning(
    kind=ObjectNotFoundError,
    do="export HF_HUB_DISABLE_XET=1, if this Hub knows no Xet, then the same command again",
)
_NO_CONTENT = _Meaning(
    kind=ObjectNotFoundError,
    do="somebody has removed the file's content from the Hub: take another revision",
)
_BAD_CARD = _Meaning(
    kind=StorageError,
    do="export the step again, under another --name, with a --license that the Hub knows",
)
_OFFLINE = _Meaning(kind=StorageError, do="unset HF_HUB_OFFLINE, then the same command again")
_REFUSED = _Meaning(kind=StorageError, do="")

_BY_CODE: Mapping[str, _Meaning] = {
    "RepoNotFound": _NO_REPOSITORY,
    "RevisionNotFound": _NO_REVISION,
    "GatedRepo": _GATED,
}
_BY_STATUS: Mapping[int, _Meaning] = {
    401: _DENIED,
    402: _FULL,
    403: _DENIED,
    404: _NO_REPOSITORY,
    **dict.fromkeys((409, 412), _CONFLICT),  # the branch moved meanwhile: look again
    **dict.fromkeys((413, 507), _FULL),
    429: _THROTTLED,
    **dict.fromkeys((408, 500, 502, 503, 504), _UNREACHABLE),
}
_STORAGE = re.compile(
    r"(storage|quota).*(limit|exceed|full|reached)|exceed\w* .*(storage|quota)", re.I
)
"""How the Hub words that a limit is reached, with a 403 that is no different otherwise."""
_XET_STATUS = re.compile(r"\((4\d\d|5\d\d) [A-Z]")
"""As in `HTTP status client error (401 Unauthorized), domain: http://...`."""
_FROM_XET = "CAS Client Error"


@contextmanager
def translated(destination: str) -> Generator[None]:
    """Turns what the Hub's client raises into ours, once; what is none of its errors passes."""
    try:
        yield
    except RayCkptError:
        raise
    except Exception as error:
        found = _meaning(error)
        if found is None:
            raise
        meaning, told, headers = found
        text = without_secrets(told)
        safe = "nothing became visible there; the export is untouched"
        kind, wait_s = meaning.kind, retry_after_s(headers)
        if issubclass(kind, TransientError) and wait_s is not None:
            throttled = text, destination, safe, _THROTTLED.do, wait_s
            raise ThrottledError(*throttled) from error
        raise kind(text, destination, safe, meaning.do) from error


def _meaning(error: BaseException) -> tuple[_Meaning, str, Mapping[str, str]] | None:
    """With what is said about it, and the headers of the answer."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        headers: Mapping[str, str] = error.response.headers
        status, code = error.response.status_code, headers.get("X-Error-Code", "")
        meaning = _BY_CODE.get(code) or _by_words(status, str(error))
        if meaning is _NO_REPOSITORY and "/buckets/" in str(error.response.url):
            meaning = _NO_BUCKET
        return meaning, f"the Hub answered {status}: {error}", headers
    if isinstance(error, OfflineModeIsEnabled):
        return _OFFLINE, str(error), {}
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _meaning(error.__cause__)
    found = _without_an_answer(error)
    return None if found is None else (*found, {})


def _without_an_answer(error: BaseException) -> tuple[_Meaning, str] | None:
    """What the text alone tells, or the client's own class."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    text = str(error)
    match error:
        case LocalEntryNotFoundError():  # neither on the Hub's side nor in the cache of this host
            return _UNREACHABLE, f"the Hub cannot be reached: {text}"
        case ValueError() if text.startswith("LFS batch API returned errors"):
            return _by_words(0, text), f"the Hub refused: {text}"
        case ValueError() if text.startswith("Invalid metadata in README.md"):
            return _BAD_CARD, f"the Hub refused the model card: {text}"
        case ConnectionError():
            return _by_xet(text, missing=_NO_XET), f"the Hub cannot be used: {text}"
        case RuntimeError() if _FROM_XET in text:
            told = f"the Hub's content cannot be fetched: {text}"
            return _by_xet(text, missing=_NO_CONTENT), told
        case _ if type(error).__module__.startswith(("httpx", "httpcore")):
            told = f"the Hub cannot be reached: {text or type(error).__name__}"
            return _UNREACHABLE, told
        case _:
            return None


def _by_xet(text: str, *, missing: _Meaning) -> _Meaning:
    """By the status in the Xet client's text; without one nothing was answered."""
    status = _XET_STATUS.search(text)
    if status is None:
        return _UNREACHABLE
    return missing if status[1] == "404" else _by_words(int(status[1]), text)


def _by_words(status: int, text: str) -> _Meaning:
    """By the status, unless the words say that it is about room."""
    if status in (0, 200, 403, 422) and _STORAGE.search(text):
        return _FULL
    return _BY_STATUS.get(status, _REFUSED)
