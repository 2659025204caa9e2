"""What is passed over for a newer step, and that one always goes on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.actions import Action
from ray_ckpt.core.coalescing import coalesced, superseded
from ray_ckpt.core.history import changes, snapshot_of
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import export_action, export_of, publish_action
from tests.core.worlds import (
    COMMITTED,
    COPY,
    EXPORT_ALL,
    HF,
    KEEP_TWO,
    VERIFIED,
    manifest,
    observe,
    titles,
    view,
    with_export,
    with_record,
)

NEWEST_EXPORT = ExportPolicy(name="hf", every_steps=1, when_behind="newest")
NEWEST_COPY = replace(COPY, when_behind="newest")
EXPORTS = LifecyclePolicy(export=(NEWEST_EXPORT,))
COPIES = LifecyclePolicy(export=EXPORT_ALL, publish=(NEWEST_COPY,))


def passed_over(observed: Observation) -> dict[str, str | None]:
    """Title to reason, of what a newer step makes needless now."""
    records = superseded(observed, now=9.0)
    assert {record.state for record in records} <= {ActionState.SUPERSEDED}
    return {record.action.title: record.error for record in records}


def exported(*views: CheckpointView, policy: LifecyclePolicy = COPIES) -> Observation:
    observed = observe(*views, policy=policy)
    for each in views:
        observed = with_export(observed, each, "hf")
    return observed


def copy_of(step: int) -> Action:
    return publish_action(view(step), HF, "/copies")


def test_of_exports_that_wait_only_the_newest_is_made() -> None:
    """Scenario 44: saves come faster than exports."""
    observed = observe(view(1), view(2), view(3), policy=EXPORTS)
    observed = with_record(observed, export_action(view(1), HF), ActionState.RUNNING)
    assert passed_over(observed) == {"export step-2 hf": "by export step-3 hf"}
    assert titles(observed) == ["export step-3 hf"]


def test_of_copies_that_wait_only_the_newest_is_made() -> None:
    """Scenario 44: exports come faster than uploads."""
    observed = exported(view(1), view(2), view(3))
    observed = with_record(observed, copy_of(1), ActionState.RUNNING)
    assert passed_over(observed) == {
        "publish step-2 hf to /copies": "by publish step-3 hf to /copies"
    }
    assert titles(observed) == ["publish step-3 hf to /copies"]


def test_without_it_all_of_them_are_made() -> None:
    policy = LifecyclePolicy(export=EXPORT_ALL, publish=(COPY,))
    assert passed_over(exported(view(1), view(2), policy=policy)) == {}


def test_the_plan_says_what_is_passed_over_for_what() -> None:
    planned = plan(observe(view(1), view(2), policy=EXPORTS), now=0.0).planned
    assert [(p.action.title, p.not_now) for p in planned] == [
        ("export step-1 hf", "superseded: by export step-2 hf"),
        ("export step-2 hf", None),
    ]


def test_it_is_an_event_that_says_by_what() -> None:
    before = observe(view(1), view(2), policy=EXPORTS)
    looks = [snapshot_of(o, token="t") for o in (before, coalesced(before, now=9.0))]
    told = changes(*looks, at="2026-01-01T00:00:00+00:00", who="manager epoch 1")
    assert [(e.what, e.text) for e in told] == [
        ("action.superseded", "export step-1 hf: superseded: by export step-2 hf")
    ]


def test_the_copies_of_an_export_that_is_passed_over_go_with_it() -> None:
    policy = replace(EXPORTS, publish=(COPY, PublishPolicy(export="hf", to="/more")))
    by = "by export step-2 hf"
    assert passed_over(observe(view(1), view(2), policy=policy)) == {
        "export step-1 hf": by,
        "publish step-1 hf to /copies": by,
        "publish step-1 hf to /more": by,
    }


def test_what_was_exported_in_time_is_copied_where_all_are_to_be() -> None:
    policy = replace(EXPORTS, publish=(COPY,))
    observed = exported(view(1), view(2), policy=policy)
    assert passed_over(observed) == {}
    behind = with_export(observe(view(1), view(2), view(3), policy=policy), view(1), "hf")
    assert passed_over(behind) == {
        "export step-2 hf": "by export step-3 hf",
        "publish step-2 hf to /copies": "by export step-3 hf",
    }


def test_a_copy_that_was_passed_over_holds_its_step_no_longer() -> None:
    """Scenario 44: a required destination that is behind does not fill the disk."""
    observed = exported(view(1), view(2), view(3), policy=replace(COPIES, keep=KEEP_TWO))
    observed = with_record(observed, copy_of(3), ActionState.RUNNING)
    assert "purge step-1" in titles(observed)
    assert (
        "not done yet: publish step-3 hf to /copies" in plan(observed, now=0.0).verdicts[2].reasons
    )


@pytest.mark.parametrize("state", [None, *ActionState])
def test_only_what_has_not_begun_is_passed_over(state: ActionState | None) -> None:
    """PENDING is what was interrupted, or what a person has retried."""
    observed = observe(view(1), view(2), policy=EXPORTS)
    if state is not None:
        observed = with_record(observed, export_action(view(1), HF), state)
    waits = state in (None, ActionState.RETRY_WAIT, ActionState.BLOCKED)
    assert bool(passed_over(observed)) is waits


@pytest.mark.parametrize("state", [None, *ActionState])
def test_a_newer_step_that_was_given_up_makes_nothing_needless(state: ActionState | None) -> None:
    observed = observe(view(1), view(2), policy=EXPORTS)
    if state is not None:
        observed = with_record(observed, export_action(view(2), HF), state)
    given_up = state in (ActionState.DEAD, ActionState.CANCELLED, ActionState.SUPERSEDED)
    assert bool(passed_over(observed)) is not given_up


def test_what_more_than_every_steps_asks_for_is_never_passed_over() -> None:
    policy = ExportPolicy(name="hf", every_steps=1, steps=(1,), best=1, when_behind="newest")
    last = replace(view(3), manifest=manifest(3, is_last_step=True, loss=2.0))
    steps = (view(1, loss=2.0), view(2, loss=1.0), last, view(4, loss=2.0), view(5, loss=2.0))
    asked = Request(step=4, export=HF)
    observed = observe(*steps, policy=LifecyclePolicy(export=(policy,)), requests=(asked,))
    assert passed_over(observed) == {}
    assert set(passed_over(replace(observed, requests=()))) == {"export step-4 hf"}


def test_a_copy_that_is_asked_for_is_never_passed_over() -> None:
    asked = Request(step=1, export=HF, destination="/copies")
    assert passed_over(replace(exported(view(1), view(2)), requests=(asked,))) == {}


def test_a_step_that_may_be_damaged_or_is_unhealthy_makes_nothing_needless() -> None:
    sick = replace(view(3), manifest=replace(manifest(3), non_finite=("w",)))
    torn = replace(view(4), problem="a file is missing")
    for newer in (view(2, COMMITTED), sick, torn):
        assert passed_over(observe(view(1), newer, policy=EXPORTS)) == {}


def test_a_copy_waits_for_no_newer_one_whose_export_is_not_there() -> None:
    """Else a slow export would keep every copy from ever being made."""
    observed = with_export(observe(view(1), view(2), policy=COPIES), view(1), "hf")
    assert passed_over(observed) == {}
    assert "publish step-1 hf to /copies" in titles(observed)


STATES = st.sampled_from([None, *ActionState])


@st.composite
def backlogs(draw: st.DrawFn) -> Observation:
    export = replace(NEWEST_EXPORT, every_steps=draw(st.integers(1, 3)))
    copy = replace(COPY, when_behind=draw(st.sampled_from(["all", "newest"])))
    steps = sorted(draw(st.sets(st.integers(1, 9), max_size=6)))
    views = [view(step, draw(st.sampled_from([COMMITTED, VERIFIED]))) for step in steps]
    observed = observe(*views, policy=LifecyclePolicy(export=(export,), publish=(copy,)))
    for each in views:
        if draw(st.booleans()):
            observed = with_export(observed, each, "hf")
        for action in (export_action(each, HF), copy_of(each.step)):
            state = draw(STATES)
            observed = with_record(observed, action, state) if state else observed
    return observed


@given(observed=backlogs())
@settings(max_examples=200, deadline=None)
def test_the_newest_that_is_due_is_never_passed_over_and_twice_is_once(
    observed: Observation,
) -> None:
    gone = superseded(observed, now=9.0)
    every = observed.policy.export[0].every_steps or 1
    due = [c.step for c in observed.readable() if c.step % every == 0]
    assert all(record.action.step < max(due) for record in gone)
    assert {r.action.kind for r in gone} <= {ActionKind.EXPORT, ActionKind.PUBLISH}
    assert superseded(coalesced(observed, now=9.0), now=9.0) == []
    left = coalesced(observed, now=9.0)
    planned = [p.action for p in plan(observed, now=9.0).planned]
    made = {e.step for e in observed.exports}
    for record in gone:
        action = record.action
        is_without_export = left.state_of(export_of(action)) is ActionState.SUPERSEDED
        is_copied = any(
            r.action.kind is ActionKind.PUBLISH and r.state is ActionState.SUCCEEDED
            for r in observed.records.values()
            if r.action.step > action.step
        )
        goes_on = {p.step for p in planned if p.kind is action.kind} | made
        if action.kind is ActionKind.EXPORT or not (is_without_export or is_copied):
            assert max(goes_on) > action.step
