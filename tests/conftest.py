"""Fixtures that several folders share. Servers and clusters are started once a session."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# read by huggingface_hub and ray when they are imported, hence before everything else
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # on top of that of whoever starts Ray

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.servers.hub import HubDouble, Way
from tests.servers.seaweed import S3Endpoint, make_bucket, seaweedfs

LONG = "RAY_CKPT_LONG_TESTS"
IS_LONG = bool(os.environ.get(LONG))
TRAINER_NICENESS = 15
"""As under Ray. Tasks come last (19): beside tests at 0 they would starve."""


def pytest_configure() -> None:
    """Tests run as nice as trainers, and so does all that they start."""
    os.nice(max(0, TRAINER_NICENESS - os.getpriority(os.PRIO_PROCESS, 0)))


def pytest_report_header() -> str:
    """Whether slow tests run."""
    return f"slow tests: {'run' if IS_LONG else f'left out, {LONG}=1 runs them'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests are left out, unless somebody has time."""
    if not IS_LONG:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Under `-n`, modules that need Ray run in one process, on one cluster; no module is split."""
    config.option.loadscopereorder = False  # they come first as it is, and take longest
    return _ByCluster(config, log)


class _ByCluster(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        needs_ray = "pytest.mark.ray" in Path(self.config.rootpath, module).read_text()
        return "ray" if needs_ray else module


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """A real S3 server on a free port of this machine; or another one that somebody names.

    `RAY_CKPT_TEST_S3="http://127.0.0.1:8080 key secret"`. What needs its other identities fails.
    """
    if named := os.environ.get("RAY_CKPT_TEST_S3"):
        url, access_key, secret_key = named.split()
        yield S3Endpoint(url=url, access_key=access_key, secret_key=secret_key)
        return
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        yield endpoint


@pytest.fixture
def s3_root(s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty `s3://` root; the environment knows the server and its keys."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, bucket)
    return f"s3://{bucket}/run"


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An empty local root."""
    return str(tmp_path / "run")


@pytest.fixture
def way() -> Way:
    """How large files go to the Hub and come from it; a module that cares for both says so."""
    return "lfs"


@pytest.fixture
def hub(tmp_path: Path, way: Way) -> Iterator[HubDouble]:
    """A Hub on a free port of this machine, without a repository."""
    with HubDouble(tmp_path / "hub", way=way) as hub:
        yield hub


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A real Ray on this machine, with a dashboard, so that jobs can be submitted; its address."""
    import ray

    from ray_ckpt.cluster.local import embedded_ray

    with embedded_ray("tests", {}, on_poll=lambda: None):
        yield ray.get_runtime_context().gcs_address
