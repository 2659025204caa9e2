"""What records are to say, once people or the course of things have overtaken them."""

from dataclasses import replace
from typing import Literal

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionState, CheckpointState
from ray_ckpt.core.observation import Command, Request
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import obeyed, overtaken, unfinished
from ray_ckpt.core.wanted import export_action, publish_action, purge_action, verify_action
from tests.core.worlds import COMMITTED, HF, observe, titles, view, with_export, with_record


def commanded(verb: Literal["retry", "cancel"], state: ActionState | None) -> list[ActionRecord]:
    """What becomes of a verify in this state."""
    step = view(1, COMMITTED)
    observed = observe(step)
    if state is not None:
        observed = with_record(observed, verify_action(step), state, next_attempt_at=5.0)
    command = Command(verb=verb, action=verify_action(step), by="ann@host")
    return obeyed(replace(observed, commands=(command,)), now=9.0)


@pytest.mark.parametrize("state", [None, *ActionState])
def test_what_ended_badly_or_waits_may_be_tried_again(state: ActionState | None) -> None:
    changed = commanded("retry", state)
    untouched = {None, ActionState.PENDING, ActionState.RUNNING, ActionState.SUCCEEDED}
    assert [record.state for record in changed] == (
        [] if state in untouched else [ActionState.PENDING]
    )
    assert all((record.attempts, record.next_attempt_at) == (0, None) for record in changed)


@pytest.mark.parametrize("state", [None, *ActionState])
def test_what_has_not_ended_may_be_cancelled(state: ActionState | None) -> None:
    changed = commanded("cancel", state)
    ended = {ActionState.SUCCEEDED, *GIVEN_UP}
    assert [record.state for record in changed] == (
        [] if state in ended else [ActionState.CANCELLED]
    )
    assert all(record.error == "cancelled by ann@host" for record in changed)


def test_a_cancelled_action_is_not_planned_and_its_request_is_settled() -> None:
    step = view(1)
    request = Request(step=1, export=HF)
    observed = observe(step, requests=(request,))
    assert titles(observed) == ["export step-1 hf"]
    observed = with_record(observed, export_action(step, HF), ActionState.CANCELLED)
    assert titles(observed) == []
    assert plan(observed, now=0.0).settled == (request,)


def test_a_copy_that_is_tried_again_takes_its_export_along() -> None:
    step = view(1)
    export, publish = export_action(step, HF), publish_action(step, HF, "/copies")
    observed = with_record(observe(step), export, ActionState.DEAD)
    observed = with_record(observed, publish, ActionState.SUPERSEDED)
    command = Command(verb="retry", action=publish, by="ann@host")
    again = obeyed(replace(observed, commands=(command,)), now=9.0)
    assert {(r.action.title, r.state, r.asked_by) for r in again} == {
        (publish.title, ActionState.PENDING, "ann@host"),
        (export.title, ActionState.PENDING, "ann@host"),
    }


def test_what_was_retried_is_planned_although_no_policy_or_request_asks_for_it() -> None:
    step = view(1)
    publish = publish_action(step, HF, "/copies")
    asked = ActionRecord(action=publish, asked_by="ann@host")
    observed = replace(observe(step), records={publish.key: asked})
    assert titles(observed) == ["export step-1 hf"]
    assert titles(with_export(observed, step, "hf")) == ["publish step-1 hf to /copies"]


def test_nobody_waits_for_what_was_begun_and_nothing_asks_for_any_more() -> None:
    step = view(1)
    observed = with_record(observe(step), export_action(step, HF), ActionState.RETRY_WAIT)
    assert unfinished(observed, now=0.0) == []


def test_an_idle_root_has_nothing_unfinished_and_a_waiting_one_says_what() -> None:
    step = view(1)
    assert unfinished(observe(step), now=0.0) == []
    assert unfinished(observe(view(2, COMMITTED)), now=0.0) == ["verify step-2 may start"]
    waiting = with_record(
        observe(step, requests=(Request(step=1, export=HF),)),
        export_action(step, HF),
        ActionState.RETRY_WAIT,
        next_attempt_at=99.0,
    )
    assert unfinished(waiting, now=0.0) == ["export step-1 hf is retry_wait"]


def test_records_of_a_step_that_is_gone_are_settled_by_what_became_of_it() -> None:
    gone, trashed = view(1), view(2, CheckpointState.TRASHED)
    observed = observe(trashed, view(3))
    for action in (
        verify_action(gone),
        export_action(trashed, HF),
        purge_action(trashed, grace_s=1.0),
        verify_action(view(3)),
    ):
        observed = with_record(observed, action, ActionState.PENDING)
    settled = {record.action.title: record.state for record in overtaken(observed, now=9.0)}
    assert settled == {
        "verify step-1": ActionState.CANCELLED,
        "export step-2 hf": ActionState.CANCELLED,
        "purge step-2": ActionState.SUCCEEDED,
    }


def test_an_export_whose_manager_died_before_it_said_so_is_known_to_be_done() -> None:
    step = view(1)
    export = export_action(step, HF)
    observed = with_record(observe(step), export, ActionState.PENDING)
    assert overtaken(observed, now=9.0) == []
    [record] = overtaken(with_export(observed, step, "hf"), now=9.0)
    assert (record.action, record.state) == (export, ActionState.SUCCEEDED)
