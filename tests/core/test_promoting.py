"""Which copy a name is to lead to, and when it has to move."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import retire_action
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import LifecyclePolicy, PublishPolicy
from ray_ckpt.core.promoting import EPOCH, METRICS, NON_FINITE, promote_action
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import overtaken
from ray_ckpt.core.wanted import publish_action
from tests.core.worlds import (
    COPY,
    EXPORT_ALL,
    HF,
    after_success,
    manifest,
    observe,
    titles,
    view,
    with_export,
    with_record,
)

LATEST = replace(COPY, promote="latest")
BEST = replace(COPY, promote="best", promote_by="best")


def copy_of(step: int) -> Action:
    return publish_action(view(step), HF, "/copies")


def copied(losses: dict[int, float], publish: PublishPolicy = LATEST) -> Observation:
    """These steps, each exported and copied, with their losses."""
    policy = LifecyclePolicy(export=EXPORT_ALL, publish=(publish,))
    observed = observe(*map(view, losses), policy=policy)
    for step, loss in losses.items():
        observed = with_export(observed, view(step), "hf")
        observed = with_copy(observed, step, loss=loss)
    return observed


def with_copy(observed: Observation, step: int, *, loss: float, sick: int = 0) -> Observation:
    result = {METRICS: {"loss": loss}, NON_FINITE: sick}
    return with_record(
        observed, copy_of(step), ActionState.SUCCEEDED, changed_at=float(step), result=result
    )


def promoted(observed: Observation) -> Observation:
    """The same once all is done that is planned."""
    while actions := plan(observed, now=0.0).actions:
        observed = after_success(observed, actions[0])
    return observed


def test_the_newest_copy_is_promoted_once_it_is_there() -> None:
    observed = copied({1: 1.0, 2: 9.0})
    (planned,) = plan(observed, now=0.0).planned
    assert planned.action.title == "promote step-2 hf to latest at /copies"
    assert planned.reason == "the newest copy there"
    assert titles(promoted(observed)) == []
    more = replace(observed, checkpoints=(*observed.checkpoints, view(3)))
    assert "promote step-3 hf to latest at /copies" not in titles(more), "it is not copied yet"


def test_the_chain_goes_from_the_save_to_the_promote() -> None:
    policy = LifecyclePolicy(export=EXPORT_ALL, publish=(LATEST,))
    observed = observe(view(5, CheckpointState.COMMITTED), policy=policy)
    rounds: list[str] = []
    while actions := plan(observed, now=0.0).actions:
        rounds.append(actions[0].title)
        observed = after_success(observed, actions[0])
    assert rounds == [
        "verify step-5",
        "export step-5 hf",
        "publish step-5 hf to /copies",
        "promote step-5 hf to latest at /copies",
    ]


def test_the_best_copy_is_promoted_and_may_be_an_older_one() -> None:
    observed = promoted(copied({1: 2.0, 2: 1.0, 3: 3.0}, BEST))
    newest = replace(
        observed, policy=replace(observed.policy, publish=(replace(BEST, order="max"),))
    )
    assert titles(newest) == ["promote step-3 hf to best at /copies"]
    back = replace(promoted(newest), policy=observed.policy)
    assert titles(back) == ["promote step-2 hf to best at /copies"], "although it was before"
    assert titles(promoted(back)) == []


def test_what_a_name_leads_to_is_what_the_last_manager_said_whatever_its_clock() -> None:
    observed = copied({1: 1.0, 2: 2.0})
    for step, epoch, at in ((1, 1, 900.0), (2, 2, 100.0)):
        promote = promote_action(copy_of(step), "latest")
        done = {EPOCH: epoch}
        observed = with_record(observed, promote, ActionState.SUCCEEDED, changed_at=at, result=done)
    assert titles(observed) == []


def test_a_step_with_nan_is_never_promoted() -> None:
    assert titles(with_copy(copied({1: 1.0, 2: 2.0}), 2, loss=2.0, sick=3)) == [
        "promote step-1 hf to latest at /copies"
    ]
    sick = replace(view(2), manifest=replace(manifest(2), non_finite=("w",)))
    observed = replace(copied({1: 1.0, 2: 2.0}), checkpoints=(view(1), sick))
    assert "promote step-1 hf to latest at /copies" in titles(observed)
    assert "promote step-2 hf to latest at /copies" not in titles(observed)


def test_an_export_that_was_forced_is_never_promoted() -> None:
    forced = publish_action(view(3), ExportSpec(name="hf", allow_non_finite=True), "/copies")
    observed = with_record(copied({1: 1.0}), forced, ActionState.SUCCEEDED, changed_at=9.0)
    assert titles(observed) == ["promote step-1 hf to latest at /copies"]


@pytest.mark.parametrize("state", [None, *ActionState])
def test_a_copy_that_is_being_removed_is_not_promoted(state: ActionState | None) -> None:
    observed = copied({1: 1.0, 2: 2.0})
    if state is not None:
        observed = with_record(observed, retire_action(copy_of(2)), state)
    goes_on = state in (None, ActionState.SUCCEEDED, *GIVEN_UP)
    assert titles(observed)[0] == f"promote step-{2 if goes_on else 1} hf to latest at /copies"


def test_a_promoted_copy_is_not_retired_while_a_name_leads_to_it() -> None:
    best = replace(BEST, keep=KeepCopies(latest=1))
    observed = promoted(copied({1: 1.0, 2: 2.0, 3: 3.0}, best))
    gone = [r.action.step for r in observed.records.values() if r.action.kind is ActionKind.RETIRE]
    assert gone == [2]
    better = with_copy(observed, 4, loss=0.5)
    better = replace(better, checkpoints=(*observed.checkpoints, view(4)))
    better = with_export(better, view(4), "hf")
    first, *others = titles(better)
    assert first == "promote step-4 hf to best at /copies"
    assert "retire step-1 hf at /copies" not in others, "the name still leads to it"
    assert "retire step-3 hf at /copies" in others
    after = after_success(better, plan(better, now=0.0).actions[0])
    assert "retire step-1 hf at /copies" in titles(after)


def test_a_name_that_a_policy_no_longer_moves_keeps_its_copy() -> None:
    keep = replace(LATEST, keep=KeepCopies(latest=1))
    observed = promoted(copied({1: 1.0}, keep))
    observed = with_copy(observed, 2, loss=2.0)
    observed = with_export(replace(observed, checkpoints=(view(1), view(2))), view(2), "hf")
    silent = replace(keep, promote=None)
    observed = replace(observed, policy=replace(observed.policy, publish=(silent,)))
    assert titles(observed) == []


def test_a_copy_whose_checkpoint_is_gone_can_be_promoted() -> None:
    observed = replace(copied({1: 1.0}), checkpoints=())
    assert titles(observed) == ["promote step-1 hf to latest at /copies"]
    promote = promote_action(copy_of(1), "latest")
    waiting = with_record(observed, promote, ActionState.PENDING)
    assert overtaken(waiting, now=9.0) == []


def test_a_metric_that_no_step_reports_is_a_problem() -> None:
    observed = copied({1: 1.0}, replace(BEST, metric="acc"))
    assert "best at /copies: best by acc" in plan(observed, now=0.0).problems[0]
    assert titles(observed) == []


@given(
    losses=st.dictionaries(st.integers(1, 9), st.floats(0, 1), min_size=1),
    publish=st.sampled_from([LATEST, BEST, replace(BEST, keep=KeepCopies(latest=1))]),
)
@settings(max_examples=100, deadline=None)
def test_a_name_leads_to_the_newest_or_the_best_and_then_rests(
    losses: dict[int, float], publish: PublishPolicy
) -> None:
    observed = promoted(copied(losses, publish))
    moves = [r.action.step for r in observed.records.values() if r.action.pointer]
    best = min(losses, key=lambda step: (losses[step], -step))
    assert moves == [max(losses) if publish is LATEST else best]
    retired = [
        r.action.step for r in observed.records.values() if r.action.kind is ActionKind.RETIRE
    ]
    assert not set(moves) & set(retired)
