"""Checkpoints that are copied themselves: which, in what order, and what that means for purges."""

from dataclasses import replace

import pytest

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import NODE, nodes_of_bytes
from ray_ckpt.core.config import build
from ray_ckpt.core.copies import folder_of, retire_action
from ray_ckpt.core.copy_policy import CopiedSteps, KeepCopies, PublishPolicy
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import Observation, Request
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import obeyed, overtaken
from ray_ckpt.core.wanted import publish_action, verify_action
from tests.core.worlds import (
    COMMITTED,
    COPY,
    EXPORT_ALL,
    KEEP_TWO,
    after_success,
    manifest,
    observe,
    titles,
    view,
    with_record,
)

BACKUP = PublishPolicy(checkpoint=CopiedSteps(every_steps=2), to="/backup")
BACKED_UP = LifecyclePolicy(publish=(BACKUP,))


def copy_of(step: int) -> Action:
    return publish_action(view(step), None, "/backup")


def copied(observed: Observation, *steps: int) -> Observation:
    for step in steps:
        observed = with_record(
            observed, copy_of(step), ActionState.SUCCEEDED, changed_at=float(step)
        )
    return observed


def test_a_step_is_verified_and_then_copied_without_an_export() -> None:
    observed = observe(view(2, COMMITTED), policy=BACKED_UP)
    rounds: list[str] = []
    while actions := plan(observed, now=0.0).actions:
        rounds.append(actions[0].title)
        observed = after_success(observed, actions[0])
    assert rounds == ["verify step-2", "publish step-2 checkpoint to /backup"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (CopiedSteps(every_steps=2), [2, 4, 5]),
        (CopiedSteps(every_steps=2, last_step=False), [2, 4]),
        (CopiedSteps(steps=(1,)), [1, 5]),
    ],
)
def test_the_policy_says_which_steps(which: CopiedSteps, expected: list[int]) -> None:
    last = replace(view(5), manifest=manifest(5, is_last_step=True))
    policy = LifecyclePolicy(publish=(replace(BACKUP, checkpoint=which),))
    observed = observe(*map(view, (1, 2, 3, 4)), last, policy=policy)
    assert titles(observed) == [f"publish step-{n} checkpoint to /backup" for n in expected]


def test_the_plan_says_which_line_asks_for_it() -> None:
    (planned,) = plan(observe(view(2), policy=BACKED_UP), now=0.0).planned
    assert planned.reason == "every 2 steps: the checkpoint is copied there, required"


def test_an_unhealthy_step_is_copied_only_if_somebody_asks() -> None:
    broken = replace(view(2), manifest=replace(manifest(2), non_finite=("w",)))
    observed = observe(broken, policy=BACKED_UP)
    assert titles(observed) == []
    asked = replace(observed, requests=(Request(step=2, destination="/mine"),))
    assert titles(asked) == ["publish step-2 checkpoint to /mine"]


def test_a_step_is_kept_until_its_required_copy_was_made() -> None:
    policy = replace(BACKED_UP, keep=KEEP_TWO)
    observed = observe(*map(view, (2, 3, 4, 5)), policy=policy)
    assert "purge step-2" not in titles(observed)
    assert "purge step-2" in titles(copied(observed, 2))
    optional = replace(policy, publish=(replace(BACKUP, required=False),))
    dead = with_record(replace(observed, policy=optional), copy_of(2), ActionState.DEAD)
    assert "purge step-2" in titles(dead)
    required = replace(dead, policy=policy)
    assert "purge step-2" not in titles(required)


def test_copies_that_are_not_kept_there_are_retired() -> None:
    policy = replace(BACKED_UP, publish=(replace(BACKUP, keep=KeepCopies(latest=1)),))
    observed = copied(observe(*map(view, (2, 4)), policy=policy), 2, 4)
    assert titles(observed) == ["retire step-2 checkpoint at /backup"]
    assert titles(after_success(observed, retire_action(copy_of(2)))) == []
    asked = replace(observed, requests=(Request(step=2, destination="/backup"),))
    assert titles(asked) == []


def test_of_steps_that_wait_the_newest_is_copied_where_it_is_so_wished() -> None:
    policy = replace(BACKED_UP, publish=(replace(BACKUP, when_behind="newest"),))
    observed = observe(*map(view, (2, 4, 6)), policy=policy)
    assert titles(observed) == ["publish step-6 checkpoint to /backup"]


def test_a_request_is_settled_once_its_copy_was_made() -> None:
    request = Request(step=1, destination="/backup")
    observed = observe(view(1), requests=(request,))
    assert plan(observed, now=0.0).settled == ()
    assert plan(copied(observed, 1), now=0.0).settled == (request,)
    assert request.title == "checkpoint of step-1 to /backup"


def test_exports_and_checkpoints_may_go_to_one_place() -> None:
    both = LifecyclePolicy(export=EXPORT_ALL, publish=(COPY, replace(BACKUP, to=COPY.to)))
    observed = observe(view(2), policy=both)
    assert titles(observed) == ["publish step-2 checkpoint to /copies", "export step-2 hf"]


def test_a_copy_that_is_retried_needs_no_export() -> None:
    from ray_ckpt.core.observation import Command

    observed = with_record(observe(view(2)), copy_of(2), ActionState.DEAD)
    command = Command(verb="retry", action=copy_of(2), by="me")
    (record,) = obeyed(replace(observed, commands=(command,)), now=1.0)
    assert (record.action, record.state) == (copy_of(2), ActionState.PENDING)
    again = replace(observed, records={copy_of(2).key: record})
    assert titles(again) == ["publish step-2 checkpoint to /backup"]


def test_a_copy_of_a_step_that_went_is_not_waited_for() -> None:
    observed = with_record(observe(view(4)), copy_of(2), ActionState.RETRY_WAIT)
    (record,) = overtaken(observed, now=1.0)
    assert record.state is ActionState.CANCELLED


def test_it_goes_where_the_step_was_verified() -> None:
    record = ActionRecord(action=verify_action(view(2)), result={NODE: "n1"})
    records = {record.action.key: record}
    assert nodes_of_bytes([copy_of(2)], records) == {copy_of(2).key: "n1"}


def test_it_lies_there_as_here() -> None:
    assert folder_of(copy_of(2)) == "step-2"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "copies exports of one name, or checkpoints"),
        ({"export": "hf", "checkpoint": {}}, "copies exports of one name, or checkpoints"),
        ({"checkpoint": {"last_step": False}}, "no checkpoint is named"),
        ({"checkpoint": {"every_steps": 0}}, "at least 1, got 0"),
        ({"checkpoint": {"steps": [-1]}}, "at least 0, got -1"),
        ({"checkpoint": {}, "promote": "latest"}, "this entry copies checkpoints"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(PublishPolicy, {"to": "/backup", **values}, where="policy.toml")


def test_no_checkpoint_goes_to_the_hub() -> None:
    with pytest.raises(ConfigError, match="no repository on the Hub") as caught:
        PublishPolicy(checkpoint=CopiedSteps(), to="hf://org/repo")
    assert "s3://bucket/prefix" in caught.value.do
