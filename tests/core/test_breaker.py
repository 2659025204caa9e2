"""A place that fails is left alone for a while; one action asks whether it is well again."""

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.breaker import resting
from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    StorageError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.core.wanted import publish_action
from tests.core.worlds import HF, view

PLACE = "s3://bucket/a"
LATER = 10_000.0


def begun(step: int, to: str = PLACE) -> ActionRecord:
    return ActionRecord(action=publish_action(view(step), HF, to)).started(0.0)


def failed(step: int, at: float, error: StorageError, to: str = PLACE) -> ActionRecord:
    return begun(step, to).failed(error, at)


def away(step: int, at: float, to: str = PLACE) -> ActionRecord:
    return failed(step, at, TransientError("reset", to), to)


def failed_again(record: ActionRecord, at: float, times: int = 1) -> ActionRecord:
    for _ in range(times):
        record = record.started(at).failed(TransientError("reset", PLACE), at)
    return record


def test_two_actions_that_fail_one_after_the_other_let_it_rest() -> None:
    records = [away(1, 10.0), away(2, 11.0)]
    due = max(record.next_attempt_at or 0.0 for record in records)
    (why,) = resting(records, now=11.0).values()
    assert why == f"{PLACE} rests for {due - 11.0:.0f} s, it has failed 2 times in a row"
    assert resting(records, now=due) == {}


def test_one_action_that_fails_twice_does_so_too() -> None:
    assert PLACE in resting([failed_again(away(1, 10.0), 20.0)], now=20.0)


def test_one_failure_is_none_of_the_others_business() -> None:
    assert resting([away(1, 10.0), begun(2)], now=10.0) == {}


def test_a_place_that_asks_for_time_gets_it_at_once() -> None:
    throttled = failed(1, 10.0, ThrottledError("slow down", PLACE, "", "", 300.0))
    assert resting([throttled], now=10.0) == {PLACE: f"{PLACE} rests for 300 s, it has failed once"}


def test_it_rests_as_long_as_the_one_that_has_failed_most_waits() -> None:
    patient = failed_again(away(1, 10.0), 20.0, times=4)
    records = [patient, away(2, 21.0)]
    assert (patient.next_attempt_at or 0.0) > (records[1].next_attempt_at or 0.0)
    assert PLACE in resting(records, now=(patient.next_attempt_at or 0.0) - 0.1)


def test_a_success_ends_it() -> None:
    well = begun(3).succeeded({}, 12.0)
    assert resting([away(1, 10.0), away(2, 11.0), well], now=12.0) == {}


@pytest.mark.parametrize("error", [AuthorizationError("403"), ConflictError("moved")])
def test_what_is_about_one_action_alone_is_not_counted(error: StorageError) -> None:
    assert resting([failed(1, 10.0, error), failed(2, 11.0, error)], now=11.0) == {}


def test_other_places_go_on() -> None:
    records = [away(1, 10.0), away(2, 11.0), away(1, 10.0, to="/copies")]
    assert list(resting(records, now=11.0)) == [PLACE]
