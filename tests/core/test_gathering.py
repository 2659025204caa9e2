"""What is done with a staged save, decided from literal observations."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.draft import Draft, Ended, Node, Place
from ray_ckpt.core.errors import IntegrityError, NodeLostError, RayCkptError, StepExistsError
from ray_ckpt.core.failures import ErrorClass, may_try_again
from ray_ckpt.core.gathering import (
    abandonments,
    commit_action,
    draft_views,
    forgettable,
    free_action,
    gather_action,
    hosts_needed,
    leftovers,
)
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.settling import overtaken, unfinished
from tests.core.worlds import observe, titles, view, with_record

A, B = Node(host="a", id="0123456789"), Node(host="b")
ALL = frozenset({"x", "y", "z"})
COMMITTED = Ended(how="committed", reason="all of it was brought", at=0.0)
GIVEN_UP = Ended(how="abandoned", reason="node lost", at=0.0)


def draft(step: int = 5, *, brought: frozenset[str] = frozenset(), **changes: object) -> Draft:
    manifest = Manifest(
        step=step,
        save_id=f"save{step}",
        created_at="",
        lineage=Lineage(run_id="run"),
        files=tuple(FileEntry(path=name, size_bytes=1, digest="sha256:00") for name in "xyz"),
    )
    places = (
        Place(node=A, folder=f"/disk/save-save{step}", files=("x", "y")),
        Place(node=B, folder=f"/disk/save-save{step}", files=("z",)),
    )
    return replace(Draft(manifest=manifest, places=places, brought=brought), **changes)  # pyright: ignore[reportArgumentType]


def staged(*drafts: Draft) -> Observation:
    observed = observe()
    views = draft_views(drafts, observed.checkpoints)
    return replace(observed, drafts=drafts, checkpoints=tuple(views))


def dead(draft: Draft, node: Node | None, error: RayCkptError) -> Mapping[str, ActionRecord]:
    """The record of a gather, or without a node of the commit, that failed for good."""
    action = commit_action(draft) if node is None else gather_action(draft, node)
    failed = ActionRecord(action=action).started(0.0).failed(error, 0.0)
    if failed.state is not ActionState.DEAD:
        failed = failed.started(900.0).failed(error, 900.0)
    return {action.key: failed}


def freed(observed: Observation, draft: Draft) -> Observation:
    for node in draft.nodes:
        observed = with_record(observed, free_action(draft, node), ActionState.SUCCEEDED)
    return observed


def test_each_node_brings_its_own_part_and_only_the_whole_is_committed() -> None:
    assert titles(staged(draft())) == [
        "gather step-5 from a (node 01234567)",
        "gather step-5 from b",
    ]
    assert titles(staged(draft(brought=frozenset("z")))) == ["gather step-5 from a (node 01234567)"]
    assert titles(staged(draft(brought=ALL))) == ["commit step-5"]


def test_a_record_of_success_does_not_count_where_the_files_are_gone() -> None:
    observed = with_record(staged(draft()), gather_action(draft(), B), ActionState.SUCCEEDED)
    assert "gather step-5 from b" in titles(observed)


def test_commits_come_one_after_the_other() -> None:
    observed = staged(draft(5, brought=ALL), draft(6, brought=ALL))
    assert titles(observed) == ["commit step-5"]
    running = with_record(observed, commit_action(draft(6)), ActionState.RUNNING)
    assert titles(running) == []
    waiting = {p.action.title: p.not_now for p in plan(running, now=0.0).planned}
    assert waiting["commit step-5"] == "after commit step-6"


def test_nothing_is_brought_again_while_a_commit_takes_it_to_its_place() -> None:
    running = with_record(staged(draft()), commit_action(draft()), ActionState.RUNNING)
    assert titles(running) == []


def test_a_commit_whose_manager_died_before_it_said_so_is_said_and_nothing_is_brought_again() -> (
    None
):
    checkpoint = replace(view(5), manifest=draft().manifest)
    observed = replace(staged(draft()), checkpoints=(checkpoint,))
    assert titles(observed) == ["commit step-5"]


def test_a_commit_waits_for_who_still_brings() -> None:
    observed = staged(draft(brought=ALL))
    running = with_record(observed, gather_action(draft(), B), ActionState.RUNNING)
    (planned,) = plan(running, now=0.0).planned
    assert planned.not_now == "after gather step-5 from b"


@pytest.mark.parametrize("ended", [COMMITTED, GIVEN_UP])
def test_what_has_ended_is_removed_from_its_nodes_and_then_forgotten(ended: Ended) -> None:
    over = draft(ended=ended)
    observed = staged(over)
    assert titles(observed) == ["free step-5 on a (node 01234567)", "free step-5 on b"]
    assert forgettable(observed, now=1e9) == []
    assert titles(freed(observed, over)) == []
    assert forgettable(freed(observed, over), now=1e9) == [over]


def test_people_see_an_abandoned_save_for_the_grace_time() -> None:
    over = draft(ended=GIVEN_UP)
    observed = freed(staged(over), over)
    grace_s = observed.policy.keep.trash_grace_s
    assert forgettable(observed, now=grace_s - 1) == []
    assert forgettable(observed, now=grace_s) == [over]


def test_parts_of_an_abandoned_save_are_removed_once_nobody_brings_more() -> None:
    over = draft(ended=GIVEN_UP, brought=frozenset("x"))
    observed = staged(over)
    assert leftovers(observed) == [over]
    assert forgettable(freed(observed, over), now=1e9) == []
    running = with_record(observed, gather_action(over, A), ActionState.RUNNING)
    assert leftovers(running) == []


def test_the_bytes_of_a_checkpoint_are_never_leftovers() -> None:
    """Somebody gave the save up in the moment in which it was committed."""
    over = draft(ended=GIVEN_UP, brought=ALL)
    checkpoint = replace(view(5), manifest=over.manifest)
    observed = replace(staged(over), checkpoints=(checkpoint,))
    assert leftovers(observed) == []
    assert draft_views([over], [checkpoint]) == [checkpoint]


@pytest.mark.parametrize(
    ("node", "error", "reason"),
    [
        (
            B,
            NodeLostError("b is not there"),
            "node lost: b held 1 files of step-5, which was never",
        ),
        (A, IntegrityError("x is y"), "damaged: a (node 01234567) held 2 files of step-5"),
        (None, StepExistsError("it is there"), "step-5 is committed already, by another save"),
    ],
)
def test_a_save_is_given_up_for_what_no_further_try_can_mend(
    node: Node | None, error: RayCkptError, reason: str
) -> None:
    brought = ALL if node is None else frozenset[str]()
    observed = replace(staged(draft(brought=brought)), records=dead(draft(), node, error))
    ((given_up, why),) = abandonments(observed)
    assert given_up.step == 5
    assert why.startswith(reason)


def test_a_save_is_not_given_up_for_what_a_person_can_mend() -> None:
    observed = replace(staged(draft()), records=dead(draft(), A, RayCkptError("no key")))
    assert list(abandonments(observed)) == []


def test_a_node_that_is_gone_has_two_minutes_to_come_back() -> None:
    assert may_try_again(ErrorClass.LOST, 50, 119.0)
    assert not may_try_again(ErrorClass.LOST, 2, 121.0)


def test_a_staged_save_says_how_far_it_has_come_and_an_abandoned_one_why() -> None:
    (saving,) = staged(draft(brought=frozenset("z"))).checkpoints
    assert (saving.state, saving.problem) == (
        CheckpointState.SAVING,
        "staged on 2 nodes, 1 of 2 brought here",
    )
    (abandoned,) = staged(draft(ended=GIVEN_UP)).checkpoints
    assert (abandoned.state, abandoned.problem) == (CheckpointState.ABANDONED, "node lost")
    assert staged(draft(ended=COMMITTED)).checkpoints == ()


def test_hosts_are_needed_as_long_as_something_of_theirs_is_missing() -> None:
    assert hosts_needed(staged(draft())) == {5: ["a", "b"]}
    assert hosts_needed(staged(draft(brought=frozenset("z")))) == {5: ["a"]}
    assert hosts_needed(staged(draft(brought=ALL))) == {}


def test_what_only_other_hosts_can_do_is_not_waited_for() -> None:
    observed = staged(draft())
    both = [gather_action(draft(), node) for node in (A, B)]
    assert len(unfinished(observed, now=0.0)) == 2
    assert unfinished(observed, now=0.0, elsewhere=both) == []


def test_waiting_records_end_with_what_they_wait_for() -> None:
    gather, commit, free = (
        gather_action(draft(), B),
        commit_action(draft()),
        free_action(draft(), B),
    )

    def after(observed: Observation, *actions: object) -> dict[str, ActionState]:
        for action in (gather, commit, free):
            if action in actions:
                observed = with_record(observed, action, ActionState.RETRY_WAIT)
        return {r.action.kind: r.state for r in overtaken(observed, now=1.0)}

    done, cancelled = ActionState.SUCCEEDED, ActionState.CANCELLED
    assert after(staged(draft()), gather, commit) == {}
    assert after(staged(draft(brought=frozenset("z"))), gather) == {"gather": done}
    assert after(staged(draft(ended=COMMITTED)), gather, commit) == {"gather": done, "commit": done}
    assert after(staged(draft(ended=GIVEN_UP)), gather) == {"gather": cancelled}
    assert after(staged(), gather, commit) == {"gather": cancelled, "commit": cancelled}


def test_a_node_that_is_gone_needs_no_cleaning() -> None:
    over = draft(ended=GIVEN_UP)
    free = ActionRecord(action=free_action(over, B)).started(0.0)
    waiting = free.failed(NodeLostError("b is not there"), 0.0)
    observed = replace(staged(over), records={free.action.key: waiting})
    assert [r.state for r in overtaken(observed, now=1.0)] == [ActionState.CANCELLED]


def test_a_draft_is_read_back_as_it_was_written() -> None:
    written = draft(supersedes=((6, "other"),))
    assert Draft.from_json(written.to_json(), "here") == written


@pytest.mark.parametrize("text", [b"{", b"{}", draft().to_json().replace(b'"z"', b'"w"')])
def test_what_is_no_draft_is_told_from_one(text: bytes) -> None:
    with pytest.raises(IntegrityError, match="the draft of a save cannot be read"):
        Draft.from_json(text, "here")
