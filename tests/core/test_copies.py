"""Which copies their destination's policy lets go, and that none goes twice or for nothing."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import copies, proof_of, retire_action
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.copy_states import COPIED_AT
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import publish_action
from tests.core.worlds import (
    COPY,
    EXPORT_ALL,
    HF,
    KEEP_TWO,
    VERIFIED,
    after_success,
    observe,
    titles,
    view,
    with_export,
    with_record,
)


def policy(keep: KeepCopies | None) -> LifecyclePolicy:
    return LifecyclePolicy(export=EXPORT_ALL, publish=(replace(COPY, keep=keep),))


def copied(*views: CheckpointView, keep: KeepCopies | None) -> Observation:
    """These steps, each exported and copied at as many seconds as its number."""
    observed = observe(*views, policy=policy(keep))
    for v in views:
        observed = with_export(observed, v, "hf")
        observed = with_record(
            observed, copy_of(v.step), ActionState.SUCCEEDED, changed_at=float(v.step)
        )
    return observed


def copy_of(step: int) -> Action:
    return publish_action(view(step), HF, "/copies")


def there(observed: Observation) -> set[int]:
    return {record.action.step for record in copies(observed)}


def test_copies_that_their_destination_does_not_keep_are_retired() -> None:
    observed = copied(*map(view, (1, 2, 3, 4)), keep=KeepCopies(latest=2, every_steps=2))
    (planned,) = plan(observed, now=0.0).planned
    assert planned.action.title == "retire step-1 hf at /copies"
    assert planned.reason == "at /copies kept by none of: latest 2, every 2 steps"


def test_without_keep_every_copy_stays() -> None:
    assert titles(copied(*map(view, (1, 2, 3, 4)), keep=None)) == []


def test_the_newest_copy_stays_whatever_the_policy_says() -> None:
    observed = copied(*map(view, (1, 2, 3)), keep=KeepCopies(every_steps=1000))
    assert titles(observed) == ["retire step-1 hf at /copies", "retire step-2 hf at /copies"]


def test_a_copy_whose_checkpoint_is_gone_is_retired_all_the_same() -> None:
    observed = copied(*map(view, (1, 2)), keep=KeepCopies(latest=1))
    gone = replace(observed.checkpoints[0], state=CheckpointState.PURGED)
    observed = replace(observed, checkpoints=(gone, observed.checkpoints[1]))
    assert titles(observed) == ["retire step-1 hf at /copies"]


def test_a_retired_copy_is_not_made_again_and_does_not_hold_its_step() -> None:
    observed = copied(*map(view, (1, 2, 3)), keep=KeepCopies(latest=2))
    (retire,) = plan(observed, now=0.0).actions
    observed = after_success(observed, retire)
    assert there(observed) == {2, 3}
    assert titles(observed) == []
    stricter = replace(observed, policy=replace(observed.policy, keep=KEEP_TWO))
    assert titles(stricter) == ["purge step-1"]


def test_a_copy_that_was_made_anew_is_there_again() -> None:
    observed = copied(*map(view, (1, 2)), keep=KeepCopies(latest=1))
    observed = after_success(observed, retire_action(copy_of(1)))
    anew = with_record(observed, copy_of(1), ActionState.SUCCEEDED, changed_at=99.0)
    assert there(observed) == {2}
    assert there(anew) == {1, 2}
    assert titles(anew) == ["retire step-1 hf at /copies"]


def test_a_pinned_step_keeps_its_copies() -> None:
    observed = copied(view(1, VERIFIED, "paper"), view(2), keep=KeepCopies(latest=1))
    assert titles(observed) == []


def test_a_copy_that_is_asked_for_stays_while_it_is() -> None:
    observed = copied(view(1), view(2), keep=KeepCopies(latest=1))
    asked = Request(step=1, export=HF, destination="/copies")
    assert titles(replace(observed, requests=(asked,))) == []


def test_a_copy_waits_for_the_removal_of_the_one_before() -> None:
    asked = Request(step=1, export=HF, destination="/copies")
    observed = with_export(observe(view(1), requests=(asked,)), view(1), "hf")
    observed = with_record(observed, retire_action(copy_of(1)), ActionState.RUNNING)
    (planned,) = plan(observed, now=0.0).planned
    assert planned.not_now == "after retire step-1 hf at /copies"


def test_the_policy_of_a_place_or_a_request_says_what_proves_a_copy() -> None:
    observed = copied(view(1), keep=None)
    assert proof_of(copy_of(1), observed) == "sizes"
    strict = LifecyclePolicy(export=EXPORT_ALL, publish=(replace(COPY, verify="digests"),))
    assert proof_of(copy_of(1), replace(observed, policy=strict)) == "digests"
    elsewhere = publish_action(view(1), HF, "/elsewhere")
    assert proof_of(elsewhere, replace(observed, policy=strict)) == "sizes"
    asked = Request(step=1, export=HF, destination="/elsewhere", verify="digests")
    assert proof_of(elsewhere, replace(observed, requests=(asked,))) == "digests"
    assert proof_of(copy_of(1), replace(observed, requests=(asked,))) == "sizes"


def test_copies_made_elsewhere_or_of_other_exports_are_left_alone() -> None:
    observed = copied(view(1), view(2), keep=KeepCopies(latest=1))
    mine = publish_action(view(1), replace(HF, name="mine"), "/copies")
    elsewhere = publish_action(view(1), HF, "/elsewhere")
    for action in (mine, elsewhere):
        observed = with_record(observed, action, ActionState.SUCCEEDED)
    assert titles(observed) == ["retire step-1 hf at /copies"]


@given(
    steps=st.lists(st.integers(1, 30), unique=True, min_size=1, max_size=8),
    latest=st.none() | st.integers(1, 4),
    every_steps=st.none() | st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_what_is_retired_leaves_the_newest_and_all_that_is_kept_and_then_rests(
    steps: list[int], latest: int | None, every_steps: int | None
) -> None:
    keep = KeepCopies(latest=latest, every_steps=every_steps) if latest or every_steps else None
    observed = copied(*map(view, steps), keep=keep)
    for action in plan(observed, now=0.0).actions:
        observed = after_success(observed, action)
    assert plan(observed, now=0.0).actions == ()
    left = there(observed)
    assert max(steps) in left
    if keep is None:
        assert left == set(steps)
    assert set(sorted(steps)[-latest:] if latest else ()) <= left
    assert {s for s in steps if every_steps and s % every_steps == 0} <= left


def test_a_record_of_a_retire_names_the_copy_that_it_removed() -> None:
    observed = after_success(copied(view(1), view(2), keep=None), retire_action(copy_of(1)))
    assert observed.records[retire_action(copy_of(1)).key].result == {COPIED_AT: 1.0}
