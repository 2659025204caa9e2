"""One writer at a time: who is refused, who may take over, and who notices."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import LeaseHeldError
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.lease import Holder, Lease

HOLD_UNTIL_KILLED = """
import sys
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import Lease

Lease(open_catalog(sys.argv[1]).store, "trainer", owner="other job").acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["root", pytest.param("lesser_root", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> Store:
    return open_catalog(request.getfixturevalue(request.param)).store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 2.0)


def lease(store: Store, owner: str, role: str = "trainer") -> Lease:
    return Lease(store, role, owner=owner)


def leave_behind(store: Store, *, epoch: int, host: str = "another-host") -> None:
    """The lease of a holder that will never beat again."""
    holder = Holder(owner="gone", token="t", host=host, pid=1, beat=3)
    store.write(names.lease_key("trainer", epoch), json.dumps(asdict(holder)).encode())


def test_a_free_lease_is_taken_and_given_back(store: Store) -> None:
    first, second = lease(store, "a"), lease(store, "b")
    first.acquire()
    first.check()
    first.release()
    second.acquire()
    second.check()
    second.release()


def test_another_owner_is_refused_while_the_first_is_alive(store: Store) -> None:
    first = lease(store, "a")
    first.acquire()
    with pytest.raises(LeaseHeldError, match=r"held by process \d+ on .* \(a\)") as caught:
        lease(store, "b").acquire()
    assert caught.value.where == store.uri
    first.check()
    first.release()


def test_two_roles_do_not_meet(store: Store) -> None:
    trainer, manager = lease(store, "a"), lease(store, "b", role="manager")
    trainer.acquire()
    manager.acquire()
    trainer.check()
    manager.check()
    trainer.release()
    manager.release()


def test_the_same_owner_takes_over_at_once_and_the_first_notices(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 1000.0)
    first, second = lease(store, "a"), lease(store, "a")
    first.acquire()
    second.acquire()
    second.check()
    with pytest.raises(LeaseHeldError, match="epoch 2 has taken over from our epoch 1"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_whoever_lost_the_lease_never_gets_it_back_by_itself(store: Store) -> None:
    first, second, third = lease(store, "a"), lease(store, "a"), lease(store, "b")
    first.acquire()
    second.acquire()
    second.release()
    with pytest.raises(LeaseHeldError):
        first.check()
    third.acquire()
    with pytest.raises(LeaseHeldError):
        first.check()
    third.check()
    first.release()
    third.check()
    third.release()


def test_nobody_holds_what_was_released(store: Store) -> None:
    first = lease(store, "a")
    first.acquire()
    first.release()
    with pytest.raises(LeaseHeldError):
        first.check()


def test_after_a_release_nobody_waits_although_an_earlier_holder_had_died(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.0)
    leave_behind(store, epoch=6)
    first, second = lease(store, "a"), lease(store, "b")
    first.acquire()
    first.release()
    monkeypatch.setattr(lease_module, "PATIENCE_S", 1000.0)
    second.acquire()
    second.check()
    second.release()


def test_the_lease_of_a_killed_process_on_this_host_is_taken_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 1000.0)
    command = [sys.executable, "-c", HOLD_UNTIL_KILLED, store.uri]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    mine = lease(store, "my job")
    mine.acquire()
    mine.check()
    mine.release()


def test_a_holder_elsewhere_is_given_time_and_then_taken_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 34: no two hosts' clocks are compared."""
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.1)
    leave_behind(store, epoch=6)
    mine = lease(store, "a")
    mine.acquire()
    mine.check()
    assert store.stat(names.lease_key("trainer", 7)) is not None
    mine.release()


def test_of_several_at_once_exactly_one_gets_the_lease(store: Store) -> None:
    leases = [lease(store, f"job {n}") for n in range(4)]
    barrier, winners, losers = threading.Barrier(4), list[Lease](), list[Lease]()

    def take(mine: Lease) -> None:
        barrier.wait()
        try:
            mine.acquire()
            winners.append(mine)
        except LeaseHeldError:
            losers.append(mine)

    threads = [threading.Thread(target=take, args=(mine,)) for mine in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 3)
    winners[0].check()
    winners[0].release()


def test_a_release_that_never_held_changes_nothing(store: Store) -> None:
    first = lease(store, "a")
    first.acquire()
    lease(store, "b").release()
    first.check()
    first.release()


def test_a_file_that_is_no_lease_is_left_alone(store: Store) -> None:
    store.write(f"{names.LEASES}/notes.txt", b"x")
    first = lease(store, "a")
    first.acquire()
    first.check()
    first.release()
    assert store.read(f"{names.LEASES}/notes.txt") == b"x"
