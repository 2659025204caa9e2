"""One bucket for all tests of this folder: making one takes up to five seconds."""

import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hub import HubDouble
from tests.servers.lesser_s3 import Lack, LesserS3
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
def lesser(
    s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LesserS3]:
    """A store that does less than AWS, in front of that server; the environment knows it."""
    with LesserS3(s3_server) as lesser:
        monkeypatch.setenv("AWS_ENDPOINT_URL", lesser.endpoint.url)
        yield lesser


@pytest.fixture
def lesser_root(s3_root: str, lesser: LesserS3) -> str:
    """A root on a store that does nothing of what its users can do without."""
    lesser.lacks |= {Lack.EXCLUSIVE_CREATES, Lack.CHECKSUMS}
    lesser.fail(match="POST .*delete", status=501, code="NotImplemented")
    return s3_root


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch folders of other processes on this machine are not ours to find."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "certificate.pem", folder / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here"
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    subprocess.run(["openssl", *options.split(), *extra], check=True, capture_output=True)
    return made, key
