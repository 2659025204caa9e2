"""An action's key, its record on storage, and what follows from its failure."""

from dataclasses import replace

import pytest

from ray_ckpt.core.actions import MAX_INTERRUPTIONS, Action, ActionRecord
from ray_ckpt.core.draft import Node
from ray_ckpt.core.errors import (
    AuthorizationError,
    ConfigError,
    ConflictError,
    IntegrityError,
    StorageFullError,
    ThrottledError,
    TransientError,
    TransitionError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.failures import BLOCKED_FOR_S, ErrorClass, classify, wait_s
from ray_ckpt.core.lifecycle import ActionKind, ActionState

ACTION = Action(
    kind=ActionKind.PUBLISH,
    step=500,
    source_id="c0ffee",
    export=ExportSpec(name="hf-bf16"),
    destination="hf://org/repo",
    grace_s=60.0,
)
OTHERS = [
    replace(ACTION, kind=ActionKind.EXPORT),
    replace(ACTION, step=501),
    replace(ACTION, source_id="decaf"),
    replace(ACTION, export=None),
    replace(ACTION, export=ExportSpec(name="hf")),
    replace(ACTION, export=ExportSpec(name="hf-bf16", dtype="float32")),
    replace(ACTION, destination=None),
    replace(ACTION, destination="hf://org/other"),
    replace(ACTION, grace_s=None),
    replace(ACTION, grace_s=61.0),
    replace(ACTION, pointer="latest"),
    replace(ACTION, node=Node(host="a")),
    replace(ACTION, node=Node(host="a", id="1")),
]


def running(attempts: int = 1) -> ActionRecord:
    return ActionRecord(action=ACTION, state=ActionState.RUNNING, attempts=attempts)


def test_equal_actions_have_equal_keys() -> None:
    assert replace(ACTION).key == ACTION.key
    assert len(ACTION.key) == 16


def test_the_key_differs_in_every_field() -> None:
    keys = [action.key for action in (ACTION, *OTHERS)]
    assert len(set(keys)) == len(keys)


def test_the_key_stays_the_same_in_every_version() -> None:
    plain = Action(kind=ActionKind.VERIFY, step=1, source_id="a")
    assert plain.key == "c57a77bf5265e8fc"


@pytest.mark.parametrize("action", [ACTION, *OTHERS], ids=lambda action: action.key)
def test_an_action_is_read_back_as_it_was_written(action: Action) -> None:
    assert Action.from_document(action.to_document()) == action


def test_the_title_says_what_is_done_to_what() -> None:
    assert ACTION.title == "publish step-500 hf-bf16 to hf://org/repo"
    assert Action(kind=ActionKind.VERIFY, step=7, source_id="a").title == "verify step-7"
    promote = replace(ACTION, kind=ActionKind.PROMOTE, pointer="latest")
    assert promote.title == "promote step-500 hf-bf16 to latest at hf://org/repo"
    gather = Action(kind=ActionKind.GATHER, step=7, source_id="a", node=Node(host="n1", id="1f0c8"))
    assert gather.title == "gather step-7 from n1 (node 1f0c8)"


@pytest.mark.parametrize(
    "record",
    [
        ActionRecord(action=ACTION),
        ActionRecord(action=ACTION).started(10.0),
        ActionRecord(action=ACTION).started(10.0).succeeded({"bytes": 7, "at": "here"}, 11.0),
        ActionRecord(action=ACTION).started(10.0).failed(TransientError("slow", "s3"), 11.0),
        ActionRecord(action=OTHERS[3]).started(10.0).failed(ConfigError("wrong"), 11.0),
    ],
    ids=lambda record: record.state.value,
)
def test_a_record_is_read_back_as_it_was_written(record: ActionRecord) -> None:
    assert ActionRecord.from_json(record.to_json()) == record


def test_a_start_counts_the_attempt() -> None:
    record = ActionRecord(action=ACTION).started(10.0)
    assert (record.state, record.attempts, record.changed_at) == (ActionState.RUNNING, 1, 10.0)


def test_success_forgets_the_errors_before_it() -> None:
    record = running().failed(TransientError("slow"), 1.0).started(5.0).succeeded({"bytes": 7}, 6.0)
    assert record.state is ActionState.SUCCEEDED
    assert (record.error, record.error_kind, record.next_attempt_at) == (None, None, None)
    assert (record.attempts, record.result, record.changed_at) == (2, {"bytes": 7}, 6.0)


def test_an_interrupted_action_waits_as_if_it_were_new() -> None:
    record = running(attempts=3).interrupted(9.0)
    assert (record.state, record.attempts, record.changed_at) == (ActionState.PENDING, 3, 9.0)
    assert record.failures == {"interrupted": 1}


def test_an_action_during_which_its_manager_dies_again_and_again_is_dead_in_the_end() -> None:
    record = ActionRecord(action=ACTION)
    for _ in range(MAX_INTERRUPTIONS):
        record = record.started(1.0).interrupted(2.0)
    assert record.state is ActionState.DEAD
    assert f"died {MAX_INTERRUPTIONS} times" in (record.error or "")


@pytest.mark.parametrize(
    "error", [TransientError("slow"), StorageFullError("full"), OSError("reset"), KeyError("odd")]
)
def test_what_may_pass_is_tried_again_later(error: Exception) -> None:
    record = running(attempts=3).failed(error, 100.0, jitter=0.5)
    assert record.state is ActionState.RETRY_WAIT
    assert record.next_attempt_at == 100.0 + wait_s(error, 1, jitter=0.5)
    assert record.failures == {classify(error): 1}
    assert (record.error_kind, record.error) == (type(error).__name__, str(error))


@pytest.mark.parametrize(
    "error", [AuthorizationError("no"), IntegrityError("differs"), ConfigError("wrong")]
)
def test_what_will_not_pass_is_dead_at_once(error: Exception) -> None:
    record = running().failed(error, 100.0)
    assert (record.state, record.next_attempt_at) == (ActionState.DEAD, None)
    assert record.error_kind == type(error).__name__


@pytest.mark.parametrize(
    ("error", "num_tries"), [(TransientError("slow"), 10), (ConflictError("moved"), 5)]
)
def test_an_action_that_keeps_failing_is_dead_after_its_last_try(
    error: Exception, num_tries: int
) -> None:
    record = ActionRecord(action=ACTION)
    states: list[ActionState] = []
    for attempt in range(num_tries):
        record = record.started(float(attempt)).failed(error, float(attempt))
        states.append(record.state)
    assert states == [ActionState.RETRY_WAIT] * (num_tries - 1) + [ActionState.DEAD]
    with pytest.raises(TransitionError):
        record.started(99.0)


def test_an_action_that_fails_for_hours_is_dead_however_seldom_it_was_tried() -> None:
    record = ActionRecord(action=ACTION).started(0.0).failed(ThrottledError("busy"), 0.0)
    for _ in range(100):  # throttles use up no tries
        record = record.started(1.0).failed(ThrottledError("busy"), 1.0)
    assert record.state is ActionState.RETRY_WAIT
    record = record.started(7 * 3600.0).failed(ThrottledError("busy"), 7 * 3600.0)
    assert record.state is ActionState.DEAD


def test_what_lacks_room_is_tried_once_more_and_then_blocked_until_there_is_some() -> None:
    record = ActionRecord(action=ACTION).started(0.0).failed(StorageFullError("full"), 0.0)
    assert record.state is ActionState.RETRY_WAIT
    record = record.started(20.0).failed(StorageFullError("full"), 20.0)
    assert (record.state, record.next_attempt_at) == (ActionState.BLOCKED, 20.0 + BLOCKED_FOR_S)
    assert record.started(400.0).succeeded({}, 401.0).state is ActionState.SUCCEEDED


def test_the_first_error_and_the_last_one_are_kept() -> None:
    record = running().failed(OSError("the cause"), 1.0).started(2.0)
    record = record.failed(AuthorizationError("the consequence"), 3.0)
    assert (record.first_error, record.error) == ("the cause", "the consequence")
    assert (record.first_failed_at, record.changed_at) == (1.0, 3.0)
    assert record.error_class is ErrorClass.AUTH


def test_asked_again_it_starts_afresh() -> None:
    record = running().failed(AuthorizationError("no"), 1.0).asked_again("ann@host", 5.0)
    assert record == ActionRecord(action=ACTION, changed_at=5.0, asked_by="ann@host")


def test_an_error_without_words_is_told_by_its_class() -> None:
    assert running().failed(TimeoutError(), 0.0).error == "TimeoutError"
