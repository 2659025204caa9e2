from dataclasses import replace

import pytest

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import AuthorizationError
from ray_ckpt.core.events import Event, utc
from ray_ckpt.core.lifecycle import ActionKind, CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.report import Lane, Rate, Report, make_report

NOW = 2_000_000_000.0


def event(step: int | None, what: str, text: str, *, at: float = NOW, **details: object) -> Event:
    who = "manager epoch 3" if what.startswith("action") else "trainer a"
    at_text = utc(at)
    return Event(
        id=f"{what}{step}{at}",
        at=at_text,
        who=who,
        what=what,
        step=step,
        text=text,
        details=details,
    )


def record(kind: ActionKind, step: int, **result: object) -> ActionRecord:
    action = Action(kind=kind, step=step, source_id="id")
    return ActionRecord(action=action).started(NOW - 10).succeeded(result, NOW)


def view(step: int, state: CheckpointState, **metrics: float) -> CheckpointView:
    manifest = Manifest(
        step=step,
        save_id="aa",
        created_at="2030-01-02T03:04:05+00:00",
        lineage=Lineage(run_id="run"),
        files=(),
        metrics=metrics,
    )
    return CheckpointView(step=step, state=state, manifest=manifest)


def told(
    *events: Event, records: tuple[ActionRecord, ...] = (), views: tuple[CheckpointView, ...] = ()
) -> Report:
    observed = Observation(
        run_id="run",
        policy=LifecyclePolicy(),
        checkpoints=views,
        records={r.action.key: r for r in records},
    )
    return make_report("/runs/a", observed, events, now=NOW)


def test_what_took_time_begins_before_it_ends() -> None:
    save = event(5, "save.committed", "the save of step-5 is committed", seconds=3.0)
    found = told(save, records=(record(ActionKind.EXPORT, 5, seconds=8.0),)).marks
    assert [(m.lane, m.begin, m.end) for m in found] == [
        (Lane.EXPORT, NOW - 8, NOW),
        (Lane.SAVE, NOW - 3, NOW),
    ]


def test_what_has_no_record_any_more_is_told_by_its_event_once() -> None:
    events = (
        event(5, "action.succeeded", "verify step-5: succeeded, attempt 2"),
        event(5, "action.running", "purge step-5: running"),
        event(6, "action.succeeded", "publish step-6 hf to s3://b/c: succeeded"),
        event(7, "action.succeeded", "verify step-7: succeeded"),
    )
    found = told(*events, records=(record(ActionKind.VERIFY, 7, seconds=1.0),)).marks
    assert sorted((str(m.lane), m.title) for m in found) == [
        ("copies", "publish step-6 hf to s3://b/c"),
        ("verifies", "verify step-5"),
        ("verifies", "verify step-7"),
    ]


@pytest.mark.parametrize(
    ("what", "is_fault"),
    [
        ("save.failed", True),
        ("action.dead", True),
        ("action.retry_wait", True),
        ("checkpoint.quarantined", True),
        ("checkpoint.missing", True),
        ("save.skipped", False),
        ("action.succeeded", False),
        ("checkpoint.trashed", False),
    ],
)
def test_faults_are_what_went_wrong(what: str, is_fault: bool) -> None:
    made = told(event(5, what, "a sentence"))
    assert (made.faults == made.events) is is_fault
    assert any(mark.lane is Lane.FAULT for mark in made.marks) is is_fault


def test_what_is_stuck_or_damaged_is_open_with_the_next_command() -> None:
    action = Action(kind=ActionKind.PUBLISH, step=5, source_id="id", destination="hf://a/b")
    error = AuthorizationError("403", "hf://a/b", "it is untouched", "sign in")
    dead = ActionRecord(action=action).started(NOW).failed(error, NOW)
    short = replace(view(7, CheckpointState.VERIFIED), problem="__0_0.distcp is missing")
    views = (view(6, CheckpointState.QUARANTINED), short, view(8, CheckpointState.VERIFIED))
    found = told(records=(dead,), views=views).open
    assert [(one.title, one.state) for one in found] == [
        ("publish step-5 checkpoint to hf://a/b", "dead"),
        ("step-6", "quarantined"),
        ("step-7", "verified"),
    ]
    assert found[0].do == "ray-ckpt retry /runs/a --step 5 --kind publish"
    assert "sign in" in found[0].message
    assert found[2].message == "__0_0.distcp is missing"


def test_rates_are_of_all_that_was_moved() -> None:
    saves = [
        event(n, "save.committed", "x", at=NOW + n, seconds=float(n), bytes=100) for n in (1, 2, 9)
    ]
    verify = record(ActionKind.VERIFY, 1, seconds=4.0, bytes=400)
    purge = record(ActionKind.PURGE, 1, seconds=4.0, bytes=400)
    assert told(*saves, records=(verify, purge)).rates == (
        Rate(what="save", count=3, total_bytes=300, median_s=2.0, bytes_per_s=25.0),
        Rate(what="verify", count=1, total_bytes=400, median_s=4.0, bytes_per_s=100.0),
    )


def test_numbers_by_step_and_steps_that_are_gone() -> None:
    views = (
        view(20, CheckpointState.TRASHED, loss=1.0),
        view(30, CheckpointState.VERIFIED, loss=2.0, accuracy=float("nan")),
    )
    save = event(10, "save.committed", "x", seconds=3.0, blocked_s=0.5)
    made = told(save, event(None, "run.resumed", "x"), views=views)
    assert made.metrics == {"loss": [(20, 1.0), (30, 2.0)]}
    assert made.saves == {"the whole save": [(10, 3.0)], "training stood still": [(10, 0.5)]}
    assert made.gone == (10,)


def test_epochs_of_one_manager_are_one() -> None:
    events = [
        replace(event(5, "action.dead", "x", at=NOW + n), who=f"manager epoch {n}") for n in (1, 2)
    ]
    assert told(*events).doers == {"manager": {"action.dead": 2}}
