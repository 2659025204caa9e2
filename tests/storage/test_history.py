"""Events on storage: told at least once, read once, and never in anybody's way."""

from dataclasses import replace

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.events import Event, event_id, utc
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.history import (
    MAX_WAITING,
    BackgroundTeller,
    EventReader,
    Teller,
    append_events,
)
from tests.storage.steps import save_step

NOW = 1_800_000_000.0


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return open_catalog(request.getfixturevalue(request.param))


@pytest.fixture
def local(root: str) -> Catalog:
    return open_catalog(root)


def texts(catalog: Catalog) -> list[str]:
    return [event.text for event in EventReader(catalog.store).read()]


def an_event(number: int, *, at: float = NOW) -> Event:
    return Event(
        id=event_id(number),
        at=utc(at),
        who="trainer",
        what="save.committed",
        step=number,
        text=f"number {number}",
    )


def test_every_change_is_told_once_with_who_and_when(catalog: Catalog) -> None:
    teller = Teller(catalog.store, who="manager epoch 7")
    save_step(catalog, 5)
    [event] = teller.tell(catalog.observe(), now=NOW)
    assert teller.tell(catalog.observe(), now=NOW + 2) == []
    catalog.trash(5)
    teller.tell(catalog.observe(), now=NOW + 4)
    assert EventReader(catalog.store).read()[0] == event
    assert (event.who, event.at) == ("manager epoch 7", "2027-01-15T08:00:00.000+00:00")
    assert texts(catalog) == ["step-5 is committed", "step-5: committed -> trashed"]


def test_the_next_manager_goes_on_where_the_last_one_stopped(catalog: Catalog) -> None:
    save_step(catalog, 5)
    Teller(catalog.store, who="manager epoch 1").tell(catalog.observe(), now=NOW)
    catalog.trash(5)
    [event] = Teller(catalog.store, who="manager epoch 2").tell(catalog.observe(), now=NOW + 1)
    assert (event.who, event.text) == ("manager epoch 2", "step-5: committed -> trashed")


class Breaking:
    """A store that cannot write some keys."""

    def __init__(self, catalog: Catalog, broken: str) -> None:
        self._store = catalog.store
        self.broken: str | None = broken

    def _check(self, key: str) -> None:
        if self.broken is not None and key.startswith(self.broken):
            raise TransientError("the store is down", key)

    def write(self, key: str, data: bytes) -> None:
        self._check(key)
        self._store.write(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._check(key)
        self._store.create(key, data)

    def __getattr__(self, verb: str) -> object:
        return getattr(self._store, verb)


def test_a_manager_that_dies_between_telling_and_noting_tells_once_more(local: Catalog) -> None:
    save_step(local, 5)
    store = Breaking(local, names.SNAPSHOT)
    assert Teller(store, who="manager epoch 1").tell(local.observe(), now=NOW) == []
    Teller(local.store, who="manager epoch 2").tell(local.observe(), now=NOW + 1)
    assert len(list(local.store.list_objects(names.EVENTS))) == 2
    [event] = EventReader(local.store).read()
    assert event.who == "manager epoch 1"


@pytest.mark.parametrize("broken", [names.EVENTS, names.SNAPSHOT])
def test_what_cannot_be_written_is_told_later_and_nothing_piles_up(
    local: Catalog, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Scenario 56: where events go is down; nothing waits for it, and memory is bounded."""
    store = Breaking(local, broken)
    teller = Teller(store, who="manager")
    for step in range(1, 11):
        save_step(local, step)
        assert teller.tell(local.observe(), now=NOW + step) == []
    assert caplog.text.count("events cannot be written; all else goes on") == 1
    store.broken = None
    local.trash(1)
    teller.tell(local.observe(), now=NOW + 20)
    told = texts(local)
    assert sorted(told) == sorted(set(told))
    assert {f"step-{step} is committed" for step in range(2, 11)} < set(told)
    assert ("step-1 is trashed" in told) or ("step-1 is committed" in told)
    assert len(list(local.store.list_objects(names.EVENTS))) <= 11


def test_a_lost_or_damaged_snapshot_is_begun_anew(
    local: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(local, 5)
    local.store.write(names.SNAPSHOT, b"{")
    Teller(local.store, who="manager").tell(local.observe(), now=NOW)
    assert texts(local) == ["step-5 is committed"]
    assert "snapshot.json cannot be read" in caplog.text


def test_events_of_several_writers_are_read_in_order_of_time(catalog: Catalog) -> None:
    append_events(catalog.store, [an_event(2, at=NOW + 2), an_event(3, at=NOW + 3)])
    append_events(catalog.store, [replace(an_event(1, at=NOW + 1), who="manager epoch 7")])
    append_events(catalog.store, [replace(an_event(2), at=utc(NOW + 9))])
    assert texts(catalog) == ["number 1", "number 2", "number 3"]


def test_a_reader_returns_what_is_new(catalog: Catalog) -> None:
    reader = EventReader(catalog.store)
    assert reader.read() == []
    append_events(catalog.store, [an_event(1)])
    assert [event.step for event in reader.read()] == [1]
    append_events(catalog.store, [an_event(2, at=NOW - 60)])  # by a clock that is behind
    assert [event.step for event in reader.read()] == [2]
    assert reader.read() == []


def test_a_reader_passes_over_what_is_too_old(local: Catalog) -> None:
    for number in range(4):
        append_events(local.store, [an_event(number, at=NOW + number)])
    reader = EventReader(local.store, since=utc(NOW + 2))
    assert [event.step for event in reader.read()] == [2, 3]


def test_a_damaged_batch_is_told_of_and_left_out(
    local: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    append_events(local.store, [an_event(1)])
    local.store.write(names.event_key(utc(NOW), "x", "y"), b'{"id": 1}\n')
    assert texts(local) == ["number 1"]
    assert caplog.text.count("cannot be read") == 1


def test_a_background_teller_writes_in_order_and_ends(catalog: Catalog) -> None:
    teller = BackgroundTeller(catalog.store)
    for number in range(3):
        teller.tell(lambda number=number: an_event(number, at=NOW + number))
    teller.close()
    assert texts(catalog) == ["number 0", "number 1", "number 2"]


def test_a_background_teller_holds_a_bounded_number_of_events(
    local: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    store = Breaking(local, names.EVENTS)
    teller = BackgroundTeller(store)
    for number in range(3 * MAX_WAITING):
        teller.tell(lambda number=number: an_event(number))
    teller.close()
    assert "an event cannot be written; all else goes on" in caplog.text
    assert texts(local) == []
