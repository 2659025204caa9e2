"""What charts and alerts are drawn from, given a literal world."""

from dataclasses import replace
from typing import Any

import pytest

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.metrics import (
    METRICS,
    OTHER,
    PHASES,
    SAVES,
    Moving,
    Sample,
    World,
    counted,
    counted_save,
    gauges,
    place_of,
    save_interval_s,
    zeros,
)
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.policy import LifecyclePolicy, PublishPolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import publish_action, purge_action, verify_action
from tests.core.worlds import (
    COMMITTED,
    COPY_EACH,
    EXPORT_ALL,
    HF,
    VERIFIED,
    manifest,
    observe,
    view,
    with_export,
    with_record,
)

NOW = 1_000_000.0


def at(step: int, seconds: float, state: CheckpointState = VERIFIED) -> CheckpointView:
    """A step that was committed that many seconds after the epoch."""
    from ray_ckpt.core.events import utc

    made = replace(manifest(step), created_at=utc(seconds))
    return CheckpointView(step=step, state=state, manifest=made)


def told(
    observed: Observation, *moving: Moving, has_ended: bool = False
) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    world = World(
        observed=observed,
        planned=plan(observed, now=NOW),
        moving=moving,
        num_problems=0,
        epoch=7,
        has_ended=has_ended,
    )
    return by_series(list(gauges(world, now=NOW)))


def by_series(samples: list[Sample]) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for sample in samples:
        series = (sample.name, *sample.labels)
        found[series] = found.get(series, 0.0) + sample.value
    return found


def test_ages_count_from_the_commit_of_the_newest_step() -> None:
    steps = at(10, NOW - 300), at(20, NOW - 200), at(30, NOW - 50, COMMITTED)
    values = told(observe(*steps))
    assert values[("ckpt_last_committed_step",)] == 30
    assert values[("ckpt_last_committed_age_seconds",)] == 50
    assert values[("ckpt_last_verified_step",)] == 20
    assert values[("ckpt_last_verified_age_seconds",)] == 200
    assert values[("ckpt_save_interval_seconds",)] == 125
    assert values[("ckpt_checkpoint_bytes",)] == 30
    assert values[("ckpt_lease_epoch",)] == 7


def test_a_root_without_a_checkpoint_tells_no_age() -> None:
    values = told(observe())
    names = {name for name, *_ in values}
    assert not [name for name in names if "last_" in name or "interval" in name]
    assert values[("ckpt_run_ended",)] == 0
    assert values[("ckpt_checkpoints", "quarantined")] == 0


def test_the_interval_is_the_median_so_that_a_night_without_training_does_not_count() -> None:
    moments = [0, 100, 200, 50_000, 50_100, 50_200]
    views = [at(step, moment) for step, moment in enumerate(moments)]
    assert save_interval_s(views) == 100
    assert save_interval_s(views[:1]) is None
    assert save_interval_s([*views, at(9, 90_000, CheckpointState.SAVING)]) == 100


def test_steps_in_the_trash_still_tell_how_often_a_run_saves() -> None:
    assert save_interval_s([at(1, 0, CheckpointState.TRASHED), at(2, 60)]) == 60


@pytest.mark.parametrize(("last", "released"), [(True, False), (False, True)])
def test_a_run_has_ended_with_its_last_step_or_its_trainers_last_word(
    last: bool, released: bool
) -> None:
    step = CheckpointView(step=5, state=VERIFIED, manifest=manifest(5, is_last_step=last))
    assert told(observe(step), has_ended=released)[("ckpt_run_ended",)] == 1


def test_actions_are_counted_by_kind_and_state_and_planned_ones_are_pending() -> None:
    observed = observe(view(10, COMMITTED), view(20), policy=COPY_EACH)
    running = replace(verify_action(view(10, COMMITTED)))
    values = told(with_record(observed, running, ActionState.RUNNING))
    assert values[("ckpt_actions", "verify", "running")] == 1
    assert values[("ckpt_actions", "export", "pending")] == 2
    assert values[("ckpt_actions", "publish", "pending")] == 2
    assert values[("ckpt_actions", "publish", "dead")] == 0


def test_what_is_dead_counts_only_while_its_step_is_here() -> None:
    dead = verify_action(view(10))
    here = with_record(observe(view(10)), dead, ActionState.DEAD)
    gone = with_record(observe(view(10, CheckpointState.TRASHED)), dead, ActionState.DEAD)
    assert told(here)[("ckpt_actions", "verify", "dead")] == 1
    assert told(gone)[("ckpt_actions", "verify", "dead")] == 0


def exported(observed: Observation, *steps: int) -> Observation:
    for step in steps:
        observed = with_export(observed, view(step), "hf")
    return observed


def test_the_backlog_of_a_destination_is_what_was_not_copied_yet() -> None:
    observed = exported(observe(view(10), view(20), policy=COPY_EACH), 10)
    publish = publish_action(view(10), HF, "/copies")
    observed = with_record(observed, publish, ActionState.RUNNING)
    moving = Moving(action=publish, done_bytes=4, bytes_per_s=2.0, eta_s=3.0)
    values = told(observed, moving)
    assert values[("ckpt_backlog", "/copies")] == 2
    assert values[("ckpt_backlog_bytes", "/copies")] == (10 - 4) + 10  # the second as the first
    assert values[("ckpt_backlog_eta_seconds", "/copies")] == 8
    assert values[("ckpt_bytes_per_second", "publish")] == 2
    assert values[("ckpt_eta_seconds", "publish")] == 3


@pytest.mark.parametrize("state", [ActionState.DEAD, ActionState.CANCELLED, ActionState.SUPERSEDED])
def test_what_nobody_waits_for_any_more_is_no_backlog(state: ActionState) -> None:
    observed = exported(observe(view(10), policy=COPY_EACH), 10)
    values = told(with_record(observed, publish_action(view(10), HF, "/copies"), state))
    assert values[("ckpt_backlog", "/copies")] == 0
    assert values[("ckpt_backlog_bytes", "/copies")] == 0


@pytest.mark.parametrize(
    ("to", "label"),
    [
        ("s3://bucket/models", "s3://bucket/models"),
        ("s3://key:secret@bucket/models", "s3://bucket/models"),
        ("https://store/x?X-Amz-Signature=abc", "https://store/x"),
        ("hf://org/repo@main", "hf://org/repo@main"),
        ("/copies", "/copies"),
    ],
)
def test_a_destination_is_named_without_what_may_be_secret(to: str, label: str) -> None:
    policy = LifecyclePolicy(export=EXPORT_ALL, publish=(PublishPolicy(export="hf", to=to),))
    assert place_of(publish_action(view(10), HF, to), policy) == label


def test_what_people_ask_for_by_hand_has_one_label() -> None:
    requests = tuple(Request(step=10, export=HF, destination=f"/by-hand-{n}") for n in range(3))
    values = told(exported(observe(view(10), policy=COPY_EACH, requests=requests), 10))
    places = {labels[0] for name, *labels in values if name == "ckpt_backlog"}
    assert places == {"/copies", OTHER}
    assert values[("ckpt_backlog", OTHER)] == 3


def test_every_total_is_told_as_zero_before_it_grows() -> None:
    values = by_series(list(zeros(COPY_EACH)))
    assert set(values.values()) == {0.0}
    assert {name for name, *_ in values} == {m.name for m in METRICS if m.kind == "total"}
    assert {("ckpt_saves_total", state) for state in SAVES} <= set(values)
    assert {("ckpt_save_seconds_total", phase) for phase in PHASES} <= set(values)
    assert ("ckpt_upload_bytes_total", "/copies") in values


def test_a_save_is_counted_with_its_phases() -> None:
    event = SaveEvent(
        kind="committed", step=1, reason="", blocked_s=0.5, phases={"stage": 0.5, "write": 2.0}
    )
    assert by_series(list(counted_save(event))) == {
        ("ckpt_saves_total", "committed"): 1,
        ("ckpt_train_blocked_seconds_total",): 0.5,
        ("ckpt_save_seconds_total", "stage"): 0.5,
        ("ckpt_save_seconds_total", "write"): 2.0,
    }


def test_a_step_is_counted_once_whatever_becomes_of_it() -> None:
    empty, saving = observe(), observe(view(10, CheckpointState.SAVING))
    here, trashed = observe(view(10, COMMITTED)), observe(view(10, CheckpointState.TRASHED))
    once = {("ckpt_saved_bytes_total",): 10.0}
    assert by_series(list(counted(empty, here))) == once
    assert by_series(list(counted(saving, here))) == once
    for before in (here, observe(view(10)), trashed):
        assert not list(counted(before, here))


def record_of(action: Action, **fields: Any) -> ActionRecord:
    return ActionRecord(action=action, **fields)


def with_records(*records: ActionRecord) -> Observation:
    found = {record.action.key: record for record in records}
    return replace(observe(view(10), policy=COPY_EACH), records=found)


def test_attempts_after_the_first_are_retries() -> None:
    publish = publish_action(view(10), HF, "/copies")
    first = record_of(publish, state=ActionState.RUNNING, attempts=1)
    third = record_of(publish, state=ActionState.RUNNING, attempts=3)
    begun, again = ("ckpt_attempts_total", "publish"), ("ckpt_retries_total", "publish")
    assert by_series(list(counted(with_records(), with_records(first)))) == {begun: 1, again: 0}
    assert by_series(list(counted(with_records(), with_records(third)))) == {begun: 3, again: 2}
    assert by_series(list(counted(with_records(first), with_records(third)))) == {
        begun: 2,
        again: 2,
    }
    assert not list(counted(with_records(third), with_records(third)))


def test_a_record_that_begins_anew_counts_from_one_again() -> None:
    publish = publish_action(view(10), HF, "/copies")
    dead = record_of(publish, state=ActionState.DEAD, attempts=5)
    anew = record_of(publish, state=ActionState.RUNNING, attempts=1, changed_at=9.0)
    assert by_series(list(counted(with_records(dead), with_records(anew)))) == {
        ("ckpt_attempts_total", "publish"): 1,
        ("ckpt_retries_total", "publish"): 0,
    }


@pytest.mark.parametrize(
    ("action", "series"),
    [
        (publish_action(view(10), HF, "/copies"), ("ckpt_upload_bytes_total", "/copies")),
        (publish_action(view(10), HF, "/x"), ("ckpt_upload_bytes_total", OTHER)),
        (purge_action(view(10), grace_s=1.0), ("ckpt_purged_bytes_total",)),
    ],
)
def test_bytes_count_once_an_action_has_succeeded(action: Action, series: tuple[str, ...]) -> None:
    running = record_of(action, state=ActionState.RUNNING, attempts=1)
    done = replace(
        running, state=ActionState.SUCCEEDED, changed_at=5.0, result={"bytes": 77, "seconds": 3.0}
    )
    values = by_series(list(counted(with_records(running), with_records(done))))
    assert values == {series: 77, ("ckpt_action_seconds_total", str(action.kind)): 3.0}
    assert not list(counted(with_records(done), with_records(done)))


def test_labels_are_few_whatever_a_run_does() -> None:
    """Steps, exports and requests may be many: no series carries their names."""
    steps = [view(step) for step in range(1, 200)]
    requests = tuple(
        Request(step=step, export=ExportSpec(name=f"by-hand-{step}"), destination=f"/{step}")
        for step in range(1, 200)
    )
    values = told(observe(*steps, policy=COPY_EACH, requests=requests))
    assert len(values) < 60
    assert len(ActionKind) * len(ActionState) < 100  # and no more than this for actions ever
