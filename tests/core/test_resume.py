"""Which step a run resumes from, and what it says of the ones it passes over."""

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.observation import READABLE, CheckpointView
from ray_ckpt.core.resume import plan_resume

OWN, OTHER = "llama-a1", "llama-b2"
STATES = st.sampled_from(CheckpointState)


def view(
    step: int, state: CheckpointState = CheckpointState.VERIFIED, problem: str | None = None
) -> CheckpointView:
    return CheckpointView(step=step, state=state, problem=problem)


def test_the_newest_readable_step_is_chosen() -> None:
    plan = plan_resume([view(100), view(300, CheckpointState.COMMITTED), view(200)])
    assert (plan.step, plan.reason, plan.skipped) == (300, "newest committed checkpoint", ())


def test_an_empty_root_starts_from_scratch() -> None:
    plan = plan_resume([])
    assert (plan.step, plan.skipped) == (None, ())
    assert "no committed checkpoint" in plan.reason
    assert plan.refusal is None


def test_newer_steps_that_cannot_be_used_are_named_newest_first() -> None:
    plan = plan_resume(
        [
            view(100),
            view(200, CheckpointState.FOREIGN, "the folder holds no manifest"),
            view(300, CheckpointState.COMMITTED, "__0_0.distcp is missing"),
            view(400, CheckpointState.QUARANTINED),
        ]
    )
    assert plan.step == 100
    assert plan.skipped == (
        (400, "quarantined"),
        (300, "committed: __0_0.distcp is missing"),
        (200, "foreign: the folder holds no manifest"),
    )


def test_what_a_person_threw_away_is_not_worth_a_word() -> None:
    plan = plan_resume([view(1), view(2, CheckpointState.TRASHED), view(3, CheckpointState.PURGED)])
    assert (plan.step, plan.skipped) == (1, ())


def test_only_damaged_steps_start_a_new_run_that_says_why() -> None:
    plan = plan_resume([view(5, CheckpointState.COMMITTED, "__0_0.distcp is missing")])
    assert plan.step is None
    assert plan.skipped == ((5, "committed: __0_0.distcp is missing"),)


def of_run(step: int, run_id: str, *, adopted: bool = False) -> CheckpointView:
    lineage = Lineage(run_id=run_id, adopted=adopted)
    manifest = Manifest(step=step, save_id="a", created_at="", lineage=lineage, files=())
    return replace(view(step), manifest=manifest)


def test_nobody_guesses_between_two_runs() -> None:
    """Scenario 13: a higher step of another run lies in the root."""
    views = [of_run(500, OWN), of_run(900, OTHER)]
    plan = plan_resume(views, run_id=OWN)
    assert plan.step is None
    assert plan.refusal == (
        f"step-900 was saved by run {OTHER}, but this root is of run {OWN}, whose newest is "
        "step-500: say which one, load(step=...)"
    )
    assert plan_resume(views, run_id=OTHER).step == 900


def test_steps_of_a_run_whose_name_was_lost_are_gone_on_from() -> None:
    """Nothing of its own name is here, or what is here is newer."""
    assert plan_resume([of_run(500, OTHER)], run_id=OWN).step == 500
    assert plan_resume([of_run(500, OTHER), of_run(600, OWN)], run_id=OWN).step == 600


def test_a_step_that_somebody_has_adopted_is_the_runs_own() -> None:
    assert plan_resume([of_run(5, OWN), of_run(9, "", adopted=True)], run_id=OWN).step == 9


def test_a_step_that_was_saved_anew_counts_although_the_old_one_is_in_quarantine() -> None:
    plan = plan_resume([view(5, CheckpointState.QUARANTINED), view(5, CheckpointState.COMMITTED)])
    assert plan.step == 5


@given(states=st.lists(st.tuples(STATES, st.booleans()), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_choice_is_the_newest_usable_one_whatever_the_order(
    states: list[tuple[CheckpointState, bool]],
) -> None:
    views = [
        view(step, state, "damaged" if is_damaged else None)
        for step, (state, is_damaged) in enumerate(states)
    ]
    usable = [v.step for v in views if v.state in READABLE and v.problem is None]
    for order in itertools.islice(itertools.permutations(views), 4):
        plan = plan_resume(order)
        assert plan.step == max(usable, default=None)
        assert all(step > (-1 if plan.step is None else plan.step) for step, _ in plan.skipped)
