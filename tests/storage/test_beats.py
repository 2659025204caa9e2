"""A sign of life is rewritten while an attempt runs, tells what it counts, and goes at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.core.beats import Beat
from ray_ckpt.core.names import parse_running, running_key
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.beats import (
    all_beats,
    beating,
    first_beat,
    process_born,
    read_beat,
    sweep_beats,
)
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.digests import find_damage
from ray_ckpt.storage.progress import Progress
from tests.storage.copies.test_publish import WEIGHTS, make_export
from tests.waiting import wait_for

KEY = running_key("c0ffee", 2)
FIRST = first_beat(attempt_started_at=5.0, node="a-node")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, root: str) -> Store:
    uri = str(request.getfixturevalue("s3_root")) if request.param == "s3" else root
    return open_catalog(uri).store


def heard(store: Store) -> Beat:
    return wait_for(lambda: read_beat(store, KEY))


def test_it_beats_and_tells_how_far_it_is_until_it_ends(store: Store) -> None:
    with beating(store, KEY, first=FIRST, every_s=0.05) as progress:
        first = heard(store)
        assert (first.pid, first.node, first.doing) == (os.getpid(), "a-node", "begins")
        assert first.peak_rss_bytes > 1_000_000
        progress.begin("reads", 10)
        progress.advance(4)
        later = wait_for(lambda: b if (b := heard(store)).done_bytes == 4 else None)
        assert (later.doing, later.percent) == ("reads", 40)
        assert later.count > first.count
    assert read_beat(store, KEY) is None


def test_what_dead_attempts_left_is_swept_and_the_living_are_kept(store: Store) -> None:
    store.write(running_key("dead", 1), b"{")
    store.write(running_key("beef", 3), FIRST.to_json())
    store.write(KEY, FIRST.to_json())
    assert all_beats(store) == {("beef", 3): FIRST, ("c0ffee", 2): FIRST}
    assert sweep_beats(store, except_for=[KEY]) == sorted(
        [running_key("dead", 1), running_key("beef", 3)]
    )
    assert all_beats(store) == {("c0ffee", 2): FIRST}


def test_the_key_says_which_attempt_it_is() -> None:
    assert parse_running(KEY) == ("c0ffee", 2)
    assert parse_running(".ray_ckpt/running/else.json") is None


def test_a_root_that_cannot_be_written_fails_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("no folder")
    store = open_catalog(str(tmp_path / "a-file/below")).store
    with beating(store, KEY, first=FIRST, every_s=0.01) as progress:
        progress.advance(1)


def test_a_process_is_known_by_when_it_began() -> None:
    first, second = (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)
    )
    born = process_born(first.pid)
    assert born == process_born(first.pid)
    assert born != process_born(os.getpid())
    for process in (first, second):
        process.communicate()
    assert process_born(first.pid) is None


def test_a_verify_counts_every_byte_it_digests(root: str) -> None:
    catalog, progress = open_catalog(root), Progress()
    export = make_export(catalog)
    assert find_damage(catalog.store, "exports/hf/step-5", export.manifest, progress=progress) == []
    total = export.manifest.total_bytes
    assert progress.seen() == ("reads exports/hf/step-5", total, total)


@pytest.mark.s3
def test_a_copy_to_an_object_store_counts_what_it_sends(root: str, s3_root: str) -> None:
    catalog, progress = open_catalog(root), Progress()
    export = make_export(catalog)
    publish_export(catalog, export, s3_root, progress=progress)
    total = export.manifest.total_bytes
    assert total > len(WEIGHTS)
    assert progress.seen() == (f"sends export hf of step-5 to {s3_root}", total, total)
