"""What a store does is found out before anything relies on it; what it lacks is done otherwise."""

import logging

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, TransientError
from ray_ckpt.core.store_features import Creates, StoreFeatures
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.s3.store import S3Store
from tests.servers.lesser_s3 import Lack, LesserS3

pytestmark = pytest.mark.s3
AS_AWS = StoreFeatures()


@pytest.fixture
def store(s3_root: str, lesser: LesserS3) -> S3Store:
    return S3Store(s3_root)


def keys(store: S3Store) -> set[str]:
    return {info.key for info in store.list_objects("")}


def records(store: S3Store) -> set[str]:
    return {key for key in keys(store) if key.startswith(f"{names.PRIVATE}/store-")}


def test_a_store_that_does_everything_is_known_as_one(store: S3Store, lesser: LesserS3) -> None:
    assert store.features.find_out() == AS_AWS
    assert store.weaknesses() == ()
    assert len(lesser.requests) < 45
    assert keys(store) == records(store)
    assert store.list_unfinished("") == []


@pytest.mark.parametrize(
    ("lack", "creates"),
    [
        (Lack.CREATES, Creates.IGNORED),
        (Lack.EXCLUSIVE_CREATES, Creates.RACY),
        (Lack.CREATE_REQUESTS, Creates.REFUSED),
    ],
)
def test_creates_that_are_not_exclusive_are_found_out(
    store: S3Store, lesser: LesserS3, lack: Lack, creates: Creates
) -> None:
    lesser.lacks.add(lack)
    assert store.features.find_out() == StoreFeatures(creates=creates)
    assert keys(store) == records(store)


def test_ignored_checksums_are_found_out(store: S3Store, lesser: LesserS3) -> None:
    lesser.lacks.add(Lack.CHECKSUMS)
    assert store.features.find_out() == StoreFeatures(checks_checksums=False)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (r"POST .*\?delete", StoreFeatures(deletes_in_batches=False)),
        (r"GET .*\?uploads", StoreFeatures(lists_uploads=False)),
        (r"PUT .*/copy", StoreFeatures(copies=False)),
    ],
)
def test_requests_that_the_store_does_not_have_are_found_out(
    store: S3Store, lesser: LesserS3, match: str, expected: StoreFeatures
) -> None:
    lesser.fail(match=match, status=501, code="NotImplemented")
    assert store.features.find_out() == expected
    assert keys(store) == records(store)


def test_what_these_keys_may_not_do_is_not_held_against_the_store(
    store: S3Store, lesser: LesserS3
) -> None:
    for match in (r"POST .*\?delete", r"DELETE ", r"GET .*\?uploads", r"PUT .*/copy"):
        lesser.fail(match=match, status=403, code="AccessDenied")
    assert store.features.find_out() == AS_AWS


def test_a_store_that_fails_meanwhile_is_asked_for_nothing_more(
    store: S3Store, lesser: LesserS3
) -> None:
    lesser.fail(match="PUT .*/known", status=400, code="RequestTimeout")
    with pytest.raises(TransientError):
        store.create("a", b"")
    assert "/known" in lesser.requests[-1]
    lesser.recover()
    store.create("a", b"")
    assert store.weaknesses() == ()


def test_late_listings_are_found_out(store: S3Store, lesser: LesserS3, s3_bucket: str) -> None:
    lesser.lists_lag(s3_bucket)
    assert store.features.find_out() == StoreFeatures(lists_at_once=False)


def test_it_is_found_out_once_and_told_once(
    store: S3Store, lesser: LesserS3, caplog: pytest.LogCaptureFixture
) -> None:
    lesser.lacks.add(Lack.CREATES)
    with caplog.at_level(logging.WARNING, "ray_ckpt"):
        store.create("a", b"1")
        asked = len(lesser.requests)
        S3Store(store.uri).create("b", b"2")
    assert len(lesser.requests) - asked < 15
    [told] = [r.getMessage() for r in caplog.records]
    assert told.startswith(f"{store.uri}: If-None-Match is ignored")


def test_another_process_reads_what_was_found_out(
    store: S3Store, lesser: LesserS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesser.lacks.add(Lack.CREATES)
    store.features.find_out()
    monkeypatch.setattr("ray_ckpt.storage.s3.features._known", {})
    asked = len(lesser.requests)
    assert S3Store(store.uri).features.get().creates is Creates.IGNORED
    assert [line.split("?")[0].split(" ")[0] for line in lesser.requests[asked:]] == ["GET"]


def test_what_cannot_be_read_is_found_out_anew(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.features.find_out()
    [record] = records(store)
    store.write(record, b"{")
    monkeypatch.setattr("ray_ckpt.storage.s3.features._known", {})
    assert S3Store(store.uri).features.get() == AS_AWS
    assert StoreFeatures.from_json(store.read(record)) == AS_AWS


def test_bytes_that_changed_on_their_way_are_noticed_where_the_store_does_not(
    store: S3Store, lesser: LesserS3
) -> None:
    lesser.lacks.add(Lack.CHECKSUMS)
    store.create("step-1/ray_ckpt.manifest.json", b"{}")
    lesser.spoil(match="GET .*manifest", times=1)
    with pytest.raises(IntegrityError, match="differs from what was sent"):
        store.create("step-2/ray_ckpt.manifest.json", b"{}")


def test_without_batches_every_object_goes_by_itself(store: S3Store, lesser: LesserS3) -> None:
    lesser.fail(match="POST .*delete", status=501, code="NotImplemented")
    for name in "abc":
        store.write(name, b"x")
    store.delete(["a", "b", "absent", "c"])
    assert keys(store) == set()
    assert sum("delete" in line for line in lesser.requests) == 1


def test_uploads_that_cannot_be_listed_are_none(store: S3Store, lesser: LesserS3) -> None:
    lesser.fail(match=r"GET .*\?uploads", status=501, code="NotImplemented")
    assert store.list_unfinished("") == []


def test_a_disk_lacks_nothing(tmp_path) -> None:
    assert LocalStore(str(tmp_path)).weaknesses() == ()
