"""The trash of an object store: a step is saved anew beside older saves, and all come back."""

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import StepExistsError, UsageError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.wanted import purge_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_object
from ray_ckpt.storage.lease import Lease
from tests.storage.steps import FILES, content_of, empty_trash, save_step

pytestmark = pytest.mark.s3
OLD = {".metadata": b"old index", "__0_0.distcp": b"old weights", "hf_assets/a.json": b"old"}
NEW = {".metadata": b"new index", "__0_0.distcp": b"new weights", "hf_assets/b.json": b"new"}
LATER = "2030-01-02T03:04:06+00:00"


@pytest.fixture
def catalog(s3_root: str) -> Catalog:
    return open_catalog(s3_root)


def keys(catalog: Catalog, folder: str) -> list[str]:
    return sorted(info.key for info in catalog.store.list_objects(folder))


def states(catalog: Catalog) -> list[tuple[int, CheckpointState]]:
    return [(view.step, view.state) for view in catalog.observe().checkpoints]


def save_old_then_new(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    catalog.trash(10)
    save_step(catalog, 10, files=NEW, save_id="new", created_at=LATER)


def test_a_trashed_step_leaves_its_shards_alone_in_place(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    catalog.trash(10)
    assert keys(catalog, "step-10") == ["step-10/__0_old_0.distcp"]
    assert states(catalog) == [(10, CheckpointState.TRASHED)]
    aside = ".ray_ckpt/trash/step-10.old"
    moved = [".metadata", "hf_assets/a.json", names.MANIFEST]
    assert keys(catalog, aside) == [f"{aside}/{name}" for name in moved]


def test_a_step_saved_anew_and_the_trashed_one_are_both_whole(catalog: Catalog) -> None:
    save_old_then_new(catalog)
    assert content_of(catalog, 10) == NEW
    with pytest.raises(StepExistsError):
        catalog.restore(10)
    assert content_of(catalog, 10) == NEW
    catalog.trash(10)
    catalog.restore(10)
    assert content_of(catalog, 10) == NEW, "undo brings back the newest"
    catalog.verify(10)
    catalog.quarantine(10)  # the newest out of the way, for good
    catalog.restore(10)
    assert content_of(catalog, 10) == OLD
    catalog.verify(10)


def test_erasing_one_save_frees_its_objects_and_no_other(catalog: Catalog) -> None:
    save_old_then_new(catalog)
    in_place = keys(catalog, "step-10")
    aside = keys(catalog, names.TRASH)
    sizes = {i.key: i.size_bytes for i in catalog.store.list_objects("")}
    freed = catalog.commit.erase(".ray_ckpt/trash/step-10.old", "step-10")
    assert keys(catalog, "step-10") == [k for k in in_place if "_old_" not in k]
    assert keys(catalog, names.TRASH) == []
    assert freed == sum(sizes[key] for key in [*aside, "step-10/__0_old_0.distcp"])
    catalog.verify(10)
    assert catalog.commit.erase(".ray_ckpt/trash/step-10.old", "step-10") == 0


def test_the_trash_is_emptied_save_by_save(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    purged = purge_action(catalog.checkpoint(10), grace_s=60.0)
    catalog.trash(10)
    catalog.records.write_action(ActionRecord(action=purged).started(1.0).succeeded({}, 1.0))
    save_step(catalog, 10, files=NEW, save_id="new", created_at=LATER)
    catalog.trash(10)
    assert list(empty_trash(catalog, older_than_s=60.0, now=100.0)) == [10]
    catalog.restore(10)
    assert content_of(catalog, 10) == NEW


def test_a_restore_that_died_before_its_end_does_not_cost_the_step_its_shards(
    catalog: Catalog,
) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    marker = catalog.store.read(names.manifest_key("step-10"))
    catalog.trash(10)
    catalog.store.copy(".ray_ckpt/trash/step-10.old/.metadata", "step-10/.metadata")
    catalog.store.copy(".ray_ckpt/trash/step-10.old/hf_assets/a.json", "step-10/hf_assets/a.json")
    catalog.store.create(names.manifest_key("step-10"), marker)
    catalog.commit.erase(".ray_ckpt/trash/step-10.old", "step-10")
    catalog.verify(10)
    assert states(catalog) == [(10, CheckpointState.COMMITTED)]


def test_pins_go_with_the_save_they_were_set_on(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    catalog.pin(10, name="ada", reason="the paper")
    catalog.trash(10)
    save_step(catalog, 10, files=NEW, save_id="new", created_at=LATER)
    assert catalog.pins(10) == ()
    catalog.quarantine(10)
    catalog.restore(10)
    assert [pin.name for pin in catalog.pins(10)] == ["ada"]


def test_an_adopted_step_whose_files_have_names_of_their_own_is_copied_whole(
    catalog: Catalog,
) -> None:
    for name, data in OLD.items():
        catalog.store.write(f"step-10/{name}", data)
    entries = [
        describe_object(catalog.store, f"step-10/{n}", name=n, algorithm=STRONG_ALGORITHM)
        for n in OLD
    ]
    lineage = Lineage(run_id="run", adopted=True)
    files = tuple(entries)
    adopted = Manifest(step=10, save_id="a", created_at="", lineage=lineage, files=files)
    catalog.adopt(adopted)
    catalog.trash(10)
    assert keys(catalog, "step-10") == []
    save_step(catalog, 10, files=NEW, save_id="new", created_at=LATER)
    catalog.quarantine(10)
    catalog.restore(10)
    assert content_of(catalog, 10) == OLD
    catalog.verify(10)


def half_a_save(catalog: Catalog, save_id: str = "dead") -> None:
    """One rank of two has uploaded its files when the save dies."""
    staging = catalog.commit.staging(f"save-{save_id}")
    for name, data in {f"__0_{save_id}_0.distcp": b"half", ".metadata": b"half"}.items():
        (staging / name).write_bytes(data)
    catalog.commit.contribute(staging, "step-10")
    catalog.commit.discard(staging)


def test_what_a_dead_save_left_is_gone_before_the_next_one_begins(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    catalog.trash(10)
    half_a_save(catalog)
    save_step(catalog, 10, files=NEW, save_id="new", created_at=LATER)
    assert not any("_dead_" in key for key in keys(catalog, "step-10"))
    assert content_of(catalog, 10) == NEW
    catalog.quarantine(10)
    catalog.restore(10)
    assert content_of(catalog, 10) == OLD


def test_the_next_trainer_sweeps_what_a_dead_save_left(catalog: Catalog) -> None:
    half_a_save(catalog)
    save_step(catalog, 9)
    (dead,) = catalog.commit.remains()
    assert (dead.attempt, dead.size_bytes) == ("save-step-10", 2 * len(b"half"))
    catalog.commit.give_up(dead)
    assert keys(catalog, "step-10") == keys(catalog, names.STAGING) == []
    assert content_of(catalog, 9) == FILES


def test_undo_clears_a_dead_save_out_of_its_way_but_not_a_living_one(catalog: Catalog) -> None:
    save_step(catalog, 10, files=OLD, save_id="old")
    catalog.trash(10)
    half_a_save(catalog)
    trainer = Lease(catalog.store, "trainer", owner="job")
    trainer.acquire()
    with pytest.raises(UsageError, match="may be being saved anew, by process"):
        catalog.restore(10)
    trainer.release()
    catalog.restore(10)
    assert content_of(catalog, 10) == OLD
    catalog.verify(10)
    assert states(catalog) == [(10, CheckpointState.COMMITTED)]
    assert not any("dead" in key for key in keys(catalog, "step-10"))


def test_newer_steps_are_rolled_back_and_come_back(catalog: Catalog) -> None:
    for step in (10, 20, 30):
        save_step(catalog, step)
    assert catalog.roll_back(10, now=0.0) == [20, 30]
    save_step(catalog, 20, files=NEW, save_id="new", created_at=LATER)
    catalog.restore(30)
    assert [step for step, state in states(catalog) if state is CheckpointState.COMMITTED] == [
        10,
        20,
        30,
    ]
    for step in (10, 20, 30):
        catalog.verify(step)
    catalog.quarantine(20)
    catalog.restore(20)
    assert content_of(catalog, 20) == FILES
