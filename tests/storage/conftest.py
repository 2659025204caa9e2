"""One bucket for all tests of this folder: making one takes up to five seconds."""

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hub import HubDouble
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint, make_bucket


@pytest.fixture(scope="package")
def s3_bucket(s3_server: S3Endpoint) -> str:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, bucket)
    return bucket


@pytest.fixture
def s3_root(s3_server: S3Endpoint, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of that bucket; the environment knows the server and its keys."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_bucket}/run-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="package")
def bucket_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubDouble]:
    """A Hub for all tests that use a bucket in this process, where hf_xet keeps what it knows."""
    with HubDouble(tmp_path_factory.mktemp("bucket-hub"), way="xet") as hub:
        yield hub


@pytest.fixture
def bucket_root(bucket_hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of an empty bucket."""
    monkeypatch.setenv("HF_TOKEN", bucket_hub.token)
    monkeypatch.setenv("HF_XET_CACHE", str(bucket_hub.folder / "xet-cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", bucket_hub.url)
    bucket = f"ray/bucket-{uuid.uuid4().hex[:12]}"
    bucket_hub.api().create_bucket(bucket)
    return f"hf://buckets/{bucket}/run"


@pytest.fixture
def proxy(
    s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Proxy]:
    """In front of the server that `s3_root` lies on; the environment knows it."""
    with S3Proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.url)
        yield proxy


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch folders of other processes on this machine are not ours to find."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
