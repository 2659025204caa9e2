"""What two looks at a run differ in, as events."""

import itertools
from dataclasses import replace

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import TransientError, UsageError
from ray_ckpt.core.events import Event, utc
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.history import Snapshot, changes, snapshot_of
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.observation import CheckpointView, ExportView, Observation, Request
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.reconcile import verify_action

AT = utc(0.0)
COMMITTED, VERIFIED, TRASHED, FOREIGN, SAVING, QUARANTINED, ABANDONED = (
    CheckpointState.COMMITTED,
    CheckpointState.VERIFIED,
    CheckpointState.TRASHED,
    CheckpointState.FOREIGN,
    CheckpointState.SAVING,
    CheckpointState.QUARANTINED,
    CheckpointState.ABANDONED,
)


def manifest(save_id: str, content: str = "a") -> Manifest:
    entry = FileEntry(path="w", size_bytes=1, digest=f"sha256:{content}")
    lineage = Lineage(run_id="run")
    return Manifest(step=5, save_id=save_id, created_at="", lineage=lineage, files=(entry,))


def view(state: CheckpointState, save_id: str = "one") -> CheckpointView:
    return CheckpointView(step=5, state=state, manifest=manifest(save_id))


def bare(state: CheckpointState, problem: str = "no manifest") -> CheckpointView:
    return CheckpointView(step=5, state=state, problem=problem)


def look(*checkpoints: CheckpointView, **more: object) -> Observation:
    seen = Observation(run_id="run", policy=LifecyclePolicy(), checkpoints=checkpoints)
    return replace(seen, **more)


def between(before: Observation, after: Observation, *, token: str = "t1") -> list[Event]:
    old, new = snapshot_of(before, token=token), snapshot_of(after, token="t2")
    return changes(old, new, at=AT, who="manager epoch 7")


def told(before: Observation, after: Observation) -> list[tuple[str, str]]:
    return [(event.what, event.text) for event in between(before, after)]


@pytest.mark.parametrize(
    ("before", "after", "what", "text"),
    [
        ([], [view(COMMITTED)], "checkpoint.committed", "step-5 is committed"),
        (
            [view(COMMITTED)],
            [view(VERIFIED)],
            "checkpoint.verified",
            "step-5: committed -> verified",
        ),
        ([view(VERIFIED)], [view(TRASHED)], "checkpoint.trashed", "step-5: verified -> trashed"),
        ([view(TRASHED)], [], "checkpoint.purged", "step-5: trashed -> purged"),
        (
            [view(TRASHED)],
            [view(COMMITTED)],
            "checkpoint.committed",
            "step-5: trashed -> committed",
        ),
        (
            [view(VERIFIED)],
            [],
            "checkpoint.missing",
            "step-5: verified -> missing; somebody removed it",
        ),
        (
            [bare(SAVING)],
            [view(COMMITTED)],
            "checkpoint.committed",
            "step-5: saving -> committed",
        ),
        (
            [bare(FOREIGN)],
            [view(COMMITTED)],
            "checkpoint.committed",
            "step-5: foreign -> committed",
        ),
        (
            [view(COMMITTED)],
            [bare(QUARANTINED, "unreadable\nin detail")],
            "checkpoint.quarantined",
            "step-5: committed -> quarantined: unreadable",
        ),
        (
            [view(VERIFIED)],
            [view(COMMITTED)],
            "checkpoint.committed",
            "step-5: verified -> committed; somebody else changed it",
        ),
    ],
)
def test_every_move_of_a_checkpoint_is_one_event(
    before: list[CheckpointView], after: list[CheckpointView], what: str, text: str
) -> None:
    [event] = between(look(*before), look(*after))
    assert (event.what, event.text) == (what, text)
    assert (event.step, event.who, event.at) == (5, "manager epoch 7", AT)


def test_nothing_new_is_no_event() -> None:
    assert between(look(view(COMMITTED)), look(view(COMMITTED))) == []


def test_two_saves_of_one_step_are_two_checkpoints() -> None:
    before = look(view(VERIFIED, "one"))
    after = look(view(TRASHED, "one"), view(COMMITTED, "two"))
    assert told(before, after) == [
        ("checkpoint.committed", "step-5 is committed"),
        ("checkpoint.trashed", "step-5: verified -> trashed"),
    ]


def test_a_save_in_two_places_for_a_moment_is_the_one_readers_see() -> None:
    both = look(view(TRASHED), view(COMMITTED))
    assert between(look(view(COMMITTED)), both) == []


def test_damage_is_told_and_so_is_its_end() -> None:
    damaged = replace(view(VERIFIED), problem="w is missing")
    assert told(look(view(VERIFIED)), look(damaged)) == [
        ("checkpoint.damaged", "step-5 is verified, but damaged: w is missing")
    ]
    assert told(look(damaged), look(view(VERIFIED))) == [
        ("checkpoint.verified", "step-5 is verified, and whole again")
    ]


def test_how_far_a_staged_save_has_come_is_no_damage() -> None:
    staged = replace(view(SAVING), problem="staged on 2 nodes, 0 of 2 brought here")
    brought = replace(staged, problem="staged on 2 nodes, 1 of 2 brought here")
    lost = replace(view(ABANDONED), problem="node lost")
    assert told(look(staged), look(brought)) == [
        ("checkpoint.saving", "step-5 is saving: staged on 2 nodes, 1 of 2 brought here")
    ]
    assert told(look(brought), look(lost)) == [
        ("checkpoint.abandoned", "step-5: saving -> abandoned: node lost")
    ]
    assert told(look(lost), look()) == [("checkpoint.purged", "step-5: abandoned -> purged")]


def test_every_move_of_an_action_is_told_with_attempts_and_error() -> None:
    pending = ActionRecord(action=verify_action(view(COMMITTED)))
    started = pending.started(1.0)
    waiting = started.failed(TransientError("slow down", "s3://b"), 2.0)
    again = waiting.started(9.0)
    dead = again.failed(UsageError("no such family"), 10.0)
    records = (pending, started, waiting, again, dead)
    looks = [look(), *(look(records={record.action.key: record}) for record in records)]
    events = [event for a, b in itertools.pairwise(looks) for event in between(a, b)]
    assert [event.text for event in events] == [
        "verify step-5: pending",
        "verify step-5: running",
        "verify step-5: retry_wait: slow down",
        "verify step-5: running, attempt 2",
        "verify step-5: dead, attempt 2: no such family",
    ]
    assert events[-1].details == {
        "from": "running",
        "to": "dead",
        "attempts": 2,
        "error_kind": "UsageError",
    }
    assert told(looks[-1], look()) == [
        (
            "action.forgotten",
            "verify step-5: its record is gone, it counts as never started",
        )
    ]


def test_exports_pins_and_requests_come_and_go() -> None:
    export = ExportView(name="hf", step=5, manifest=manifest("e"))
    request = Request(step=5, export=ExportSpec(name="hf"), destination="/copies")
    pinned = replace(view(COMMITTED), pins=(Pin(name="paper"),))
    nothing = look(view(COMMITTED))
    everything = look(pinned, exports=(export,), requests=(request,))
    assert told(nothing, everything) == [
        ("export.made", "export hf of step-5 is there"),
        ("pin.set", "step-5 is pinned as paper"),
        ("request.made", "somebody asked for hf of step-5 to /copies"),
    ]
    assert told(everything, nothing) == [
        ("export.gone", "export hf of step-5 is gone"),
        ("pin.removed", "step-5 is no longer pinned as paper"),
        ("request.settled", "settled: the request for hf of step-5 to /copies"),
    ]
    other = replace(export, manifest=manifest("e2", content="b"))
    replaced = look(view(COMMITTED), exports=(other,))
    assert told(look(view(COMMITTED), exports=(export,)), replaced) == [
        ("export.replaced", "export hf of step-5 is another one now")
    ]


def test_the_same_change_has_the_same_id_until_the_snapshot_is_replaced() -> None:
    before, after = look(view(COMMITTED)), look(view(VERIFIED))
    [first], [again], [later] = (between(before, after, token=t) for t in ("t1", "t1", "t9"))
    assert first.id == again.id
    assert first.id != later.id


def test_a_snapshot_survives_json() -> None:
    record = ActionRecord(action=verify_action(view(COMMITTED))).started(1.0)
    failed = record.failed(UsageError("no"), 2.0)
    seen = look(view(COMMITTED), bare(FOREIGN), records={record.action.key: failed})
    snapshot = snapshot_of(seen, token="t")
    assert Snapshot.from_json(snapshot.to_json()) == snapshot


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"schema": "other/1"}', b"\xff"])
def test_what_is_no_snapshot_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        Snapshot.from_json(text)


def test_an_event_survives_json() -> None:
    [event] = between(look(), look(view(COMMITTED)))
    assert Event.from_json(event.to_json()) == event
    assert "\n" not in event.to_json()
