"""What nobody needs goes, each thing for its reason; whatever else is there stays."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.garbage import ABANDONED_AFTER_S, GRACE_S
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.retention import CLOCK_SKEW_S
from ray_ckpt.core.wanted import publish_action, purge_action, verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.scratch import make_scratch, remove_scratch
from ray_ckpt.storage.election import claims_dir
from ray_ckpt.storage.garbage import find_garbage, remove_garbage
from ray_ckpt.storage.lease import TRAINER, Lease
from ray_ckpt.storage.readers import reading
from tests.roots import snapshot
from tests.storage.steps import save_export, save_step
from tests.storage.test_commit_crash import FIRST, World, deaths, truth, worlds
from tests.waiting import wait_for

__all__ = ["worlds"]
LATER = time.time() + 100 * ABANDONED_AFTER_S
SPEC = ExportSpec(name="hf")


pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return open_catalog(request.getfixturevalue("root" if request.param == "local" else "s3_root"))


def garbage(catalog: Catalog, *, now: float = LATER) -> dict[str, str]:
    """Why each thing may go that is there."""
    return {found.what: found.why for found in find_garbage(catalog, catalog.observe(), now=now)}


def clean(catalog: Catalog, *, now: float = LATER) -> None:
    found = find_garbage(catalog, catalog.observe(), now=now)
    assert remove_garbage(found, guard=lambda: None) == []


def half_a_save(catalog: Catalog, step: int = 7, *, data: bytes = b"half") -> None:
    """What a rank has written and handed over when its process dies."""
    staging = catalog.commit.staging(f"save-step-{step}")
    (staging / "__0_dead_0.distcp").write_bytes(data)
    catalog.commit.contribute(staging, names.step_dir(step))
    catalog.commit.leave(staging)


def succeeded(catalog: Catalog, action: Action, *, at: float) -> ActionRecord:
    record = ActionRecord(action=action).started(at).succeeded({}, at)
    catalog.records.write_action(record)
    return record


def test_a_healthy_root_holds_nothing_that_can_go(catalog: Catalog) -> None:
    save_step(catalog, 5)
    save_export(catalog, "hf", 5, files=FIRST, save_id="e5")
    catalog.pin(5, name="paper", reason="")
    succeeded(catalog, verify_action(catalog.checkpoint(5)), at=1.0)
    catalog.store.write(f"{names.EVENTS}/20261122T154540.120Z-manager-c0ffee.jsonl", b"{}\n")
    assert garbage(catalog) == {}


def test_a_save_that_died_goes_once_no_trainer_writes_and_it_is_old_enough(
    catalog: Catalog,
) -> None:
    """Scenario 3: all shards are there, the manifest is not; the bytes come back by gc."""
    save_step(catalog, 5)
    half_a_save(catalog)
    now = time.time()
    assert garbage(catalog, now=now + GRACE_S - 60) == {}
    trainer = Lease(catalog.store, TRAINER, owner="job")
    trainer.acquire()
    assert garbage(catalog, now=now + GRACE_S + 60) == {}
    assert (
        "untouched for" in garbage(catalog, now=now + ABANDONED_AFTER_S + 60)["attempt save-step-7"]
    )
    trainer.release()
    why = garbage(catalog, now=now + GRACE_S + 60)["attempt save-step-7"]
    assert why.endswith("and no trainer writes here")
    clean(catalog, now=now + GRACE_S + 60)
    assert garbage(catalog) == {}
    assert list(catalog.store.list_objects("step-7")) == []
    assert [view.step for view in catalog.observe().readable()] == [5]


def test_an_export_that_died_goes_after_hours(catalog: Catalog) -> None:
    staging = catalog.commit.staging("export-hf-step-5")
    (staging / "model.safetensors").write_bytes(b"half")
    catalog.commit.contribute(staging, "exports/hf/step-5")
    catalog.commit.leave(staging)
    assert garbage(catalog, now=time.time() + GRACE_S + 60) == {}
    assert list(garbage(catalog)) == ["attempt export-hf-step-5"]
    clean(catalog)
    assert garbage(catalog) == {}
    assert list(catalog.store.list_objects("exports")) == []


def test_the_trash_is_emptied_when_its_grace_time_is_over(catalog: Catalog) -> None:
    """The record of the purge goes with it, since nothing is left that it tells of."""
    for step in (5, 6):
        save_step(catalog, step)
    purge, now = purge_action(catalog.checkpoint(5), grace_s=3600.0), time.time()
    catalog.trash(5)
    succeeded(catalog, purge, at=now)
    assert garbage(catalog, now=now + 3600 + CLOCK_SKEW_S - 60) == {}
    assert list(garbage(catalog, now=now + 3600 + CLOCK_SKEW_S + 60)) == ["trashed step-5"]
    clean(catalog, now=now + 3600 + CLOCK_SKEW_S + 60)
    assert list(catalog.store.list_objects(names.TRASH)) == []
    assert list(garbage(catalog, now=now + 3600 + CLOCK_SKEW_S + 60)) == ["record of purge step-5"]
    clean(catalog, now=now + 3600 + CLOCK_SKEW_S + 60)
    assert catalog.records.actions() == {}


def test_a_folder_in_the_trash_that_is_half_erased_goes(catalog: Catalog) -> None:
    """Scenario 49: a kill in the middle of a delete; what comes next ends it."""
    catalog.store.write(f"{names.TRASH}/step-5.abc/__0_0.distcp", b"left")
    assert garbage(catalog, now=time.time() + GRACE_S - 60) == {}
    assert garbage(catalog) == {"trashed step-5": "it is half erased"}
    clean(catalog)
    assert list(catalog.store.list_objects(names.TRASH)) == []


def test_the_heartbeat_of_a_dead_reader_goes_and_that_of_a_living_one_stays(
    catalog: Catalog,
) -> None:
    catalog.store.write(names.reader_key(5, "dead"), b"{}")
    catalog.store.write(names.running_key("0123456789abcdef", 2), b"{}")
    with reading(catalog.store, 6, who="load"):
        assert garbage(catalog, now=time.time()) == {}
    assert sorted(garbage(catalog)) == [
        "heartbeat of a reader of step-5",
        "heartbeat of attempt 2 of action 0123456789abcdef",
    ]
    clean(catalog)
    assert list(catalog.store.list_objects(names.PRIVATE)) == []


def test_claims_and_probes_of_the_dead_go(catalog: Catalog) -> None:
    catalog.store.write(f"{claims_dir('a')}/0123456789abcdef.json", b"{}")
    catalog.store.write(f"{names.PROBES}/dead/first", b"plain")
    assert garbage(catalog, now=time.time()) == {}
    assert sorted(garbage(catalog)) == ["claim of a dead process", "probe of a dead process"]
    clean(catalog)
    assert list(catalog.store.list_objects(names.PRIVATE)) == []


def test_records_stay_while_anything_is_left_of_the_checkpoint(catalog: Catalog) -> None:
    """Wherever it lies, or if a copy of it was made."""
    for step in (1, 2, 3, 4):
        save_step(catalog, step)
    verified = {
        step: succeeded(catalog, verify_action(catalog.checkpoint(step)), at=1.0).action
        for step in (1, 2, 3, 4)
    }
    copied = Action(
        kind=ActionKind.PUBLISH,
        step=3,
        source_id=verified[3].source_id,
        export=SPEC,
        destination="/elsewhere",
    )
    succeeded(catalog, copied, at=1.0)
    for step, action in verified.items():
        catalog.store.write(names.log_key(action.key, 1), b"text")
        catalog.trash(step)
    catalog.restore(1)
    succeeded(catalog, verified[1], at=1.0)
    for step in (3, 4):
        catalog.commit.erase(f"{names.TRASH}/step-{step}.save{step}", names.step_dir(step))
    assert sorted(garbage(catalog)) == ["log of verify step-4", "record of verify step-4"]
    clean(catalog)
    assert set(catalog.records.actions()) == {verified[s].key for s in (1, 2, 3)} | {copied.key}
    logs = {names.parse_log(info.key) for info in catalog.store.list_objects(names.LOGS)}
    assert logs == {verified[step].key for step in (1, 2, 3)}


@pytest.mark.parametrize("place", ["", "https://host/x", "/proc/x"])
def test_a_copy_that_was_begun_at_no_place_is_in_nobodys_way(root: str, place: str) -> None:
    """A manager tidies up: what it raised here would end every round of it."""
    catalog = open_catalog(root)
    save_step(catalog, 5)
    copy = publish_action(catalog.checkpoint(5), None, place)
    failed = UsageError("no backend")
    catalog.records.write_action(
        ActionRecord(action=copy).started(1.0).failed(failed, 1.0, jitter=0.0)
    )
    assert garbage(catalog) == {}


@pytest.mark.parametrize("skew_s", [-CLOCK_SKEW_S, CLOCK_SKEW_S])
def test_clocks_that_differ_by_ten_minutes_take_nothing_that_is_needed(
    catalog: Catalog, skew_s: float
) -> None:
    """Scenario 34: of the store, of whoever purged, and of whoever tidies up."""
    for step in (5, 6):
        save_step(catalog, step)
    now = time.time()
    purge = purge_action(catalog.checkpoint(5), grace_s=3600.0)
    catalog.trash(5)
    succeeded(catalog, purge, at=now)
    half_a_save(catalog)
    with reading(catalog.store, 6, who="load"):
        assert garbage(catalog, now=now + skew_s) == {}
        assert "trashed step-5" not in garbage(catalog, now=now + 3600.0 + skew_s - 1)


def test_what_is_not_of_our_making_is_never_looked_at(root: str, tmp_path: Path) -> None:
    """Foreign folders, links and names that we do not write stay, however old they are."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-9").mkdir(parents=True)
    (elsewhere / "step-9" / "precious").write_bytes(b"x")
    private = Path(root, names.PRIVATE)
    for name in ("staging", "trash", "readers", "logs", "notes"):
        (private / name).mkdir(parents=True)
        (private / name / "of-mine.txt").write_bytes(b"x")
    (private / "staging" / "linked").symlink_to(elsewhere)
    (private / "trash" / "step-9.abc").symlink_to(elsewhere / "step-9")
    (private / "trash" / "holiday").mkdir()
    (Path(root) / "step-8").mkdir()
    (Path(root) / "step-8" / "__0_0.distcp").write_bytes(b"foreign")
    before = snapshot(root), snapshot(str(elsewhere))
    catalog = open_catalog(root)
    clean(catalog)
    assert (snapshot(root), snapshot(str(elsewhere))) == before


def test_a_write_that_never_ended_goes_and_other_peoples_stay(root: str) -> None:
    catalog = open_catalog(root)
    save_step(catalog, 5)
    own = Path(root, names.PRIVATE, "actions", ".tmp-0123")
    theirs = Path(root, "step-5", ".tmp-theirs")
    for path in (own, theirs):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert list(garbage(catalog)) == ["unfinished write"]
    clean(catalog)
    assert not own.exists()
    assert theirs.exists()


def _hold_a_scratch_folder(temporary: str) -> None:
    tempfile.tempdir = temporary
    (make_scratch("save-step-5") / "__0_0.distcp").write_bytes(b"half")
    signal.pause()


def test_a_scratch_folder_goes_once_its_process_is_gone(root: str) -> None:
    """However old it is: a process that lives keeps its folder."""
    catalog, temporary = open_catalog(root), tempfile.gettempdir()
    own = make_scratch("save-step-6")
    other = multiprocessing.get_context("spawn").Process(
        target=_hold_a_scratch_folder, args=(temporary,)
    )
    other.start()
    wait_for(lambda: list(Path(temporary).glob("ray_ckpt-save-step-5-*/__0_0.distcp")))
    Path(temporary, "ray_ckpt-demo-x").mkdir()
    assert garbage(catalog) == {}
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert list(garbage(catalog)) == ["scratch folder"]
    clean(catalog)
    assert sorted(path.name for path in Path(temporary).iterdir()) == ["ray_ckpt-demo-x", own.name]
    remove_scratch(own)


def test_a_removal_that_dies_is_ended_by_the_next_one(worlds: Iterator[World]) -> None:
    def litter(catalog: Catalog) -> None:
        half_a_save(catalog)
        save_step(catalog, 2)
        purge = purge_action(catalog.checkpoint(2), grace_s=3600.0)
        catalog.trash(2)
        succeeded(catalog, purge, at=1.0)
        catalog.store.write(names.reader_key(5, "dead"), b"{}")

    for world in deaths(worlds, _clean_twice, before=litter):
        catalog = world.catalog()
        assert truth(catalog) == {1: FIRST}
        clean(catalog)
        clean(catalog)
        assert garbage(catalog) == {}
        assert list(catalog.store.list_objects("step-2")) == []
        assert truth(catalog) == {1: FIRST}


def _clean_twice(catalog: Catalog) -> None:
    clean(catalog)
    clean(catalog)


def test_a_guard_that_raises_ends_it(root: str) -> None:
    """A manager that was paused finds out before each removal."""
    catalog = open_catalog(root)
    half_a_save(catalog)
    found = find_garbage(catalog, catalog.observe(), now=LATER)

    def taken_over() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        remove_garbage(found, guard=taken_over)
    assert list(garbage(catalog)) == ["attempt save-step-7"]
