"""Which places rest because they fail: not every copy has to find that out by itself. Pure.

    two failures in a row that may pass, or one for which the place has asked   ->   all of its
    actions wait until the one that has failed most is due; whichever comes first then tries

So a place that is away for hours costs one try now and then, and no action its last one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import ActionState

_IN_A_ROW = 2
_PASSING = frozenset({ErrorClass.TRANSIENT, ErrorClass.THROTTLED})


def resting(records: Iterable[ActionRecord], *, now: float) -> Mapping[str, str]:
    """By destination, why nothing begins there now."""
    ended: dict[str, list[ActionRecord]] = defaultdict(list)
    for record in records:
        if record.action.destination and (_is_failing(record) or _is_done(record)):
            ended[record.action.destination].append(record)
    found: dict[str, str] = {}
    for place, of_place in ended.items():
        newest_first = sorted(of_place, key=lambda record: -record.changed_at)
        failing = list(takewhile(_is_failing, newest_first))
        until = max((record.next_attempt_at or 0.0 for record in failing), default=0.0)
        if until > now and _is_enough(failing):
            found[place] = f"{place} rests for {until - now:.0f} s, it has failed {_times(failing)}"
    return found


def _is_failing(record: ActionRecord) -> bool:
    return record.state is ActionState.RETRY_WAIT and record.error_class in _PASSING


def _is_done(record: ActionRecord) -> bool:
    return record.state is ActionState.SUCCEEDED


def _is_enough(failing: Sequence[ActionRecord]) -> bool:
    has_asked = any(record.error_class is ErrorClass.THROTTLED for record in failing)
    return has_asked or _count(failing) >= _IN_A_ROW


def _times(failing: Sequence[ActionRecord]) -> str:
    count = _count(failing)
    return "once" if count == 1 else f"{count} times in a row"


def _count(failing: Sequence[ActionRecord]) -> int:
    return sum(record.failures.get(kind, 0) for record in failing for kind in _PASSING)
