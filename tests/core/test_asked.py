"""A person overrules policies, and never what nothing may purge."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import PurgeRefusedError, TransientError
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Command, Observation, Request
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import obeyed, refused, unfinished
from ray_ckpt.core.wanted import export_action, purge_action, verify_action
from tests.core.worlds import (
    COMMITTED,
    COPY_EACH,
    HF,
    KEEP_TWO,
    VERIFIED,
    observe,
    titles,
    view,
    with_record,
)


def asked(observed: Observation, *views: CheckpointView) -> Observation:
    """The same once somebody has asked for the purge of these steps, and was heard."""
    commands = tuple(
        Command(verb="purge", action=purge_action(each, grace_s=60.0), by="ann@host")
        for each in views
    )
    records = obeyed(replace(observed, commands=commands), now=5.0)
    return replace(observed, records={**observed.records, **{r.action.key: r for r in records}})


def ends(observed: Observation) -> dict[int, str]:
    """What becomes of the purges that cannot be: by step, the first line of why."""
    records = refused(observed, now=9.0)
    assert all(record.is_refusal for record in records)
    return {r.action.step: (r.error or "").partition("\n")[0] for r in records}


def test_a_step_that_a_policy_keeps_goes_when_somebody_asks() -> None:
    old = view(1)
    observed = asked(observe(old, view(2), view(3)), old)
    assert titles(observed) == ["purge step-1"]
    (planned, *_), (verdict, *_) = plan(observed, now=0.0).planned, plan(observed, now=0.0).verdicts
    assert planned.reason == verdict.why_not == "asked for by ann@host"
    assert not verdict.keep
    assert ends(observed) == {}


def test_nothing_else_is_done_to_a_step_that_goes() -> None:
    old = view(1, COMMITTED)
    observed = asked(observe(old, view(2), view(3)), old)
    assert titles(observed) == ["purge step-1"]


def test_a_step_that_must_stay_is_refused_with_every_reason() -> None:
    pinned, newest = view(1, VERIFIED, "paper"), view(4)
    request = Request(step=2, export=HF)
    observed = observe(pinned, view(2), view(3), newest, requests=(request,))
    observed = asked(observed, pinned, view(2), newest)
    assert titles(observed) == ["export step-2 hf"]
    assert ends(observed) == {
        1: "step-1 stays: pinned: paper",
        2: "step-2 stays: not done yet: export step-2 hf",
        4: "step-4 stays: newest two verified",
    }
    waiting = {p.action.title: p.not_now for p in plan(observed, now=0.0).planned}
    assert waiting["purge step-1"] == "pinned: paper"


def test_a_required_copy_that_is_not_there_keeps_its_step_from_people_too() -> None:
    old = view(1)
    observed = asked(observe(old, view(2), view(3), policy=COPY_EACH), old)
    assert "publish step-1 hf to /copies" in ends(observed)[1]


def test_while_its_bytes_are_read_a_purge_waits_and_is_not_refused() -> None:
    old = view(1)
    observed = with_record(observe(old, view(2), view(3)), verify_action(old), ActionState.RUNNING)
    observed = asked(observed, old)
    assert (titles(observed), ends(observed)) == ([], {})
    assert "purge step-1 is pending" in unfinished(observed, now=0.0)


def test_what_the_task_found_out_ends_the_purge_and_what_may_pass_does_not() -> None:
    old = view(1)
    observed = asked(observe(old, view(2), view(3)), old)
    (record,) = observed.records.values()

    def after(error: Exception) -> Observation:
        failed = record.started(6.0).failed(error, 7.0)
        return replace(observed, records={record.action.key: failed})

    assert ends(after(PurgeRefusedError("step-1 stays: it is being read"))) == {
        1: "step-1 stays: it is being read"
    }
    assert ends(after(TransientError("slow"))) == {}


def test_a_purge_of_a_policy_that_is_held_is_looked_at_again_and_never_given_up() -> None:
    old = view(1)
    observed = observe(old, view(2), view(3), policy=LifecyclePolicy(keep=KEEP_TWO))
    held = ActionRecord(action=purge_action(old, grace_s=60.0)).started(1.0)
    held = held.failed(PurgeRefusedError("it is being read"), 2.0)
    assert ends(replace(observed, records={held.action.key: held})) == {}


def test_a_refusal_binds_neither_the_policy_nor_the_next_who_asks() -> None:
    old = view(1, VERIFIED, "paper")
    observed = asked(observe(old, view(2), view(3)), old)
    (record,) = refused(observed, now=9.0)
    records = {record.action.key: record}
    free = replace(observed, checkpoints=(view(1), view(2), view(3)), records=records)
    assert titles(free) == []
    assert titles(replace(free, policy=LifecyclePolicy(keep=KEEP_TWO))) == ["purge step-1"]
    assert titles(asked(free, view(1))) == ["purge step-1"]


def test_what_a_person_cancelled_is_no_refusal() -> None:
    old = view(1)
    held = ActionRecord(action=purge_action(old, grace_s=60.0)).started(1.0)
    held = held.failed(PurgeRefusedError("it is being read"), 2.0).cancelled("by ann", 3.0)
    policy = LifecyclePolicy(keep=KEEP_TWO)
    observed = observe(old, view(2), view(3), policy=policy)
    assert titles(replace(observed, records={held.action.key: held})) == []


@pytest.mark.parametrize("state", [None, *ActionState])
@pytest.mark.parametrize("place", [CheckpointState.VERIFIED, CheckpointState.TRASHED])
def test_asking_begins_anew_unless_it_runs_or_is_done(
    state: ActionState | None, place: CheckpointState
) -> None:
    step = view(1, place)
    observed = observe(step)
    if state is not None:
        observed = with_record(observed, purge_action(step, grace_s=60.0), state)
    command = Command(verb="purge", action=purge_action(step, grace_s=60.0), by="ann@host")
    records = obeyed(replace(observed, commands=(command,)), now=5.0)
    is_done = state is ActionState.SUCCEEDED and place is CheckpointState.TRASHED
    if state is ActionState.RUNNING or is_done:
        assert records == []
    else:
        assert [(r.state, r.asked_by, r.attempts) for r in records] == [
            (ActionState.PENDING, "ann@host", 0)
        ]


@st.composite
def worlds(draw: st.DrawFn) -> Observation:
    steps = sorted(draw(st.sets(st.integers(1, 12), max_size=6)))
    keeps = [KeepConfig(), KEEP_TWO, KeepConfig(every_steps=4), KeepConfig(max_bytes=20)]
    policy = draw(st.sampled_from([LifecyclePolicy(), COPY_EACH]))
    views: list[CheckpointView] = []
    for step in steps:
        pins = draw(st.sampled_from([(), ("paper",)]))
        views.append(view(step, draw(st.sampled_from(CheckpointState)), *pins))
    observed = observe(*views, policy=replace(policy, keep=draw(st.sampled_from(keeps))))
    for each in views:
        for action in (verify_action(each), export_action(each, HF)):
            state = draw(st.sampled_from([None, *ActionState]))
            observed = with_record(observed, action, state) if state else observed
    wished = [each for each in views if draw(st.booleans())]
    return asked(observed, *wished)


@given(observed=worlds())
@settings(max_examples=200, deadline=None)
def test_no_plan_purges_what_nothing_may_purge_whoever_asks(observed: Observation) -> None:
    goes = {a.step for a in plan(observed, now=9.0).actions if a.kind is ActionKind.PURGE}
    here = {c.step: c for c in observed.readable()}
    ways_back = [step for step, c in here.items() if c.is_way_back]
    assert not goes & set(ways_back[-2:])
    assert len(ways_back) >= 2 or not goes
    assert not [step for step in goes if here[step].pins]
    for step in goes:
        assert observed.state_of(verify_action(here[step])) is not ActionState.RUNNING
    assert not goes & ends(observed).keys()
