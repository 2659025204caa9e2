"""Old steps are read again, one at a time, when there is nothing else to do."""

from dataclasses import replace

import pytest

from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy, VerifyPolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import scrub_action, verify_action
from tests.core.worlds import COMMITTED, observe, titles, view, with_record

DAY_S = 86400.0
DAILY = LifecyclePolicy(verify=VerifyPolicy(scrub_every_s=DAY_S))


def verified(*steps: int, policy: LifecyclePolicy = DAILY) -> Observation:
    """These steps, each verified at as many seconds as its number."""
    observed = observe(*(view(step) for step in steps), policy=policy)
    for step in steps:
        action = verify_action(view(step))
        observed = with_record(observed, action, ActionState.SUCCEEDED, changed_at=float(step))
    return observed


def scrubbed(observed: Observation, step: int, state: ActionState, at: float) -> Observation:
    return with_record(observed, scrub_action(view(step)), state, changed_at=at)


def test_a_step_is_scrubbed_once_its_last_verify_is_old_enough() -> None:
    observed = verified(5)
    assert titles(observed, now=DAY_S + 4) == []
    assert titles(observed, now=DAY_S + 5) == ["scrub step-5"]
    (planned,) = plan(observed, now=DAY_S + 5).planned
    assert planned.reason == (
        "last verified 1970-01-01T00:00:05+00:00, verify.scrub_every_s is 86400"
    )


def test_nothing_is_scrubbed_unless_the_policy_asks() -> None:
    assert titles(verified(5, policy=LifecyclePolicy()), now=1e9) == []


def test_the_longest_unread_comes_first_and_one_at_a_time() -> None:
    observed = verified(5, 7, 9)
    assert titles(observed, now=2 * DAY_S) == ["scrub step-5"]
    observed = scrubbed(observed, 5, ActionState.SUCCEEDED, 2 * DAY_S)
    assert titles(observed, now=2 * DAY_S) == ["scrub step-7"]
    running = scrubbed(observed, 7, ActionState.RUNNING, 2 * DAY_S)
    assert titles(running, now=2 * DAY_S) == []


def test_the_next_round_begins_when_the_last_scrub_is_old() -> None:
    observed = scrubbed(verified(5), 5, ActionState.SUCCEEDED, 2 * DAY_S)
    assert titles(observed, now=3 * DAY_S - 1) == []
    assert titles(observed, now=3 * DAY_S) == ["scrub step-5"]


def test_a_scrub_waits_for_all_other_work() -> None:
    observed = verified(5)
    busy = replace(observed, checkpoints=(*observed.checkpoints, view(8, COMMITTED)))
    assert titles(busy, now=1e6) == ["verify step-8"]
    assert [p.not_now for p in plan(busy, now=1e6).planned] == [None, "after all other work"]
    running = with_record(busy, verify_action(view(8)), ActionState.RUNNING)
    assert titles(running, now=1e6) == []


@pytest.mark.parametrize("state", [ActionState.DEAD, ActionState.RETRY_WAIT])
def test_a_scrub_that_fails_takes_no_verdict_back_and_does_not_block_the_others(
    state: ActionState,
) -> None:
    observed = scrubbed(verified(5, 7), 5, state, 2 * DAY_S)
    assert titles(observed, now=2 * DAY_S) == ["scrub step-7"]
    assert plan(observed, now=0.0).verdicts[0].keep


def test_what_is_not_verified_or_about_to_go_is_not_scrubbed() -> None:
    policy = replace(DAILY, keep=KeepConfig(latest=2))
    observed = verified(5, 7, 9, policy=policy)
    assert titles(observed, now=1e6) == ["purge step-5"]
    assert [p.action.title for p in plan(observed, now=1e6).planned] == [
        "purge step-5",
        "scrub step-7",
    ]
