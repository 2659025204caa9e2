"""From S3 to the same S3 the service copies by itself; each file is proven, and seen with all."""

import logging
import multiprocessing
import os
import signal
import uuid
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, TransientError
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.digests import describe_file
from ray_ckpt.storage.s3 import copy as s3_copy
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint, make_bucket
from tests.waiting import wait_for

pytestmark = pytest.mark.s3
MIB = 1 << 20
PART_BYTES = 5 * MIB
FOLDER = "exports/hf/step-5"
FILES = {
    "config.json": ("sha256", 100),
    "empty.txt": ("sha256", 0),
    "model-1.safetensors": ("sha256", 3 * MIB),
    "model-2.safetensors": ("sha256", 3 * MIB),
    "shard.distcp": ("crc64nvme", 2 * PART_BYTES + 1000),
}
LITTLE_BYTES = 200_000
"""More than all questions and answers, less than any file of weights."""


@pytest.fixture(scope="module")
def other_bucket(s3_server: S3Endpoint) -> str:
    name = f"copies-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, name)
    return name


@pytest.fixture
def place(other_bucket: str) -> str:
    return f"s3://{other_bucket}/models-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def export(s3_root: str) -> ExportView:
    return make_export(open_catalog(s3_root))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_copy, "PART_BYTES", PART_BYTES)


def make_export(catalog: Catalog) -> ExportView:
    """Files of each kind: small, empty, proven by either digest, in one part and in several."""
    staging = catalog.commit.staging("export-test")
    for name, (_, size_bytes) in FILES.items():
        (staging / name).write_bytes(os.urandom(size_bytes))
    manifest = Manifest(
        step=5,
        save_id="e5",
        created_at="2026-01-01T00:00:00+00:00",
        lineage=Lineage(run_id="run", source_id="s", recipe={"name": "hf", "dtype": "bfloat16"}),
        files=tuple(
            describe_file(staging / n, n, algorithm) for n, (algorithm, _) in FILES.items()
        ),
    )
    catalog.commit_export(staging, "hf", manifest)
    return catalog.export("hf", 5)


def is_equal_copy(source: str, place: str, export: ExportView) -> bool:
    made, copy = open_catalog(source), open_catalog(place)
    assert copy.export("hf", 5).manifest == export.manifest
    assert list(copy.store.list_objects(names.STAGING)) == [], "no note is left"
    assert copy.store.list_unfinished(FOLDER) == []
    keys = [f"{FOLDER}/{name}" for name in FILES]
    return all(made.store.read(key) == copy.store.read(key) for key in keys)


def copied(proxy: S3Proxy, name: str) -> int:
    """How many requests have asked the store to copy a part of that file."""
    return sum(" from " in line and f"/{FOLDER}/{name}?" in line for line in proxy.requests)


def test_no_byte_of_a_file_passes_through_this_host(
    s3_root: str, place: str, export: ExportView, proxy: S3Proxy
) -> None:
    published = publish_export(open_catalog(s3_root), export, place)
    assert proxy.passed_bytes < LITTLE_BYTES
    assert published.bytes_sent == 0
    assert published.bytes_copied == export.manifest.total_bytes
    assert copied(proxy, "shard.distcp") == 3
    assert copied(proxy, "model-1.safetensors") == 1
    manifest_at = proxy.requests.index(
        next(r for r in proxy.requests if r.startswith("PUT") and "manifest.json" in r)
    )
    assert not [r for r in proxy.requests[manifest_at:] if " from " in r], "it is the last"
    assert is_equal_copy(s3_root, place, export)


def test_a_second_copy_is_not_made(
    s3_root: str, place: str, export: ExportView, proxy: S3Proxy
) -> None:
    publish_export(open_catalog(s3_root), export, place)
    before = len(proxy.requests)
    again = publish_export(open_catalog(s3_root), export, place)
    assert (again.bytes_sent, again.bytes_copied) == (0, 0)
    assert not [line for line in proxy.requests[before:] if line.startswith(("PUT", "POST"))]


def copy(source: str, place: str) -> None:
    catalog = open_catalog(source)
    publish_export(catalog, catalog.export("hf", 5), place)


def test_a_copy_that_is_killed_shows_nothing_and_is_gone_on_with(
    s3_root: str, place: str, export: ExportView, proxy: S3Proxy
) -> None:
    """Scenario 40, where the store copies: what was copied and is equal is not copied again."""
    proxy.hang(match=r"PUT .*model-2\.safetensors\?.* from ")
    process = multiprocessing.get_context("spawn").Process(target=copy, args=(s3_root, place))
    process.start()
    store = open_catalog(place).store
    wait_for(lambda: len(list(store.list_objects(FOLDER))) == len(FILES) - 1)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert open_catalog(place).observe().exports == ()
    proxy.recover()
    before = len(proxy.requests)
    publish_export(open_catalog(s3_root), export, place)
    begun = [line for line in proxy.requests[before:] if " from " in line]
    sent = [line for line in begun if names.PROBES not in line]  # what the store is asked first
    assert len(sent) == 1
    assert "model-2.safetensors" in sent[0]
    assert is_equal_copy(s3_root, place, export)


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (403, "AccessDenied"), (400, "InvalidRequest")]
)
def test_a_store_that_refuses_to_copy_is_told_of_and_gets_the_bytes_from_here(
    s3_root: str,
    place: str,
    export: ExportView,
    proxy: S3Proxy,
    caplog: pytest.LogCaptureFixture,
    *,
    status: int,
    code: str,
) -> None:
    proxy.fail(match="PUT .* from ", status=status, code=code)
    with caplog.at_level(logging.WARNING, logger="ray_ckpt"):
        published = publish_export(open_catalog(s3_root), export, place)
    (told,) = [r.getMessage() for r in caplog.records if "is not copied there" in r.getMessage()]
    assert code in told
    assert "its bytes go through this host" in told
    assert published.bytes_sent == export.manifest.total_bytes
    assert is_equal_copy(s3_root, place, export)


def test_what_may_pass_is_tried_again_later_and_not_sent_from_here(
    s3_root: str, place: str, export: ExportView, proxy: S3Proxy
) -> None:
    proxy.fail(match="PUT .*partNumber=2 from ", status=500, code="InternalError")
    with pytest.raises(TransientError):
        publish_export(open_catalog(s3_root), export, place)
    proxy.recover()
    publish_export(open_catalog(s3_root), export, place)
    assert proxy.passed_bytes < LITTLE_BYTES
    assert is_equal_copy(s3_root, place, export)


@pytest.mark.parametrize("name", ["model-1.safetensors", "shard.distcp"])
def test_a_damaged_file_is_found_by_the_checksum_of_the_store(
    s3_root: str, place: str, export: ExportView, proxy: S3Proxy, *, name: str
) -> None:
    store = open_catalog(s3_root).store
    data = bytearray(store.read(f"{FOLDER}/{name}"))
    data[-1] ^= 1
    store.write(f"{FOLDER}/{name}", bytes(data))
    proxy.passed_bytes = 0
    with pytest.raises(IntegrityError, match=rf"{name} is .*its manifest says"):
        publish_export(open_catalog(s3_root), export, place)
    assert open_catalog(place).observe().exports == ()
    assert proxy.passed_bytes < LITTLE_BYTES


def test_what_the_store_has_no_checksum_of_is_read_back(
    s3_root: str,
    place: str,
    export: ExportView,
    proxy: S3Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SHA-256 of an object of several parts: the store has only the digest of their digests."""
    monkeypatch.setattr(s3_copy, "WHOLE_BYTES", MIB)
    monkeypatch.setattr(s3_copy, "PART_BYTES", 2 * PART_BYTES)
    store = open_catalog(s3_root).store
    staging = Path(open_catalog(s3_root).commit.staging("export-large"))
    (staging / "large.safetensors").write_bytes(os.urandom(2 * PART_BYTES + 1000))
    manifest = Manifest(
        step=6,
        save_id="e6",
        created_at="2026-01-01T00:00:00+00:00",
        lineage=Lineage(run_id="run", source_id="s", recipe={"name": "hf", "dtype": "bfloat16"}),
        files=(describe_file(staging / "large.safetensors", "large.safetensors", "sha256"),),
    )
    open_catalog(s3_root).commit_export(staging, "hf", manifest)
    large = ExportView(name="hf", step=6, manifest=manifest)
    proxy.passed_bytes = 0
    publish_export(open_catalog(s3_root), large, place)
    assert manifest.total_bytes <= proxy.passed_bytes < manifest.total_bytes + LITTLE_BYTES
    key = "exports/hf/step-6/large.safetensors"
    assert open_catalog(place).store.read(key) == store.read(key)
    data = bytearray(store.read(key))
    data[7] ^= 1
    store.write(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"large\.safetensors is sha256"):
        publish_export(open_catalog(s3_root), large, f"{place}-2")
