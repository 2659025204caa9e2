"""Scenario 43: a listing lags behind writes, and nothing is lost for what it alone says.

AWS does not do this any more; stores that are built after it do, and caches in front of one.
"""

import time
from collections.abc import Iterator

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import PurgeRefusedError, UsageError
from ray_ckpt.core.wanted import purge_action
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.copies.retire import retire_copy
from ray_ckpt.storage.garbage import find_garbage, remove_garbage
from ray_ckpt.storage.purging import purge_step
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint
from tests.storage.copies.test_publish import make_export
from tests.storage.copies.test_retire import publish_of
from tests.storage.steps import FILES, content_of, empty_trash, save_step, stage
from tests.storage.test_purging import verified

pytestmark = pytest.mark.s3
NEW = {".metadata": b"new index", "__0_0.distcp": b"new weights", "hf_assets/b.json": b"new"}
LONG_S = 7 * 86400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.3)


@pytest.fixture
def catalog(s3_root: str) -> Catalog:
    """By whom the listings are seen as they are."""
    catalog = open_catalog(s3_root)
    assert catalog.store.stat("nothing") is None, "it has read the environment"
    return catalog


@pytest.fixture
def proxy(s3_server: S3Endpoint) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def late(catalog: Catalog, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The same root by whom they may be seen late."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.url)
    late = open_catalog(catalog.uri)
    assert late.store.stat("nothing") is None
    return late


@pytest.fixture
def bucket(s3_bucket: str) -> str:
    return s3_bucket


def trash(catalog: Catalog, step: int) -> None:
    """As a purge does, long ago."""
    action = purge_action(catalog.checkpoint(step), grace_s=60.0)
    catalog.trash(step)
    catalog.records.write_action(ActionRecord(action=action).started(1.0).succeeded({}, 2.0))


def clean(catalog: Catalog) -> None:
    """Everything that can go is gone, as long after everything that anybody does."""
    found = find_garbage(catalog, catalog.observe(), now=time.time() + LONG_S)
    assert remove_garbage(found, guard=lambda: None) == []


def test_a_step_saved_anew_stays_when_the_older_save_is_erased(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """The listing shows the new one's first file, and no manifest yet."""
    save_step(catalog, 10, save_id="old")
    trash(catalog, 10)
    catalog.store.write("step-10/.metadata", NEW[".metadata"])
    proxy.lists_lag(bucket)
    save_step(catalog, 10, files=NEW, save_id="new")
    empty_trash(late, older_than_s=0.0, now=time.time())
    assert content_of(catalog, 10) == NEW


def test_a_trashed_save_stays_when_a_dead_one_is_swept(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """The listing does not show the trash yet; the trashed save's shards lie beside dead ones."""
    save_step(catalog, 10, save_id="old")
    proxy.lists_lag(bucket)
    trash(catalog, 10)
    catalog.store.write(names.begun_key("step-10"), b"")
    late.commit.clear("step-10")
    catalog.restore(10)
    assert content_of(catalog, 10) == FILES


def test_a_step_that_was_committed_meanwhile_is_no_dead_attempt(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """The listing shows the note of a save that has ended since, and not what it has made."""
    staging = stage(catalog, 10, files=FILES, save_id="save10")
    catalog.commit.contribute(staging, "step-10")
    catalog.commit.discard(staging)
    proxy.lists_lag(bucket)
    save_step(catalog, 10)
    clean(late)
    assert content_of(catalog, 10) == FILES


def test_a_way_back_that_is_gone_is_none(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """The listing still shows two newer steps, which somebody has taken away."""
    verified(catalog, 1, 2, 3)
    action = purge_action(catalog.checkpoint(1), grace_s=60.0)
    proxy.lists_lag(bucket)
    for step in (2, 3):
        catalog.trash(step)
    with pytest.raises(PurgeRefusedError):
        purge_step(late, action, now=time.time())
    assert content_of(catalog, 1) == FILES


def test_a_pinned_step_that_was_purged_unseen_comes_back(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """A pin that no listing shows yet does not hold its step, but keeps it in the trash."""
    verified(catalog, 1, 2, 3)
    action = purge_action(catalog.checkpoint(1), grace_s=60.0)
    proxy.lists_lag(bucket)
    catalog.pin(1, name="me", reason="paper")
    purge_step(late, action, now=time.time())
    catalog.records.write_action(ActionRecord(action=action).started(1.0).succeeded({}, 2.0))
    proxy.recover()
    assert empty_trash(late, older_than_s=0.0, now=time.time() + LONG_S) == {}
    catalog.restore(1)
    assert content_of(catalog, 1) == FILES
    assert [pin.name for pin in catalog.pins(1)] == ["me"]


def test_files_that_are_not_listed_go_to_the_trash_all_the_same(
    catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """Else a later save of the step would write over them."""
    proxy.lists_lag(bucket)
    save_step(catalog, 10, save_id="old")
    late.trash(10)
    save_step(catalog, 10, files=NEW, save_id="new")
    catalog.trash(10)
    catalog.store.delete([names.manifest_key(".ray_ckpt/trash/step-10.new")])
    catalog.restore(10)
    assert content_of(catalog, 10) == FILES


def test_the_newest_copy_that_is_there_is_not_retired(
    root: str, catalog: Catalog, late: Catalog, proxy: S3Proxy, bucket: str
) -> None:
    """The listing still shows a newer copy, which somebody has removed."""
    source = open_catalog(root)
    old, new = make_export(source, 5), make_export(source, 7, b"newer")
    for export in (old, new):
        publish_export(source, export, late.uri)
    proxy.lists_lag(bucket)
    catalog.store.delete([names.manifest_key("exports/hf/step-7")])
    with pytest.raises(UsageError, match="no newer copy of this run is there"):
        retire_copy(root, publish_of(old, late.uri), content_id=old.manifest.content_id)
    assert catalog.export("hf", 5).manifest == old.manifest
