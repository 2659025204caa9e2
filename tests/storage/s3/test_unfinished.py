"""Uploads that a death has cut off hold bytes that no listing shows: ours are found and aborted."""

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.garbage import ABANDONED_AFTER_S, GRACE_S
from ray_ckpt.core.wanted import publish_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.garbage import find_garbage, remove_garbage
from ray_ckpt.storage.s3.store import S3Store
from tests.storage.steps import FILES, content_of, save_export, save_step
from tests.waiting import wait_for

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("own_temporary_folder")]
PART_BYTES = 5 << 20
MEBIBYTES = 1024


@pytest.fixture
def catalog(s3_root: str) -> Catalog:
    return open_catalog(s3_root)


def begin_upload(uri: str, key: str) -> None:
    """The first part of an object is there, and whoever sent it is heard of no more."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    own = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    call = partial(S3Store(uri).request, key)
    upload_id = call("create_multipart_upload", **own)["UploadId"]
    call("upload_part", **own, UploadId=upload_id, PartNumber=1, Body=b"x" * PART_BYTES)


def uploads(uri: str, folder: str = "") -> list[str]:
    """Keys of all that was begun and not ended below a folder."""
    return [write.key for write in S3Store(uri).list_unfinished(folder)]


def begin_save(catalog: Catalog, step: int) -> None:
    catalog.store.write(names.begun_key(names.step_dir(step)), b"")


def clean(catalog: Catalog, *, age_s: float = ABANDONED_AFTER_S + 60) -> dict[str, int]:
    """How many bytes each thing held that is gone now."""
    found = find_garbage(catalog, catalog.observe(), now=time.time() + age_s)
    assert remove_garbage(found, guard=lambda: None) == []
    return {garbage.what: garbage.size_bytes for garbage in found}


def _upload(uri: str, source: str) -> None:
    open_catalog(uri).commit.contribute(Path(source), "step-7")


def test_the_upload_of_a_rank_that_was_killed_is_gone_after_gc(
    s3_root: str, tmp_path: Path
) -> None:
    """The process is really killed in the middle of sending one large file."""
    (tmp_path / "files").mkdir()
    with (tmp_path / "files" / "__0_dead_0.distcp").open("wb") as file:
        file.truncate(MEBIBYTES << 20)
    rank = multiprocessing.get_context("spawn").Process(
        target=_upload, args=(s3_root, str(tmp_path / "files"))
    )
    rank.start()
    store = S3Store(s3_root)
    wait_for(lambda: store.list_unfinished("step-7"))
    os.kill(rank.pid or 0, signal.SIGKILL)
    rank.join()
    catalog = open_catalog(s3_root)
    assert uploads(s3_root, "step-7") == ["step-7/__0_dead_0.distcp"]
    assert clean(catalog, age_s=GRACE_S - 600) == {}
    assert list(clean(catalog)) == ["attempt save-step-7"]
    assert uploads(s3_root, "step-7") == []
    assert list(catalog.store.list_objects(names.STAGING)) == []


def test_uploads_of_others_stay(catalog: Catalog, s3_bucket: str) -> None:
    """Beside the root, and in it where no note of ours says that a save has begun."""
    begin_save(catalog, 7)
    begin_upload(catalog.uri, "step-7/__0_dead_0.distcp")
    begin_upload(catalog.uri, ".ray_ckpt/actions/a.json")
    begin_upload(catalog.uri, "step-8/theirs.bin")
    begin_upload(f"s3://{s3_bucket}/theirs", "model.bin")
    begin_upload(f"{catalog.uri}-too", "step-7/__0_theirs_0.distcp")
    assert clean(catalog) == {"attempt save-step-7": PART_BYTES, "unfinished write": PART_BYTES}
    assert uploads(catalog.uri, "step-7") == uploads(catalog.uri, names.PRIVATE) == []
    assert uploads(catalog.uri, "step-8") == ["step-8/theirs.bin"]
    assert uploads(f"s3://{s3_bucket}", "theirs") == ["theirs/model.bin"]
    assert uploads(f"{catalog.uri}-too", "step-7") == ["step-7/__0_theirs_0.distcp"]


def test_the_next_save_of_the_step_aborts_what_a_dead_one_had_begun(catalog: Catalog) -> None:
    begin_save(catalog, 7)
    begin_upload(catalog.uri, "step-7/__0_dead_0.distcp")
    save_step(catalog, 7, save_id="anew")
    assert uploads(catalog.uri, "step-7") == []
    assert content_of(catalog, 7) == FILES


def test_a_save_that_is_at_work_on_one_large_file_is_not_dead(catalog: Catalog) -> None:
    """Its note is old, but parts of the file still come."""
    begin_save(catalog, 7)
    note = catalog.store.stat(names.begun_key("step-7"))
    assert note is not None
    wait_for(lambda: time.time() > note.modified_at + 2)
    begin_upload(catalog.uri, "step-7/__0_large_0.distcp")
    (remains,) = catalog.commit.remains()
    assert remains.changed_at >= note.modified_at + 1


SPEC = ExportSpec(name="hf")


def exported(root: str) -> Catalog:
    source = open_catalog(root)
    save_step(source, 5)
    save_export(source, "hf", 5, files={"model.safetensors": b"weights"}, save_id="e5")
    return source


def test_the_next_attempt_to_publish_leaves_no_upload_of_a_dead_one(
    root: str, s3_root: str
) -> None:
    """Scenario 40: the uploader is killed; the next one finishes, and nothing is left over."""
    source, target = exported(root), open_catalog(s3_root)
    folder = names.export_dir("hf", 5)
    target.store.write(names.begun_key(folder), b"")
    begin_upload(s3_root, f"{folder}/model.safetensors")
    publish_export(source, source.export("hf", 5), s3_root)
    assert target.export("hf", 5).manifest == source.export("hf", 5).manifest
    assert uploads(s3_root, folder) == []


def test_a_publish_that_died_for_good_is_tidied_at_its_destination(root: str, s3_root: str) -> None:
    """Scenario 40: also where nobody tries again, gc of the run leaves no upload of ours there."""
    source, target = exported(root), open_catalog(s3_root)
    for step in (5, 6):
        target.store.write(names.begun_key(names.export_dir("hf", step)), b"")
        begin_upload(s3_root, f"{names.export_dir('hf', step)}/model.safetensors")
    publish = publish_action(source.checkpoint(5), SPEC, s3_root)
    failed = ActionRecord(action=publish).started(1.0).failed(TransientError("gone"), 1.0)
    source.records.write_action(failed)
    assert clean(source) == {"attempt export-hf-step-5": PART_BYTES}
    assert uploads(s3_root, "exports") == [f"{names.export_dir('hf', 6)}/model.safetensors"]
