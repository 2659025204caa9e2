"""Who reads a step is seen by whoever wants to purge it; nobody's clock is asked."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict

import pytest

from ray_ckpt.core import names
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.lease import Holder
from ray_ckpt.storage.readers import living_readers, readers_by_step, reading
from tests.servers.seaweed import S3Endpoint
from tests.storage.steps import save_step

READ_UNTIL_KILLED = """
import sys
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.readers import reading

with reading(open_catalog(sys.argv[1]).store, 5, who="load"):
    print("reading", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> Store:
    return open_catalog(request.getfixturevalue(request.param)).store


@pytest.fixture
def local(root: str) -> Store:
    return open_catalog(root).store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 5.0)


def leave_behind(store: Store, step: int) -> None:
    """The heartbeat of a reader on another host that will never beat again."""
    holder = Holder(owner="load", token="t", host="another-host", pid=1, beat=3)
    store.write(names.reader_key(step, "ab12"), json.dumps(asdict(holder)).encode())


def test_a_reader_is_seen_while_it_reads_and_only_then(store: Store) -> None:
    assert living_readers(store, 5) == []
    with reading(store, 5, who="export hf-bf16"):
        (sentence,) = living_readers(store, 5)
        assert sentence.startswith("export hf-bf16, process ")
        assert readers_by_step(store) == {5: [sentence]}
        assert living_readers(store, 50) == []
    assert living_readers(store, 5) == []
    assert list(store.list_objects(names.READERS)) == []


def test_every_reader_of_a_step_counts(local: Store) -> None:
    with reading(local, 5, who="load"), reading(local, 5, who="export a"):
        assert [sentence.split(",")[0] for sentence in living_readers(local, 5)] == [
            "export a",
            "load",
        ]


def test_a_killed_reader_on_this_host_is_dead_at_once(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 1000.0)
    command = [sys.executable, "-c", READ_UNTIL_KILLED, local.uri]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert len(readers_by_step(local)[5]) == 1
        process.kill()
    assert readers_by_step(local) == {}
    assert living_readers(local, 5) == []
    assert list(local.list_objects(names.READERS)) == []


def test_a_reader_elsewhere_is_watched_and_given_up_after_its_silence(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 34: no two hosts' clocks are compared."""
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.2)
    leave_behind(store, 5)
    leave_behind(store, 6)
    assert set(readers_by_step(store)) == {5, 6}, "one look cannot tell"
    assert living_readers(store, 5) == []
    assert set(readers_by_step(store)) == {6}


def test_a_heartbeat_that_cannot_be_read_is_nobody_once_it_was_watched(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.1)
    local.write(names.reader_key(5, "ab12"), b"{")
    assert len(readers_by_step(local)[5]) == 1
    assert living_readers(local, 5) == []


def test_another_file_beside_the_heartbeats_is_left_alone(local: Store) -> None:
    local.write(f"{names.READERS}/notes.txt", b"x")
    assert living_readers(local, 5) == []
    assert local.read(f"{names.READERS}/notes.txt") == b"x"


@pytest.mark.s3
def test_a_root_that_can_only_be_read_is_read_without_a_heartbeat(
    s3_root: str,
    s3_server: S3Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_step(open_catalog(s3_root), 5)
    for name, value in s3_server.read_only().environment().items():
        monkeypatch.setenv(name, value)
    catalog = open_catalog(s3_root)
    with caplog.at_level(logging.INFO), reading(catalog.store, 5, who="load"):
        assert catalog.damage(5) == []
    assert caplog.text.count("is read without a sign that keeps a purge away") == 1
    assert list(catalog.store.list_objects(names.READERS)) == []


def test_a_reader_that_fails_leaves_no_heartbeat(local: Store) -> None:
    with pytest.raises(ValueError, match="its own"), reading(local, 5, who="load"):
        raise ValueError("its own")
    assert list(local.list_objects(names.READERS)) == []
