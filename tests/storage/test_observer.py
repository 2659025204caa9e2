"""Looking again sees what looking for the first time would see, and asks for little."""

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.bench.counting import CountingStore
from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest, TensorEntry
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.reconcile import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.observer import CLOSE_EVERY_S, Observer
from tests.servers.s3_proxy import S3Proxy
from tests.storage.steps import save_export, save_step, stage

NOW = 1000.0


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return open_catalog(request.getfixturevalue(request.param))


@pytest.fixture
def remote(s3_root: str) -> Catalog:
    return open_catalog(s3_root)


def states(observed: Observation) -> list[tuple[int, CheckpointState]]:
    return [(view.step, view.state) for view in observed.checkpoints]


def pins(view: CheckpointView) -> list[str]:
    return [pin.name for pin in view.pins]


def is_local(catalog: Catalog) -> bool:
    return "://" not in catalog.uri


def remove_folder(catalog: Catalog, folder: str) -> None:
    """As `rm -rf` or `aws s3 rm --recursive` does it."""
    if is_local(catalog):
        shutil.rmtree(Path(catalog.uri) / folder)
    else:
        catalog.store.delete([info.key for info in catalog.store.list_objects(folder)])


def verify(catalog: Catalog, step: int) -> None:
    record = ActionRecord(action=verify_action(catalog.checkpoint(step)))
    catalog.records.write_action(record.started(1.0).succeeded({}, 2.0))


def forget_verdict(catalog: Catalog, step: int) -> None:
    catalog.records.forget_action(verify_action(catalog.checkpoint(step)))


def ask(catalog: Catalog, step: int) -> None:
    catalog.records.add_request(Request(step=step, export=ExportSpec(name="hf")))


def settle(catalog: Catalog, step: int) -> None:
    catalog.records.settle_request(Request(step=step, export=ExportSpec(name="hf")))


def save_anew(catalog: Catalog, step: int) -> None:
    save_step(catalog, step, files={"__0_0.distcp": b"the second"}, save_id=uuid.uuid4().hex)


def begin_save(catalog: Catalog, step: int) -> None:
    """A rank has written; nothing is committed."""
    staging = stage(catalog, step, files={"__1_0.distcp": b"one of two"}, save_id="begun")
    catalog.commit.contribute(staging, names.step_dir(step))
    catalog.commit.discard(staging)


def export(catalog: Catalog, step: int) -> None:
    save_export(catalog, "hf", step, files={"model.safetensors": b"weights"}, save_id=f"e{step}")


Change = Callable[[Catalog], object]
CHANGES: dict[str, Change] = {
    "the first step": lambda c: save_step(c, 5),
    "a second one": lambda c: save_step(c, 6),
    "a verdict": lambda c: verify(c, 6),
    "a request": lambda c: ask(c, 6),
    "no request": lambda c: settle(c, 6),
    "an export": lambda c: export(c, 6),
    "another": lambda c: export(c, 5),
    "an export that is removed": lambda c: remove_folder(c, "exports/hf/step-5"),
    "a step that is trashed": lambda c: c.trash(5),
    "and comes back": lambda c: c.restore(5),
    "trashed again": lambda c: c.trash(5),
    "saved anew": lambda c: save_anew(c, 5),
    "trashed and saved anew between two looks": lambda c: (c.trash(6), save_anew(c, 6)),
    "no verdict": lambda c: forget_verdict(c, 6),
    "a save that begins": lambda c: begin_save(c, 7),
    "and ends": lambda c: save_step(c, 7, save_id="ends"),
    "a step in quarantine": lambda c: c.quarantine(7),
    "a foreign folder": lambda c: c.store.write("step-8/model.pt", b"somebody else's"),
    "a folder that is no step": lambda c: c.store.write("step-08/model.pt", b"nobody's"),
    "a step that is removed": lambda c: remove_folder(c, "step-5"),
    "a policy": lambda c: c.records.begin_run("another", None),
    "a trash that somebody emptied": lambda c: remove_folder(c, names.TRASH),
    "no memory": lambda c: remove_folder(c, names.PRIVATE),
}


SEEN_CLOSELY = {
    "saved anew",  # wholly between two looks, in a folder that was seen to be remains
    "a step that is removed",  # this server goes on listing the names of empty folders
    "an export that is removed",
}


def test_every_change_is_seen_at_the_next_look(catalog: Catalog) -> None:
    observer = catalog.observer()
    assert observer.observe(now=NOW) == catalog.observe()
    for what, change in CHANGES.items():
        change(catalog)
        if what in SEEN_CLOSELY and not is_local(catalog):
            observer.look_closely()
        assert observer.observe(now=NOW + 1) == catalog.observe(), what
    assert observer.observe(now=NOW + 1) == catalog.observe()


def shard(catalog: Catalog) -> str:
    return next(f"step-5/{e.path}" for e in catalog.manifest(5).files if ".distcp" in e.path)


def adopt(catalog: Catalog) -> None:
    lineage = Lineage(run_id="run")
    catalog.adopt(Manifest(step=9, save_id="a", created_at="", lineage=lineage, files=()))


HIDDEN: dict[str, Change] = {
    "a pin": lambda c: c.pin(5, name="paper", reason=""),
    "no pin": lambda c: c.unpin(5),
    "a truncated shard": lambda c: c.store.write(shard(c), b"short"),
    "a lost shard": lambda c: c.store.delete([shard(c)]),
    "an adopted folder": adopt,
    "a broken manifest": lambda c: c.store.write("step-5/ray_ckpt.manifest.json", b"{"),
    "no manifest": lambda c: c.store.delete(["step-5/ray_ckpt.manifest.json"]),
}


def test_what_only_files_show_is_seen_at_the_next_close_look(catalog: Catalog) -> None:
    observer, now = catalog.observer(), NOW
    save_step(catalog, 5)
    catalog.store.write("step-9/.metadata", b"somebody else's")
    observer.observe(now=now)
    for what, change in HIDDEN.items():
        change(catalog)
        if what != "a truncated shard":  # in place: the folder's own entries stay the same
            is_seen = observer.observe(now=now + 1) == catalog.observe()
            assert is_seen == is_local(catalog), what
        now += CLOSE_EVERY_S
        assert observer.observe(now=now) == catalog.observe(), what


def test_a_close_look_can_be_asked_for(remote: Catalog) -> None:
    save_step(remote, 5)
    observer = remote.observer()
    observer.observe(now=NOW)
    remote.pin(5, name="paper", reason="")
    assert observer.observe(now=NOW + 1).checkpoints[0].pins == ()
    assert pins(remote.checkpoint(5)) == ["paper"]
    observer.look_closely()
    assert pins(observer.observe(now=NOW + 1).checkpoints[0]) == ["paper"]


@pytest.mark.parametrize("minutes", [-60, 60])
def test_a_clock_that_is_set_makes_the_next_look_a_close_one(remote: Catalog, minutes: int) -> None:
    save_step(remote, 5)
    observer = remote.observer()
    observer.observe(now=1e9)
    remote.pin(5, name="paper", reason="")
    assert pins(observer.observe(now=1e9 + 60 * minutes).checkpoints[0]) == ["paper"]


@pytest.mark.parametrize("half", ["trashed", "restored"])
def test_a_look_between_two_requests_is_not_believed_for_long(
    remote: Catalog, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(remote, 5)
    if half == "restored":
        remote.trash(5)
    observer = remote.observer()
    observer.observe(now=NOW)
    delete = remote.store.delete

    def look_and_delete(keys: Sequence[str]) -> None:
        observer.observe(now=NOW + 1)
        delete(keys)

    monkeypatch.setattr(remote.store, "delete", look_and_delete)
    (remote.trash if half == "trashed" else remote.restore)(5)
    after = CheckpointState.TRASHED if half == "trashed" else CheckpointState.COMMITTED
    assert states(observer.observe(now=NOW + 2)) == [(5, after)]


def test_the_index_of_tensors_is_not_remembered(catalog: Catalog) -> None:
    tensors = (TensorEntry(name="w", dtype="float32", shape=(2,)),)
    staging = stage(catalog, 5, files={}, save_id="a")
    lineage = Lineage(run_id="run")
    manifest = Manifest(
        step=5, save_id="a", created_at="", lineage=lineage, files=(), tensors=tensors
    )
    catalog.commit_step(staging, manifest)
    assert catalog.manifest(5) == manifest
    assert catalog.observe().checkpoints[0].manifest == replace(manifest, tensors=())


# ---- what it costs ----


def counted(catalog: Catalog) -> tuple[Observer, CountingStore]:
    store = CountingStore(catalog.store)
    return Catalog(store, catalog.commit).observer(), store


@pytest.fixture(params=[10, pytest.param(100, marks=pytest.mark.slow)])
def num_steps(request: pytest.FixtureRequest) -> int:
    return request.param


def fill(catalog: Catalog, num_steps: int) -> None:
    """Every step verified, half of them exported, each third one trashed."""
    for step in range(1, num_steps + 1):
        save_step(catalog, step)
        verify(catalog, step)
        if step % 2 == 0:
            export(catalog, step)
        if step % 3 == 0:
            catalog.trash(step)


@pytest.mark.s3
def test_an_object_store_is_asked_for_each_manifest_once(remote: Catalog, num_steps: int) -> None:
    fill(remote, num_steps)
    observer, store = counted(remote)
    first = observer.observe(now=NOW)
    once = num_steps + num_steps // 2  # manifests: each step's in place or aside, and exports'
    # folders: root, trash, quarantine, exports, hf; files: steps, trash, exports; notes, records,
    # requests, commands; GET: manifests, records, and run.json, which is not there
    assert store.take() == {"LIST": 13, "GET": once + num_steps + 1}
    assert observer.observe(now=NOW + 1) == first
    assert store.take() == {"LIST": 10, "GET": 1}
    assert observer.observe(now=NOW + CLOSE_EVERY_S) == first
    assert store.take() == {"LIST": 13, "GET": 1}


@pytest.mark.s3
def test_one_more_step_costs_one_listing_and_one_read(remote: Catalog) -> None:
    fill(remote, 10)
    observer, store = counted(remote)
    observer.observe(now=NOW)
    store.take()
    save_step(remote, 11)
    observer.observe(now=NOW + 1)
    assert store.take() == {"LIST": 10 + 1, "GET": 1 + 1}
    verify(remote, 11)
    observer.observe(now=NOW + 2)
    assert store.take() == {"LIST": 10, "GET": 1 + 1}


def test_a_folder_of_files_is_asked_for_each_manifest_once(root: str, num_steps: int) -> None:
    local = open_catalog(root)
    fill(local, num_steps)
    observer, store = counted(local)
    first = observer.observe(now=NOW)
    once = num_steps + num_steps // 2
    # once: whether there are marks; then of each folder and its manifest
    stats = 1 + 2 * once
    assert store.take() == {"LIST": 12, "GET": once + num_steps + 1, "STAT": stats}
    assert observer.observe(now=NOW + 1) == first
    assert store.take() == {"LIST": 9, "GET": 1, "STAT": stats}


def test_one_step_is_looked_at_without_reading_the_others(catalog: Catalog) -> None:
    for step in range(1, 11):
        save_step(catalog, step)
    store = CountingStore(catalog.store)
    assert Catalog(store, catalog.commit).checkpoint(5).step == 5
    assert store.take() == {"LIST": 4, "GET": 2, "HEAD": 1}


@pytest.mark.s3
def test_a_verb_is_one_request_and_no_more(s3_root: str, proxy: S3Proxy) -> None:
    store = open_catalog(s3_root).store
    store.write("step-5/a", b"x")
    proxy.requests.clear()
    store.read("step-5/a")
    list(store.list_objects(""))
    list(store.list_objects("absent"))
    list(store.list_objects("", prefix="step-"))
    store.list_folders("")
    store.list_folders("absent")
    store.stat("step-5/a")
    lists = [line for line in proxy.requests if "list-type=2" in line]
    assert len(lists) == 5
    assert [line.partition(" ")[0] for line in proxy.requests] == [*["GET"] * 6, "HEAD"]
