"""A folder from anywhere is on this host: all of it, as it was published, or nothing."""

import fcntl
import os
from pathlib import Path

import pytest

from ray_ckpt.core.errors import (
    ConflictError,
    IntegrityError,
    ObjectExistsError,
    TransientError,
    UsageError,
)
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.fetch import fetch
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.listing import manifest_in
from tests.processes import run_python
from tests.servers.hub import HubDouble, Way
from tests.servers.s3_proxy import S3Proxy
from tests.storage.copies.test_publish import make_export, publish

WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(params=["folder", "fsspec", pytest.param("s3", marks=pytest.mark.s3)])
def catalog(request: pytest.FixtureRequest, root: str) -> Catalog:
    """A root with an export of step 5."""
    uri = str(request.getfixturevalue("s3_root")) if request.param == "s3" else root
    catalog = open_catalog(f"local://{uri}" if request.param == "fsspec" else uri)
    make_export(catalog)
    return catalog


def source_of(catalog: Catalog) -> str:
    return f"{catalog.uri}/exports/hf/step-5"


def test_what_arrives_is_what_was_made_with_its_manifest(catalog: Catalog, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "mine"
    fetch(source_of(catalog), target)
    made = catalog.export("hf", 5).manifest
    assert manifest_in(LocalStore(str(tmp_path / "deep")), "mine") == made
    for entry in made.files:
        theirs = catalog.store.read(f"exports/hf/step-5/{entry.path}")
        assert (target / entry.path).read_bytes() == theirs
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


def test_a_folder_that_is_there_is_untouched(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ObjectExistsError, match="something is there already"):
        fetch(source_of(catalog), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_damaged_file_is_named_and_nothing_is_at_the_target(
    catalog: Catalog, tmp_path: Path
) -> None:
    catalog.store.write(f"exports/hf/step-5/{WEIGHTS}", b"else")
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} is sha256:"):
        fetch(source_of(catalog), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_what_nobody_can_prove_is_not_fetched(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no ray_ckpt\.manifest\.json"):
        fetch(f"{catalog.uri}/exports/hf", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.s3
def test_one_that_was_cut_off_goes_on_from_the_files_that_have_arrived(
    s3_root: str, proxy: S3Proxy, tmp_path: Path
) -> None:
    catalog = open_catalog(s3_root)
    make_export(catalog)
    proxy.fail(match=f"GET .*{WEIGHTS}", status=500, code="InternalError")
    with pytest.raises(TransientError):
        fetch(source_of(catalog), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    proxy.recover()
    asked = len(proxy.requests)
    fetch(source_of(catalog), tmp_path / "mine")
    assert not any("config.json" in line for line in proxy.requests[asked:])
    assert (tmp_path / "mine" / "config.json").exists()


def test_two_at_once_do_not_mix(root: str, tmp_path: Path) -> None:
    catalog = open_catalog(root)
    make_export(catalog)
    attempt = tmp_path / ".mine.fetching"
    attempt.mkdir()
    other = os.open(attempt, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConflictError, match="another process fetches to it"):
        fetch(source_of(catalog), tmp_path / "mine")
    os.close(other)
    fetch(source_of(catalog), tmp_path / "mine")


# ---- the Hub ----


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def hub(hub: HubDouble, root: str) -> HubDouble:
    """With an export of step 5 on it, published from `root`."""
    make_export(open_catalog(root))
    hub.api().create_repo("ray/model")
    assert publish(root, hub, "hf://ray/model").startswith("done")
    return hub


def fetched(hub: HubDouble, source: str, target: Path) -> tuple[int, str]:
    """Exit code and output of the command, in a process whose Hub is the double."""
    arguments = ("-m", "ray_ckpt", "fetch", source, str(target))
    done = run_python(*arguments, environment=hub.environment(), check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_repository_at_a_tag_comes_whole(hub: HubDouble, root: str, tmp_path: Path) -> None:
    code, said = fetched(hub, "hf://ray/model@step-5", tmp_path / "mine")
    assert code == 0, said
    made = open_catalog(root).export("hf", 5).manifest
    assert manifest_in(LocalStore(str(tmp_path)), "mine") == made
    for entry in made.files:
        there = Path(root, "exports/hf/step-5", entry.path)
        assert (tmp_path / "mine" / entry.path).read_bytes() == there.read_bytes()
    assert not (tmp_path / "mine" / ".cache").exists()
    assert f"{tmp_path / 'mine'}: " in said


def test_what_differs_from_the_hubs_word_is_removed_and_sent_anew(
    hub: HubDouble, root: str, tmp_path: Path
) -> None:
    (held,) = [*(hub.folder / "lfs").iterdir(), *(hub.folder / "xet" / "xorbs").iterdir()]
    right = held.read_bytes()
    held.write_bytes(right[:1000] + bytes([right[1000] ^ 1]) + right[1001:])
    code, said = fetched(hub, "hf://ray/model", tmp_path / "mine")
    assert code == 1
    assert f"what arrived is not what the Hub says: {WEIGHTS}" in said
    assert not (tmp_path / "mine").exists()
    held.write_bytes(right)
    code, said = fetched(hub, "hf://ray/model", tmp_path / "mine")
    assert code == 0, said
    there = Path(root, "exports/hf/step-5", WEIGHTS)
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == there.read_bytes()


def test_a_repository_that_is_not_there_is_told_of(hub: HubDouble, tmp_path: Path) -> None:
    code, said = fetched(hub, "hf://ray/other", tmp_path / "mine")
    assert code != 0
    assert "404" in said
    assert not (tmp_path / "mine").exists()
