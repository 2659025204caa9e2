"""Copies are looked at again when all is quiet, and what is found has consequences."""

from dataclasses import replace

import pytest

from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import Occupant, admit
from ray_ckpt.core.copies import present_copies, retire_action
from ray_ckpt.core.copy_policy import KeepCopies, PublishPolicy
from ray_ckpt.core.copy_states import (
    COPIED_AT,
    LOOKED_AT,
    READ_AT,
    STATE,
    WHY,
    look_action,
    losses,
)
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.history import changes, snapshot_of
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.looks import proof_needed
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import overtaken, unfinished
from ray_ckpt.core.wanted import publish_action, verify_action
from tests.core.worlds import (
    COMMITTED,
    COPY,
    EXPORT_ALL,
    HF,
    KEEP_TWO,
    observe,
    titles,
    view,
    with_export,
    with_record,
)

DAY_S = 86400.0
WATCHED = replace(COPY, look_every_s=DAY_S)


def copied(*steps: int, copy: PublishPolicy = WATCHED) -> Observation:
    """Each exported, and copied at as many seconds as its number."""
    policy = LifecyclePolicy(export=EXPORT_ALL, publish=(copy,))
    observed = observe(*map(view, steps), policy=policy)
    for step in steps:
        observed = with_export(observed, view(step), "hf")
        observed = made(observed, copy_of(step, copy.to), at=float(step))
    return observed


def copy_of(step: int, place: str = "/copies") -> Action:
    return publish_action(view(step), HF, place)


def made(observed: Observation, copy: Action, *, at: float) -> Observation:
    return with_record(observed, copy, ActionState.SUCCEEDED, changed_at=at)


def looked(
    observed: Observation,
    step: int,
    found: str,
    *,
    at: float = DAY_S,
    why: str = "",
    state: ActionState = ActionState.SUCCEEDED,
) -> Observation:
    result = {STATE: found, WHY: why, LOOKED_AT: at, READ_AT: None, COPIED_AT: float(step)}
    look = look_action(copy_of(step))
    return with_record(observed, look, state, changed_at=at, result=result)


def test_a_copy_is_looked_at_once_it_was_made_long_enough_ago() -> None:
    observed = copied(5)
    assert titles(observed, now=DAY_S + 4) == []
    (planned,) = plan(observed, now=DAY_S + 5).planned
    assert planned.action.title == "look step-5 hf at /copies"
    assert planned.reason == "last looked at 1970-01-01T00:00:05+00:00, every 86400 s"
    after = looked(observed, 5, "present")
    assert titles(after, now=2 * DAY_S - 1) == []
    assert titles(after, now=2 * DAY_S) == ["look step-5 hf at /copies"]


def test_nothing_is_looked_at_unless_the_policy_asks() -> None:
    assert titles(copied(5, copy=COPY), now=1e9) == []


def test_the_longest_unseen_comes_first_and_one_at_a_time() -> None:
    observed = copied(5, 7)
    assert titles(observed, now=2 * DAY_S) == ["look step-5 hf at /copies"]
    running = looked(observed, 5, "present", state=ActionState.RUNNING)
    assert titles(running, now=3 * DAY_S) == []
    after = looked(observed, 5, "present", at=2 * DAY_S)
    assert titles(after, now=2 * DAY_S) == ["look step-7 hf at /copies"]


def test_a_look_waits_for_all_other_work_and_nobody_waits_for_it() -> None:
    observed = copied(5)
    busy = replace(observed, checkpoints=(*observed.checkpoints, view(8, COMMITTED)))
    last = plan(busy, now=DAY_S * 9).planned[-1]
    assert (last.action.title, last.not_now) == (
        "look step-5 hf at /copies",
        "after all other work",
    )
    assert unfinished(observed, now=DAY_S * 9) == []


def test_a_place_that_does_not_answer_holds_up_nothing_else() -> None:
    policies = (WATCHED, replace(WATCHED, to="/dead"))
    observed = replace(copied(5, 7), policy=LifecyclePolicy(export=EXPORT_ALL, publish=policies))
    for step in (5, 7):
        observed = made(observed, copy_of(step, "/dead"), at=1.0)
    dead = look_action(copy_of(5, "/dead"))
    hanging = with_record(observed, dead, ActionState.RUNNING)
    assert titles(hanging, now=2 * DAY_S) == ["look step-5 hf at /copies"]
    failed = with_record(observed, dead, ActionState.DEAD, changed_at=2 * DAY_S)
    assert titles(failed, now=2 * DAY_S) == [
        "look step-5 hf at /copies",
        "look step-7 hf at /dead",
    ]
    verify = verify_action(view(9))
    busy = replace(hanging, checkpoints=(*hanging.checkpoints, view(9, COMMITTED)))
    assert titles(busy, now=2 * DAY_S) == [verify.title]


def test_a_look_takes_no_place_from_a_copy() -> None:
    look, limits = look_action(copy_of(5)), Limits(per_destination=1)
    publish = copy_of(7)
    for first, second in ((look, publish), (publish, look)):
        running = [Occupant(action=first)]
        assert admit([second], running, limits=limits, resting={}, nodes=None).waits == {}


def test_a_look_that_was_given_up_is_due_again_later() -> None:
    observed = looked(copied(5), 5, "present", state=ActionState.DEAD, at=2 * DAY_S)
    observed = with_record(
        observed, look_action(copy_of(5)), ActionState.DEAD, changed_at=2 * DAY_S
    )
    assert titles(observed, now=3 * DAY_S - 1) == []
    assert titles(observed, now=3 * DAY_S) == ["look step-5 hf at /copies"]


def test_a_copy_that_is_gone_is_made_again_and_holds_its_step_until_then() -> None:
    observed = looked(copied(5, 6, 7), 5, "gone", why="its manifest is not there")
    observed = replace(observed, policy=replace(observed.policy, keep=KEEP_TWO))
    assert titles(observed, now=DAY_S) == ["publish step-5 hf to /copies"]
    held = plan(observed, now=DAY_S).verdicts[0]
    assert held.reasons == ("not done yet: publish step-5 hf to /copies",)
    anew = made(observed, copy_of(5), at=DAY_S + 1)
    assert losses(anew.records) == {}
    assert titles(anew, now=DAY_S + 1)[0] == "purge step-5"


def test_a_copy_that_is_another_now_is_not_written_over_and_holds_its_step() -> None:
    observed = looked(copied(5, 6, 7), 5, "stale", why="config.json is missing")
    observed = replace(observed, policy=replace(observed.policy, keep=KEEP_TWO))
    assert titles(observed, now=DAY_S) == []
    planned = plan(observed, now=DAY_S)
    assert planned.planned[0].not_now == (
        "the copy there is another now: config.json is missing; look at it and remove it there, "
        "the next look finds it gone"
    )
    assert planned.verdicts[0].keep
    optional = replace(WATCHED, required=False)
    policy = replace(observed.policy, publish=(optional,))
    assert "purge step-5" in titles(replace(observed, policy=policy), now=DAY_S)


def test_what_was_found_counts_until_the_next_look_has_ended() -> None:
    observed = looked(copied(5), 5, "gone")
    look = look_action(copy_of(5))
    record = observed.records[look.key].afresh().started(2 * DAY_S)
    running = replace(observed, records={**observed.records, look.key: record})
    assert [loss.state for loss in losses(running.records).values()] == ["gone"]
    failed = record.failed(OSError("no route"), 3 * DAY_S)
    assert failed.state is ActionState.RETRY_WAIT
    assert failed.result == observed.records[look.key].result


def test_a_copy_that_nobody_asks_for_any_more_is_not_made_again() -> None:
    observed = looked(copied(5), 5, "gone")
    nobody = replace(observed, policy=LifecyclePolicy())
    assert titles(nobody, now=DAY_S) == []
    assert losses(nobody.records).keys() == {copy_of(5).key}


def test_a_lost_copy_is_no_reason_to_remove_another_one() -> None:
    keeping = replace(WATCHED, keep=KeepCopies(latest=1))
    observed = looked(copied(5, 7, copy=keeping), 7, "gone")
    assert [copy.action.step for copy in present_copies(observed)] == [5]
    assert titles(observed, now=DAY_S) == ["publish step-7 hf to /copies"]


def test_a_look_at_a_copy_that_was_removed_is_not_waited_for() -> None:
    look = look_action(copy_of(5))
    waiting = with_record(copied(5), look, ActionState.RETRY_WAIT)
    assert overtaken(waiting, now=1.0) == []
    retired = with_record(
        waiting, retire_action(copy_of(5)), ActionState.SUCCEEDED, result={COPIED_AT: 5.0}
    )
    (record,) = overtaken(retired, now=1.0)
    assert (record.action, record.state) == (look, ActionState.CANCELLED)


def test_bytes_are_read_as_often_as_the_policy_says() -> None:
    weekly = replace(WATCHED, scrub_every_s=7 * DAY_S)
    observed, look = copied(5, copy=weekly), look_action(copy_of(5))
    assert proof_needed(look, observed, now=2 * DAY_S) == "sizes"
    assert proof_needed(look, observed, now=8 * DAY_S) == "digests"
    result = {STATE: "present", LOOKED_AT: 8 * DAY_S, READ_AT: 8 * DAY_S, COPIED_AT: 5.0}
    read = with_record(observed, look, ActionState.SUCCEEDED, result=result)
    assert proof_needed(look, read, now=9 * DAY_S) == "sizes"
    assert proof_needed(look, read, now=15 * DAY_S) == "digests"
    assert proof_needed(look, copied(5), now=1e9) == "sizes"


def test_a_lost_copy_is_told_of_once_and_so_is_its_return() -> None:
    whole = copied(5)
    gone = looked(whole, 5, "gone", why="its manifest is not there")
    stale = looked(whole, 5, "stale", why="config.json is missing")
    anew = made(gone, copy_of(5), at=9.0)

    def told(before: Observation, after: Observation) -> list[tuple[str, str]]:
        snapshots = (snapshot_of(before, token="a"), snapshot_of(after, token="b"))
        events = changes(*snapshots, at="", who="me")
        return [(e.what, e.text) for e in events if e.what.startswith("copy.")]

    assert told(whole, gone) == [
        ("copy.gone", "the copy step-5 hf to /copies is gone: its manifest is not there")
    ]
    assert told(gone, gone) == []
    assert told(stale, gone) == [
        ("copy.gone", "the copy step-5 hf to /copies is gone: its manifest is not there")
    ]
    assert told(gone, anew) == [("copy.whole", "the copy step-5 hf to /copies is no longer gone")]


@pytest.mark.parametrize("field", ["look_every_s", "scrub_every_s"])
def test_a_time_that_cannot_be_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        replace(COPY, **{field: 0.0})
