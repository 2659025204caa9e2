"""What somebody who watches hears, given literal looks."""

import json
from dataclasses import replace

from ray_ckpt.core.beats import Beat, Watch
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.core.watching import Scene, document, news, scene
from tests.core.worlds import COMMITTED, observe, view, with_record

VERIFY = verify_action(view(20))
READS = Beat(
    attempt_started_at=1.0,
    host="a",
    node=None,
    pid=1,
    process_born="1",
    doing="reads step-20",
    total_bytes=1_000_000_000,
)


def seen(observed: Observation, watch: Watch | None = None) -> Scene:
    by_key = {} if watch is None else {VERIFY.key: watch}
    return scene(observed, plan(observed, now=0.0), by_key, trainer=None, manager="process 1 on a")


def heard(done_bytes: int, at: float) -> Watch:
    """Of an attempt that was heard of at 0 first, and last at that moment."""
    first = Watch(begun_at=0.0).after(READS, 0.0)
    return first.after(replace(READS, count=1, done_bytes=done_bytes), at)


def running() -> Observation:
    return with_record(observe(view(10), view(20, COMMITTED)), VERIFY, ActionState.RUNNING)


def test_the_first_look_tells_what_is_there() -> None:
    assert list(news(None, seen(running()))) == [
        "step-10 is verified",
        "step-20 is committed",
        "verify step-20: begins",
    ]


def test_later_looks_tell_what_has_changed_and_every_tenth_of_what_runs() -> None:
    before, nearly = seen(running(), heard(0, 0.0)), seen(running(), heard(90_000_000, 1.0))
    further = seen(running(), heard(500_000_000, 5.0))
    assert list(news(before, nearly)) == []
    assert list(news(nearly, further)) == ["verify step-20: reads step-20 50 %, 100 MB/s, 5 s left"]
    done = with_record(observe(view(10), view(20)), VERIFY, ActionState.SUCCEEDED, changed_at=9.0)
    assert list(news(further, seen(done))) == ["step-20 is verified", "verify step-20: succeeded"]
    assert list(news(seen(done), seen(done))) == []


def test_a_step_that_goes_is_told() -> None:
    before, after = seen(observe(view(10), view(20))), seen(observe(view(20)))
    trashed = seen(observe(view(10, CheckpointState.TRASHED), view(20)))
    assert list(news(before, trashed)) == ["step-10 is trashed"]
    assert list(news(trashed, after)) == ["step-10 is gone"]


def test_what_failed_for_good_is_told_with_its_reason() -> None:
    dead = with_record(observe(view(20, COMMITTED)), VERIFY, ActionState.DEAD)
    record = replace(dead.records[VERIFY.key], error="2 bytes differ\n  where: /x")
    dead = replace(dead, records={VERIFY.key: record})
    assert "dead: verify step-20: 2 bytes differ" in list(news(None, seen(dead)))
    assert list(news(seen(running()), seen(dead)))[-1] == "verify step-20: dead: 2 bytes differ"
    assert seen(dead).waiting == ()


def test_a_look_is_plain_json() -> None:
    told = json.loads(json.dumps(document(seen(running(), heard(500_000_000, 5.0)))))
    assert told["checkpoints"] == {"10": "verified", "20": "committed"}
    assert told["running"] == [
        {
            "title": "verify step-20",
            "doing": "reads step-20",
            "percent": 50,
            "done_bytes": 500_000_000,
            "total_bytes": 1_000_000_000,
            "bytes_per_s": 100_000_000.0,
            "eta_s": 5.0,
        }
    ]
    assert (told["trainer"], told["manager"]) == (None, "process 1 on a")
