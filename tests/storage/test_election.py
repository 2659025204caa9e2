"""Who creates an object where the store cannot see to it that only one does."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, ObjectExistsError
from ray_ckpt.storage import election
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.election import claims_dir, create_by_election
from ray_ckpt.storage.lease import Holder
from ray_ckpt.storage.s3.store import S3Store
from tests.servers.lesser_s3 import Lack, LesserS3
from tests.waiting import wait_for

RACERS = 6
ROUNDS = 4


@pytest.fixture
def store(root: str) -> Store:
    return LocalStore(root)


def create(store: Store, data: bytes, *, first: Callable[[], object] = lambda: None) -> None:
    """As a store does it that knows nothing but to replace; `first` happens right before."""

    def put() -> None:
        first()
        store.write("a", data)

    create_by_election(store, "a", data, put)


def claims(store: Store) -> list[str]:
    return [info.key for info in store.list_objects(names.ELECTIONS)]


def leave_claim(store: Store, token: str, *, host: str = "another-host") -> None:
    """Of somebody who does nothing more."""
    holder = Holder(owner="a", token=token, host=host, pid=1, beat=0)
    key = f"{claims_dir('a')}/{token}.json"
    store.write(key, json.dumps(asdict(holder)).encode())


def test_alone_one_is_elected_and_leaves_no_claim(store: Store) -> None:
    create(store, b"mine")
    assert (store.read("a"), claims(store)) == (b"mine", [])


def test_what_is_there_is_not_replaced_unless_it_is_the_very_same(store: Store) -> None:
    create(store, b"first")
    create(store, b"first")
    with pytest.raises(ObjectExistsError):
        create(store, b"second")
    assert (store.read("a"), claims(store)) == (b"first", [])


def test_of_many_on_a_slow_store_exactly_one_is_elected(store: Store) -> None:
    for number in range(ROUNDS):
        barrier, won, lost = threading.Barrier(RACERS), list[bytes](), list[bytes]()

        def race(mine: bytes, barrier=barrier, won=won, lost=lost) -> None:
            barrier.wait()
            try:
                create(store, mine, first=lambda: time.sleep(random.random() / 20))
                won.append(mine)
            except ObjectExistsError:
                lost.append(mine)

        racers = [
            threading.Thread(target=race, args=(f"{number}-{racer}".encode(),))
            for racer in range(RACERS)
        ]
        for thread in racers:
            thread.start()
        for thread in racers:
            thread.join()
        assert (len(won), len(lost)) == (1, RACERS - 1)
        assert (store.read("a"), claims(store)) == (won[0], [])
        store.delete(["a"])


@pytest.mark.parametrize("token", ["0" * 16, "f" * 16])
def test_a_claim_on_another_host_is_given_time_and_then_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(election, "PATIENCE_S", 0.3)
    leave_claim(store, token)
    began_at = time.monotonic()
    create(store, b"mine")
    assert time.monotonic() - began_at >= 0.3
    assert claims(store) == []


def test_while_somebody_else_claims_it_nobody_else_puts_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_claim(store, "0" * 16)
    monkeypatch.setattr(election, "HURRY_S", 0.1)
    waiting = threading.Thread(target=create, args=(store, b"mine"), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert store.stat("a") is None
    store.delete([f"{claims_dir('a')}/{'0' * 16}.json"])
    waiting.join()
    assert store.read("a") == b"mine"


def die_before_the_put(root: str) -> None:
    create(LocalStore(root), b"theirs", first=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_the_claim_of_a_killed_process_on_this_host_holds_up_nobody(store: Store) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=die_before_the_put, args=(store.uri,)
    )
    process.start()
    process.join()
    assert len(claims(store)) == 1
    began_at = time.monotonic()
    create(store, b"mine")
    assert time.monotonic() - began_at < election.PATIENCE_S / 2
    assert (store.read("a"), claims(store)) == (b"mine", [])


def test_who_stood_still_before_its_put_is_told_that_it_has_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim was taken for a dead one's, and somebody else was elected."""
    monkeypatch.setattr(election, "PATIENCE_S", 0.1)
    with pytest.raises(ConflictError, match="stood still"):
        create(store, b"late", first=lambda: create(store, b"in time"))
    assert claims(store) == []


def test_a_claim_is_given_up_before_others_take_it_for_a_dead_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(election, "PATIENCE_S", 0.5)
    monkeypatch.setattr(election, "HURRY_S", -1.0)
    with pytest.raises(ConflictError, match="nobody could be elected"):
        create(store, b"mine")
    assert store.stat("a") is None
    assert claims(store) == []


def create_on_s3(uri: str, mine: bytes, start: str) -> None:
    store = S3Store(uri)
    store.features.get()
    wait_for(Path(start).exists)
    try:
        store.create("claim", mine)
        store.write(f"won/{mine.decode()}", b"")
    except ObjectExistsError:
        store.write(f"lost/{mine.decode()}", b"")


@pytest.mark.s3
def test_of_several_processes_on_a_lesser_store_exactly_one_creates(
    lesser: LesserS3, s3_root: str, tmp_path: Path
) -> None:
    lesser.lacks.add(Lack.EXCLUSIVE_CREATES)
    store = S3Store(s3_root)
    store.features.find_out()
    spawn = multiprocessing.get_context("spawn")
    racers = [
        spawn.Process(target=create_on_s3, args=(s3_root, b"%d" % n, str(tmp_path / "start")))
        for n in range(4)
    ]
    for process in racers:
        process.start()
    (tmp_path / "start").touch()
    for process in racers:
        process.join()
    [won] = [info.key.removeprefix("won/") for info in store.list_objects("won")]
    assert len(list(store.list_objects("lost"))) == 3
    assert store.read("claim") == won.encode()
    assert claims(store) == []
