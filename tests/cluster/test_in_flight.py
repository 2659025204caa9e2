"""What listening to attempts costs, and whose words count."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from jobs.bench.counting import CountingStore
from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.in_flight import InFlight
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.beats import first_beat
from tests.core.worlds import view

HERE = Placement(node=LiveNode(id="here", name="here"), strength="prefer")


class Nobody:
    """Begins nothing."""

    def __init__(self, *, has_room: bool = False) -> None:
        self._has_room = has_room

    def nodes(self) -> Sequence[LiveNode]:
        return [HERE.node]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Future[Any]:
        return Future()

    def takes(self, action: Action) -> bool:
        return True

    def why_waiting(self, action: Action) -> str:
        return "waits for ever"

    def has_room(self, action: Action) -> bool:
        return self._has_room

    def end_process(self, beat: Beat) -> None:
        pass

    def close(self) -> None:
        pass


def flying(store: Store, *steps: int, has_room: bool = False) -> InFlight:
    found = InFlight(store, Nobody(has_room=has_room))
    for step in steps:
        record = ActionRecord(action=verify_action(view(step))).started(7.0)
        attempt = Attempt(action=record.action, number=1, started_at=7.0, epoch=1, beat_s=1.0)
        found.start(record, attempt, HERE)
    return found


def test_listening_costs_one_read_an_attempt_and_no_more_often_than_they_beat(root: str) -> None:
    store: Any = CountingStore(open_catalog(root).store)
    some = flying(store, 10, 20)
    assert some.listen(Limits()) == []
    assert store.take() == {"GET": 2}
    some.listen(Limits())
    assert store.take() == {}
    some.sweep()
    assert store.take() == {"LIST": 1}
    some.sweep()
    assert store.take() == {}


def test_an_older_attempt_of_the_same_number_is_not_listened_to(root: str) -> None:
    store = open_catalog(root).store
    (flight,) = flying(store, 10).all()
    beat = replace(first_beat(attempt_started_at=7.0, node="there"), done_bytes=5, total_bytes=10)
    store.write(flight.attempt.beat_key, replace(beat, attempt_started_at=3.0).to_json())
    some = flying(store, 10)
    some.listen(Limits())
    assert some.all()[0].describe()["percent"] is None
    assert [o.node for o in some.occupants()] == ["here"]
    store.write(flight.attempt.beat_key, beat.to_json())
    some = flying(store, 10)
    some.listen(Limits())
    assert some.all()[0].describe()["percent"] == 50
    assert [o.node for o in some.occupants()] == ["there"]


@pytest.mark.parametrize("has_room", [True, False])
def test_what_never_begins_is_given_up_unless_it_waits_for_room(
    root: str, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """A hung task, before its first word."""
    now = 1.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    some = flying(open_catalog(root).store, 10, has_room=has_room)
    while now < 1806.0:
        assert some.listen(Limits()) == []
        now += 5.0
    given_up = some.listen(Limits())
    assert [error.what for _, error in given_up] == (
        ["it has not begun for 1805 s although there is room for it"] if has_room else []
    )
    assert len(some.all()) == (0 if has_room else 1)


def test_a_manager_that_stood_still_does_not_blame_what_waits(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    some = flying(open_catalog(root).store, 10, has_room=True)
    assert some.listen(Limits()) == []
    now = 4000.0
    assert some.listen(Limits()) == []
