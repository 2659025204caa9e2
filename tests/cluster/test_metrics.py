"""What a manager's metrics say of a real root, round by round."""

import time
from collections.abc import Iterator

import pytest

from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.metrics import Meter
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.metrics import METRICS
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import TRAINER, Lease
from tests.cluster.cranks import Crank
from tests.roots import make_root

Values = dict[tuple[str, ...], float]
TOTALS = {metric.name for metric in METRICS if metric.kind == "total"}


@pytest.fixture
def crank(root: str) -> Iterator[Crank]:
    open_catalog(root).records.begin_run("run", None)
    crank = Crank(root, Threads())
    yield crank
    crank.close()


def turn(crank: Crank, *meters: Meter) -> None:
    done = crank.turn()
    for meter in meters:
        meter.saw(done, epoch=crank.reconciler.epoch)


def values(meter: Meter) -> Values:
    return {(s.name, *s.labels): s.value for s in meter.samples(time.time())}


def verified(crank: Crank, meter: Meter) -> None:
    """All that was saved is verified, and the meter has seen it happen."""
    while True:
        turn(crank, meter)
        records = crank.records(ActionKind.VERIFY)
        if records and all(r.state is ActionState.SUCCEEDED for r in records):
            return


def test_totals_begin_at_zero_and_count_what_happens_from_then_on(root: str, crank: Crank) -> None:
    make_root(root, (10,))
    meter = Meter(crank.catalog.store, "run")
    turn(crank, meter)
    assert {v for (name, *_), v in values(meter).items() if name in TOTALS} == {0.0}
    make_root(root, (20,))
    verified(crank, meter)
    told = values(meter)
    size_bytes = crank.catalog.manifest(20).total_bytes
    assert told[("ckpt_saved_bytes_total",)] == size_bytes
    assert told[("ckpt_attempts_total", "verify")] == 2
    assert told[("ckpt_retries_total", "verify")] == 0
    assert told[("ckpt_last_verified_step",)] == 20
    assert told[("ckpt_lease_epoch",)] == crank.reconciler.epoch == 1


def test_a_manager_that_starts_anew_counts_nothing_twice(root: str, crank: Crank) -> None:
    make_root(root, (10, 20))
    first = Meter(crank.catalog.store, "run")
    verified(crank, first)
    again = Meter(crank.catalog.store, "run")
    turn(crank, again)
    turn(crank, again)
    assert {v for (name, *_), v in values(again).items() if name in TOTALS} == {0.0}


def test_a_manager_that_stands_by_tells_nothing(root: str, crank: Crank) -> None:
    make_root(root, (10,))
    turn(crank)
    other = Reconciler(crank.catalog, Threads(), owner="another")
    meter = Meter(crank.catalog.store, "run")
    meter.saw(other.round(time.time()), epoch=other.epoch)
    assert other.epoch == 0
    assert meter.samples(time.time()) == []
    other.close()


def test_ages_grow_while_a_round_hangs(root: str, crank: Crank) -> None:
    make_root(root, (10,))
    meter = Meter(crank.catalog.store, "run")
    turn(crank, meter)
    age = ("ckpt_last_committed_age_seconds",)
    now = time.time()
    told = [
        {(s.name, *s.labels): s.value for s in meter.samples(moment)}[age]
        for moment in (now, now + 500)
    ]
    assert told[1] - told[0] == pytest.approx(500)


def test_saves_of_the_trainer_are_counted_as_they_are_told(root: str, crank: Crank) -> None:
    meter = Meter(crank.catalog.store, "run")
    meter.saved(SaveEvent(kind="committed", step=1, reason="", blocked_s=0.25))
    turn(crank, meter)
    meter.saved(SaveEvent(kind="skipped", step=2, reason=""))
    told = values(meter)
    assert told[("ckpt_saves_total", "committed")] == 1
    assert told[("ckpt_saves_total", "skipped")] == 1
    assert told[("ckpt_saves_total", "failed")] == 0
    assert told[("ckpt_train_blocked_seconds_total",)] == 0.25


def test_a_trainer_that_lets_go_of_its_lease_has_ended(root: str, crank: Crank) -> None:
    lease = Lease(crank.catalog.store, TRAINER, owner="trainer")
    lease.acquire()
    at_work = Meter(crank.catalog.store, "run")
    turn(crank, at_work)
    assert values(at_work)[("ckpt_run_ended",)] == 0
    lease.release()
    afterwards = Meter(crank.catalog.store, "run")
    turn(crank, afterwards)
    assert values(afterwards)[("ckpt_run_ended",)] == 1
