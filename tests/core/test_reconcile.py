"""What is done next, in a world of plain records that does what the plan says."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.manifest import Lineage
from ray_ckpt.core.observation import READABLE, CheckpointView, ExportView, Observation, Request
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy
from ray_ckpt.core.reconcile import decide_all, holds_of, plan
from ray_ckpt.core.wanted import export_action, publish_action, purge_action, verify_action
from tests.core.worlds import (
    COMMITTED,
    COPY,
    COPY_EACH,
    EXPORT_ALL,
    HF,
    KEEP_TWO,
    VERIFIED,
    after_success,
    manifest,
    observe,
    titles,
    view,
    with_export,
    with_record,
)

MAX_ROUNDS = 60
HELD = verify_action(view(5))


def settle(observed: Observation, is_doomed: Callable[[Action], bool]) -> Observation:
    """The world once a plan asks for nothing more; actions that are doomed end DEAD."""
    for _ in range(MAX_ROUNDS):
        actions = plan(observed, now=0.0).actions
        if not actions:
            return observed
        for action in actions:
            if is_doomed(action):
                observed = with_record(observed, action, ActionState.DEAD)
            else:
                observed = after_success(observed, action)
    raise AssertionError("the plan never comes to rest")


def test_nothing_is_planned_for_an_empty_root() -> None:
    assert plan(observe(policy=COPY_EACH), now=0.0).actions == ()


def test_verify_comes_before_export_and_export_before_publish() -> None:
    observed = observe(view(5, COMMITTED), policy=COPY_EACH)
    rounds: list[list[str]] = []
    while actions := plan(observed, now=0.0).actions:
        rounds.append([action.title for action in actions])
        observed = after_success(observed, actions[0])
    assert rounds == [["verify step-5"], ["export step-5 hf"], ["publish step-5 hf to /copies"]]


def test_the_oldest_step_comes_first() -> None:
    observed = observe(view(9, COMMITTED), view(3, COMMITTED), view(7, COMMITTED))
    assert titles(observed) == ["verify step-3", "verify step-7", "verify step-9"]


@pytest.mark.parametrize("state", sorted(set(CheckpointState) - READABLE))
def test_nothing_is_done_to_what_may_not_be_read(state: CheckpointState) -> None:
    observed = observe(view(5, state), policy=replace(COPY_EACH, keep=KEEP_TWO))
    planned = plan(observed, now=0.0)
    assert (planned.actions, planned.verdicts) == ((), ())


@pytest.mark.parametrize(
    ("state", "is_started"),
    [
        (ActionState.PENDING, True),
        (ActionState.RUNNING, False),
        (ActionState.RETRY_WAIT, False),
        (ActionState.BLOCKED, False),
        (ActionState.DEAD, False),
        (ActionState.CANCELLED, False),
        (ActionState.SUPERSEDED, False),
    ],
)
def test_only_what_is_pending_is_started(state: ActionState, is_started: bool) -> None:
    checkpoint = view(5, COMMITTED)
    observed = with_record(observe(checkpoint), verify_action(checkpoint), state)
    assert bool(plan(observed, now=0.0).actions) is is_started


@pytest.mark.parametrize(("now", "is_started"), [(99.9, False), (100.0, True), (500.0, True)])
def test_a_retry_waits_for_its_time(now: float, is_started: bool) -> None:
    checkpoint = view(5, COMMITTED)
    observed = with_record(
        observe(checkpoint),
        verify_action(checkpoint),
        ActionState.RETRY_WAIT,
        next_attempt_at=100.0,
    )
    assert titles(observed, now=now) == (["verify step-5"] if is_started else [])


def test_the_last_step_is_exported_although_it_is_no_multiple() -> None:
    policy = LifecyclePolicy(export=(ExportPolicy(name="hf", every_steps=10),))
    last = replace(view(7), manifest=manifest(7, is_last_step=True))
    assert titles(observe(view(5), last, view(20), policy=policy)) == [
        "export step-7 hf",
        "export step-20 hf",
    ]


def test_an_export_of_an_earlier_save_of_the_step_does_not_count() -> None:
    observed = observe(view(5), policy=LifecyclePolicy(export=EXPORT_ALL))
    recipe = {"name": "hf", "dtype": "bfloat16"}
    made = replace(manifest(5), lineage=Lineage(run_id="run", source_id="other", recipe=recipe))
    stale = ExportView(name="hf", step=5, manifest=made)
    assert titles(replace(observed, exports=(stale,))) == ["export step-5 hf"]


def test_only_what_retention_lets_go_is_purged() -> None:
    observed = observe(
        view(1), view(2, VERIFIED, "paper"), view(3), view(4), policy=LifecyclePolicy(keep=KEEP_TWO)
    )
    planned = plan(observed, now=0.0)
    assert planned.actions == (purge_action(view(1), grace_s=60.0),)
    assert {v.step: v.keep for v in planned.verdicts} == {1: False, 2: True, 3: True, 4: True}


@pytest.mark.parametrize(
    "state", [None, ActionState.PENDING, ActionState.RUNNING, ActionState.RETRY_WAIT]
)
def test_a_step_is_not_purged_before_its_export_has_ended(state: ActionState | None) -> None:
    old, policy = view(1), LifecyclePolicy(export=EXPORT_ALL, keep=KEEP_TWO)
    observed = observe(old, view(2), view(3), policy=policy)
    if state is not None:
        observed = with_record(observed, export_action(old, HF), state)
    assert "purge step-1" not in titles(observed)
    assert "not done yet: export step-1 hf" in plan(observed, now=0.0).verdicts[0].reasons


def test_a_dead_export_does_not_hold_its_step_for_ever() -> None:
    old, policy = view(1), LifecyclePolicy(export=EXPORT_ALL, keep=KEEP_TWO)
    observed = observe(old, view(2), view(3), policy=policy)
    observed = with_record(observed, export_action(old, HF), ActionState.DEAD)
    assert "purge step-1" in titles(observed)


def test_a_finished_export_whose_record_was_lost_does_not_hold_its_step() -> None:
    old, policy = view(1), LifecyclePolicy(export=EXPORT_ALL, keep=KEEP_TWO)
    observed = with_export(observe(old, view(2), view(3), policy=policy), old, "hf")
    assert holds_of(observed)[1] == ()
    assert "purge step-1" in titles(observed)


@pytest.mark.parametrize("state", [None, *ActionState])
@pytest.mark.parametrize("required", [True, False])
def test_a_step_is_not_purged_before_its_required_copy_is_there(
    state: ActionState | None, required: bool
) -> None:
    old = view(1)
    policy = LifecyclePolicy(
        export=EXPORT_ALL, publish=(replace(COPY, required=required),), keep=KEEP_TWO
    )
    observed = with_export(observe(old, view(2), view(3), policy=policy), old, "hf")
    if state is not None:
        observed = with_record(observed, publish_action(old, HF, "/copies"), state)
    ends = (
        {ActionState.SUCCEEDED, ActionState.SUPERSEDED}
        if required
        else {ActionState.SUCCEEDED, *GIVEN_UP}
    )
    assert ("purge step-1" in titles(observed)) is (state in ends)


def test_a_request_is_served_like_a_policy_and_only_for_its_step() -> None:
    request = Request(step=1, export=HF, destination="/mine")
    observed = observe(view(1, COMMITTED), view(2, COMMITTED), requests=(request,))
    done = settle(observed, lambda _: False)
    succeeded = {record.action.title for record in done.records.values()}
    assert succeeded == {
        "verify step-1",
        "verify step-2",
        "export step-1 hf",
        "publish step-1 hf to /mine",
    }


def test_a_request_that_equals_the_policy_is_done_once() -> None:
    request = Request(step=1, export=HF)
    observed = observe(
        view(1), policy=LifecyclePolicy(export=EXPORT_ALL), requests=(request, request)
    )
    assert titles(observed) == ["export step-1 hf"]


def test_a_requested_copy_holds_its_step() -> None:
    request = Request(step=1, export=HF, destination="/mine")
    policy = LifecyclePolicy(keep=KEEP_TWO)
    observed = observe(view(1), view(2), view(3), policy=policy, requests=(request,))
    assert titles(observed) == ["export step-1 hf"]
    assert "purge step-1" in {
        r.action.title for r in settle(observed, lambda _: False).records.values()
    }


def test_a_request_for_a_step_that_is_not_there_is_a_problem() -> None:
    request = Request(step=9, export=HF)
    planned = plan(observe(view(1), requests=(request,)), now=0.0)
    assert planned.actions == ()
    assert planned.problems == ("hf of step-9 was asked for, but that step is not there",)
    assert planned.settled == (request,)


def test_a_held_step_names_what_holds_it() -> None:
    observed = observe(view(1), policy=COPY_EACH)
    assert holds_of(observed) == {
        1: ("not done yet: export step-1 hf", "not done yet: publish step-1 hf to /copies")
    }
    assert (
        decide_all(observed, holds=holds_of(observed), now=0.0)[0].reasons[:2]
        == holds_of(observed)[1]
    )


def test_every_planned_action_says_who_asks_for_it_and_what_it_waits_for() -> None:
    request = Request(step=4, export=ExportSpec(name="mine"), destination="/mine")
    policy = replace(COPY_EACH, keep=KEEP_TWO)
    observed = observe(view(3), view(4), view(5, COMMITTED), policy=policy, requests=(request,))
    observed = with_export(observed, view(3), "hf")
    assert [(p.action.title, p.reason, p.not_now) for p in plan(observed, now=0.0).planned] == [
        ("verify step-5", "every committed step is verified", None),
        ("publish step-3 hf to /copies", "every hf is copied there, required", None),
        (
            "publish step-4 hf to /copies",
            "every hf is copied there, required",
            "after export step-4 hf",
        ),
        ("publish step-4 mine to /mine", "asked for", "after export step-4 mine"),
        (
            "publish step-5 hf to /copies",
            "every hf is copied there, required",
            "after verify step-5",
        ),
        ("export step-4 hf", "every 1 steps", None),
        ("export step-4 mine", "asked for", None),
        ("export step-5 hf", "every 1 steps", "after verify step-5"),
    ]


def test_a_purge_says_which_lines_of_the_policy_let_the_step_go() -> None:
    observed = observe(view(1), view(3), view(4), policy=LifecyclePolicy(keep=KEEP_TWO))
    planned = plan(observed, now=0.0).planned
    assert [(p.action.title, p.reason) for p in planned] == [
        ("purge step-1", "kept by neither a pin nor: latest 2")
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            ActionRecord(action=HELD, state=ActionState.RUNNING, attempts=2, changed_at=60.0),
            "running since 1970-01-01T00:01:00+00:00, attempt 2",
        ),
        (
            ActionRecord(
                action=HELD,
                state=ActionState.RETRY_WAIT,
                attempts=1,
                next_attempt_at=60.0,
                error="no route\n  do: wait",
            ),
            "attempt 2 at 1970-01-01T00:01:00+00:00; the last one: no route",
        ),
        (
            ActionRecord(action=HELD, state=ActionState.DEAD, attempts=8, error="no route"),
            "dead after 8 attempts: no route",
        ),
    ],
)
def test_what_does_not_start_now_says_how_far_it_is(record: ActionRecord, expected: str) -> None:
    observed = replace(observe(view(5, COMMITTED)), records={HELD.key: record})
    assert [p.not_now for p in plan(observed, now=0.0).planned] == [expected]


@pytest.mark.parametrize("kind", [ActionKind.VERIFY, ActionKind.SCRUB])
def test_a_step_is_not_purged_while_its_bytes_are_read(kind: ActionKind) -> None:
    reading = replace(verify_action(view(1)), kind=kind)
    observed = observe(view(1), view(3), view(4), policy=LifecyclePolicy(keep=KEEP_TWO))
    observed = with_record(observed, reading, ActionState.RUNNING)
    assert titles(observed) == []
    assert f"not done yet: {kind} step-1" in plan(observed, now=0.0).verdicts[0].reasons


def test_what_was_saved_lately_is_kept() -> None:
    def saved(step: int, at: str) -> CheckpointView:
        return replace(view(step), manifest=replace(manifest(step), created_at=at))

    policy = LifecyclePolicy(keep=KeepConfig(max_age_s=3600))
    observed = observe(
        saved(1, "2026-01-01T10:00:00+00:00"),
        saved(2, "2026-01-01T11:00:00"),
        saved(3, "2026-01-01T11:59:00+00:00"),
        saved(4, "2026-01-01T12:00:00+00:00"),
        policy=policy,
    )
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()
    assert titles(observed, now=noon) == ["purge step-1"]
    assert titles(observed, now=noon + 601) == ["purge step-1", "purge step-2"]


def test_a_quota_counts_bytes_of_checkpoints_and_one_that_cannot_be_met_is_a_problem() -> None:
    policy = LifecyclePolicy(keep=KeepConfig(max_bytes=9))
    fits = observe(view(2), view(3), view(4), policy=policy)
    assert titles(fits) == []
    assert plan(fits, now=0.0).problems == ()
    over = observe(view(2), view(3), view(4), view(5), policy=policy)
    assert titles(over) == ["purge step-2", "purge step-3"]
    pinned = observe(view(2, VERIFIED, "paper"), view(4), view(5), policy=policy)
    assert titles(pinned) == []
    assert "3 checkpoints that nothing may purge" in plan(pinned, now=0.0).problems[0]


STEPS = st.lists(st.integers(1, 12), unique=True, max_size=6)
REQUESTS = st.builds(
    Request,
    step=st.integers(1, 12),
    export=st.just(ExportSpec(name="asked")),
    destination=st.sampled_from([None, "/asked"]),
)


EVERY_THREE = ExportPolicy(name="hf", every_steps=3)
THE_BEST = ExportPolicy(name="hf", best=1, steps=(5,))
KEEP_ONE_COPY = replace(COPY, keep=KeepCopies(latest=1))
KEEPS = [KeepConfig(), KEEP_TWO, KeepConfig(every_steps=4), KeepConfig(latest=3, max_bytes=20)]


@st.composite
def worlds(draw: st.DrawFn) -> Observation:
    policy = LifecyclePolicy(
        export=draw(st.sampled_from([(), EXPORT_ALL, (EVERY_THREE,), (THE_BEST,)])),
        keep=draw(st.sampled_from(KEEPS)),
    )
    if policy.export:
        policy = replace(policy, publish=draw(st.sampled_from([(), (COPY,), (KEEP_ONE_COPY,)])))
    states = st.sampled_from(CheckpointState)
    return observe(
        *(view(step, draw(states), loss=draw(st.floats(0, 1))) for step in draw(STEPS)),
        policy=policy,
        requests=tuple(draw(st.lists(REQUESTS, max_size=2))),
    )


@given(world=worlds(), doomed=st.sets(st.sampled_from(ActionKind)))
@settings(max_examples=100, deadline=None)
def test_doing_what_the_plan_says_comes_to_rest(
    world: Observation, doomed: set[ActionKind]
) -> None:
    done = settle(world, lambda action: action.kind in doomed)
    assert plan(done, now=0.0) == plan(done, now=0.0)
    assert plan(done, now=1e9).actions == ()


@given(world=worlds())
@settings(max_examples=100, deadline=None)
def test_once_at_rest_everything_that_was_wanted_is_there(world: Observation) -> None:
    done = settle(world, lambda _: False)
    assert all(c.state is VERIFIED for c in done.readable())
    made = {(export.name, export.step) for export in done.exports}
    for checkpoint in done.readable():
        for policy in world.policy.export:
            if policy.every_steps and checkpoint.step % policy.every_steps == 0:
                assert (policy.name, checkpoint.step) in made
    asked = {(r.export.name, r.step) for r in world.requests if r.export}
    there = {c.step for c in world.readable()}
    assert {(name, step) for name, step in asked if step in there} <= made


@given(world=worlds(), doomed=st.sets(st.sampled_from(ActionKind)))
@settings(max_examples=100, deadline=None)
def test_nothing_is_purged_without_its_required_copy(
    world: Observation, doomed: set[ActionKind]
) -> None:
    done = settle(world, lambda action: action.kind in doomed)
    succeeded = {r.action.title for r in done.records.values() if r.state is ActionState.SUCCEEDED}
    before = {c.step for c in world.readable()}
    purged = before - {c.step for c in done.readable()}
    for step in purged:
        for policy in world.policy.export:
            if world.policy.publish and policy.every_steps and step % policy.every_steps == 0:
                assert f"publish step-{step} hf to /copies" in succeeded
    assert len(before - purged) >= min(2, len(before))


@given(world=worlds())
@settings(max_examples=100, deadline=None)
def test_every_planned_action_is_for_a_readable_checkpoint_and_planned_once(
    world: Observation,
) -> None:
    planned = plan(world, now=0.0)
    contents = {(c.step, c.manifest.content_id) for c in world.readable() if c.manifest}
    assert {(a.step, a.source_id) for a in planned.actions} <= contents
    assert len({a.key for a in planned.actions}) == len(planned.actions)
    assert [v.step for v in planned.verdicts] == [c.step for c in world.readable()]


@given(world=worlds())
@settings(max_examples=50, deadline=None)
def test_losing_every_record_loses_no_work_and_no_checkpoint(world: Observation) -> None:
    done = settle(world, lambda _: False)
    unknown = tuple(
        replace(c, state=COMMITTED) if c.state is VERIFIED else c for c in done.checkpoints
    )
    forgetful = settle(replace(done, checkpoints=unknown, records={}), lambda _: False)
    assert forgetful.exports == done.exports
    assert {c.step for c in forgetful.readable()} == {c.step for c in done.readable()}
