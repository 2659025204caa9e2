"""What kind of failure an error is, and whether the same call deserves another try.

class        for example                         what follows
throttled    429, SlowDown                       waits as long as the store says, for 6 hours
transient    5xx, reset, time-out, dead worker   10 tries within 6 hours
conflict     the branch moved meanwhile          5 quick tries
resource     no space, no memory                 one retry, then blocked: looked at now and then
auth         401, 403, no such repository        dead at once: a person must act
integrity    digests differ                      dead at once: another try reads the same bytes
lost         a node that is gone                 2 minutes for it to come back
invalid      no rule for a tensor, a bad name    dead at once
unknown      anything else                       3 tries
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    IntegrityError,
    NodeLostError,
    ObjectNotFoundError,
    OutOfMemoryError,
    PurgeRefusedError,
    RayCkptError,
    StorageFullError,
    ThrottledError,
    TransientError,
)


class ErrorClass(StrEnum):
    """Why something failed, as far as it matters for what is done next."""

    THROTTLED = "throttled"
    TRANSIENT = "transient"
    CONFLICT = "conflict"
    RESOURCE = "resource"
    HELD = "held"
    AUTH = "auth"
    INTEGRITY = "integrity"
    LOST = "lost"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often, how soon and how long."""

    max_failures: int | None
    """The failure after which there is no other try; None leaves it to `window_s` alone."""
    window_s: float
    """Seconds after the first failure in which another try is made."""
    base_s: float
    cap_s: float
    """The wait doubles from `base_s` up to this."""


_HOURS_S = 3600.0
RETRIES: Mapping[ErrorClass, Retries] = {
    ErrorClass.THROTTLED: Retries(max_failures=None, window_s=6 * _HOURS_S, base_s=2, cap_s=300),
    ErrorClass.TRANSIENT: Retries(max_failures=10, window_s=6 * _HOURS_S, base_s=2, cap_s=300),
    ErrorClass.CONFLICT: Retries(max_failures=5, window_s=6 * _HOURS_S, base_s=1, cap_s=30),
    ErrorClass.RESOURCE: Retries(max_failures=2, window_s=6 * _HOURS_S, base_s=10, cap_s=10),
    ErrorClass.LOST: Retries(max_failures=None, window_s=120, base_s=5, cap_s=30),
    ErrorClass.UNKNOWN: Retries(max_failures=3, window_s=6 * _HOURS_S, base_s=2, cap_s=300),
}
"""A class that is not here gets no other try."""
BLOCKS = frozenset({ErrorClass.RESOURCE, ErrorClass.HELD})
"""Classes that end by themselves one day: looked at now and then, never dead."""
BLOCKED_FOR_S = 60.0
"""Time between two such looks."""
_CLASS_OF: tuple[tuple[type[BaseException], ErrorClass], ...] = (
    (ThrottledError, ErrorClass.THROTTLED),
    (ConflictError, ErrorClass.CONFLICT),
    (TransientError, ErrorClass.TRANSIENT),
    (StorageFullError, ErrorClass.RESOURCE),
    (OutOfMemoryError, ErrorClass.RESOURCE),
    (MemoryError, ErrorClass.RESOURCE),
    (AuthorizationError, ErrorClass.AUTH),
    (ObjectNotFoundError, ErrorClass.AUTH),
    (IntegrityError, ErrorClass.INTEGRITY),
    (PurgeRefusedError, ErrorClass.HELD),
    (NodeLostError, ErrorClass.LOST),
    (RayCkptError, ErrorClass.INVALID),
    (OSError, ErrorClass.TRANSIENT),
)
"""The first that fits; an error of ours that says nothing else about itself was meant."""


def classify(error: BaseException) -> ErrorClass:
    """The class of an error, ours or anybody's."""
    return next((c for kind, c in _CLASS_OF if isinstance(error, kind)), ErrorClass.UNKNOWN)


def wait_s(error: BaseException, num_failures: int, *, jitter: float) -> float:
    """Seconds to wait after failure number `num_failures` of this class.

    Between half of the doubling time and all of it, as `jitter` in [0, 1) says, so that those who
    failed together do not come back together; never less than the store asks for.
    """
    rule = RETRIES[classify(error)]
    longest = min(rule.cap_s, rule.base_s * 2.0 ** max(0, num_failures - 1))
    asked_s = error.retry_after_s if isinstance(error, ThrottledError) else None
    return max(asked_s or 0.0, longest * (0.5 + jitter / 2))


def may_try_again(error_class: ErrorClass, num_failures: int, since_first_s: float) -> bool:
    """Whether another try is made after failure number `num_failures` of this class."""
    rule = RETRIES.get(error_class)
    if rule is None or since_first_s > rule.window_s:
        return False
    return rule.max_failures is None or num_failures < rule.max_failures
