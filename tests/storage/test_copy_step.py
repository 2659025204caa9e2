"""A checkpoint at another place is the same, whole or not there, and a run resumes from it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.core.errors import IntegrityError, StepExistsError, UsageError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copy_step import copy_step
from ray_ckpt.storage.fetch import fetch
from tests.processes import run_python
from tests.roots import flip_byte, make_root, snapshot
from tests.servers.hub import HubDouble, Way
from tests.waiting import wait_for

BUCKET = "hf://buckets/ray/kept/run"


@pytest.fixture
def catalog(root: str) -> Catalog:
    """With steps 10 and 20."""
    make_root(root, (10, 20))
    return open_catalog(root)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3), "bucket"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "folder":
        return str(request.getfixturevalue(f"{request.param}_root"))
    return str(tmp_path / "copies")


def test_a_copy_is_a_checkpoint_like_the_first(
    catalog: Catalog, destination: str, tmp_path: Path
) -> None:
    manifest = catalog.manifest(10)
    done = copy_step(catalog, 10, destination)
    assert (done.location, done.bytes_sent) == (f"{destination}/step-10", manifest.total_bytes)
    copy = open_catalog(destination)
    assert copy.verify(10) == manifest
    assert [view.step for view in copy.observe().checkpoints] == [10]
    assert copy_step(catalog, 10, destination).bytes_sent == 0
    fetch(done.location, tmp_path / "back" / "step-10")
    assert open_catalog(str(tmp_path / "back")).verify(10) == manifest
    assert list(catalog.store.list_objects(".ray_ckpt/readers")) == []


def test_another_save_of_the_step_is_not_written_over(
    catalog: Catalog, destination: str, tmp_path: Path
) -> None:
    copy_step(catalog, 10, destination)
    make_root(str(tmp_path / "other"), (5, 10))
    with pytest.raises(StepExistsError, match="another save of step-10 is there"):
        copy_step(open_catalog(str(tmp_path / "other")), 10, destination)
    assert open_catalog(destination).verify(10) == catalog.manifest(10)


def test_damage_is_not_copied(catalog: Catalog, destination: str, root: str) -> None:
    shard = next(Path(root, "step-10").glob("*.distcp"))
    flip_byte(shard)
    with pytest.raises(IntegrityError, match=shard.name):
        copy_step(catalog, 10, destination)
    assert open_catalog(destination).observe().checkpoints == ()


def test_a_repository_takes_no_checkpoint(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match="a repository takes models"):
        copy_step(catalog, 10, "hf://ray/model")


def test_a_bucket_is_no_root(catalog: Catalog, bucket_root: str) -> None:
    with pytest.raises(UsageError, match="takes copies and is no root"):
        make_root(bucket_root, (10,))
    assert list(open_catalog(bucket_root).store.list_objects("")) == []


# ---- in processes of their own ----


@pytest.fixture
def way() -> Way:
    return "xet"


def ray_ckpt(hub: HubDouble, *arguments: str, code: int = 0) -> str:
    done = run_python("-m", "ray_ckpt", *arguments, environment=hub.environment(), check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_makes_the_bucket_where_it_is_asked_to(
    root: str, catalog: Catalog, hub: HubDouble, tmp_path: Path
) -> None:
    publish = ("publish", root, "--step", "20", "--to", BUCKET)
    assert "add --create" in ray_ckpt(hub, *publish, code=2)
    assert f"{BUCKET}/step-20" in ray_ckpt(hub, *publish, "--create")
    assert hub.api().bucket_info("ray/kept").private
    ray_ckpt(hub, "verify", BUCKET)
    ray_ckpt(hub, "fetch", f"{BUCKET}/step-20", str(tmp_path / "mine"))
    theirs = snapshot(str(tmp_path / "mine"))
    assert theirs == snapshot(f"{root}/step-20")


def test_a_kill_in_the_middle_shows_nothing_and_the_next_copy_sends_the_rest(
    root: str, catalog: Catalog, hub: HubDouble
) -> None:
    """Scenario 40."""
    hub.api().create_bucket("ray/kept")
    num_files = len(catalog.manifest(20).files)
    hub.meanwhile(match="POST .*/batch", do=lambda: hub.hang(match="POST .*/batch"))
    arguments = ["-m", "ray_ckpt", "publish", root, "--step", "20", "--to", BUCKET]
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **hub.environment()}
    )
    wait_for(lambda: hub.num_silent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    paths = [entry.path for entry in hub.api().list_bucket_tree("ray/kept", recursive=True)]
    assert not any(path.endswith("manifest.json") for path in paths)
    hub.recover()
    ray_ckpt(hub, *arguments[2:])
    paths = [entry.path for entry in hub.api().list_bucket_tree("ray/kept", recursive=True)]
    assert len(paths) == num_files + 1, "no note is left"
    ray_ckpt(hub, "verify", BUCKET)
