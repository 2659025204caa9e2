"""What an error means for what is done next."""

import pickle

import pytest

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConfigError,
    ConflictError,
    IntegrityError,
    ObjectNotFoundError,
    OutOfMemoryError,
    PurgeRefusedError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.core.failures import BLOCKS, RETRIES, ErrorClass, classify, may_try_again, wait_s

CLASSES = [
    (ThrottledError("busy"), ErrorClass.THROTTLED),
    (TransientError("reset"), ErrorClass.TRANSIENT),
    (ConnectionResetError(), ErrorClass.TRANSIENT),
    (ConflictError("moved"), ErrorClass.CONFLICT),
    (StorageFullError("full"), ErrorClass.RESOURCE),
    (OutOfMemoryError("killed"), ErrorClass.RESOURCE),
    (MemoryError(), ErrorClass.RESOURCE),
    (AuthorizationError("no"), ErrorClass.AUTH),
    (ObjectNotFoundError("no such repository"), ErrorClass.AUTH),
    (IntegrityError("differs"), ErrorClass.INTEGRITY),
    (PurgeRefusedError("read"), ErrorClass.HELD),
    (ConfigError("no rule"), ErrorClass.INVALID),
    (KeyError("odd"), ErrorClass.UNKNOWN),
]
WORTH_A_TRY = [error for error, error_class in CLASSES if error_class in RETRIES]


def name_of(value: object) -> str:
    return value.value if isinstance(value, ErrorClass) else type(value).__name__


@pytest.mark.parametrize(("error", "expected"), CLASSES, ids=name_of)
def test_every_error_has_its_class(error: BaseException, expected: ErrorClass) -> None:
    assert classify(error) is expected


def test_only_a_person_can_help_where_another_try_would_do_the_same() -> None:
    hopeless = set(ErrorClass) - set(RETRIES) - BLOCKS
    assert hopeless == {ErrorClass.AUTH, ErrorClass.INTEGRITY, ErrorClass.INVALID}
    assert not any(may_try_again(error_class, 1, 0.0) for error_class in hopeless)


@pytest.mark.parametrize("error", WORTH_A_TRY, ids=name_of)
def test_the_wait_grows_up_to_a_cap_and_no_two_need_wait_alike(error: BaseException) -> None:
    rule = RETRIES[classify(error)]
    shortest = [wait_s(error, n, jitter=0.0) for n in range(1, 20)]
    longest = [wait_s(error, n, jitter=0.999999) for n in range(1, 20)]
    assert shortest[0] == rule.base_s / 2
    assert shortest == sorted(shortest)
    assert shortest[-1] == rule.cap_s / 2
    assert all(low < high <= rule.cap_s for low, high in zip(shortest, longest, strict=True))


def test_a_store_that_says_how_long_to_wait_is_heeded() -> None:
    error = pickle.loads(pickle.dumps(ThrottledError("busy", "hf://a/b", retry_after_s=77.0)))
    assert wait_s(error, 1, jitter=0.0) == 77.0
    assert (error.what, error.where, error.retry_after_s) == ("busy", "hf://a/b", 77.0)
