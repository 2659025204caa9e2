"""Nothing is moved, removed or swept through a symbolic link or out of the root (scenario 53)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, StorageError, UsageError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.store import LocalStore
from tests.roots import snapshot
from tests.storage.steps import empty_trash, save_step

PRECIOUS = {"step-7.save7/notes.txt": b"mine", "save-x/notes.txt": b"mine"}


@pytest.fixture
def catalog(root: str) -> Catalog:
    """Step 7 and a folder of somebody else, elsewhere, which must stay as it is."""
    opened = open_catalog(root)
    save_step(opened, 7)
    return opened


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    for name, data in PRECIOUS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def move_away(catalog: Catalog, key: str, target: Path) -> None:
    """The folder lies at `target` now, and a link is in its place."""
    path = Path(catalog.uri, key)
    path.rename(target)
    path.symlink_to(target)


def test_a_step_that_is_a_link_is_no_step_and_is_never_moved(
    catalog: Catalog, tmp_path: Path
) -> None:
    move_away(catalog, "step-7", tmp_path / "moved")
    (tmp_path / "moved" / "ray_ckpt.pin.ada.json").write_bytes(b"{}")
    before = snapshot(str(tmp_path / "moved"))
    assert catalog.observe().checkpoints == ()
    for act in (catalog.trash, catalog.quarantine, catalog.unpin):
        with pytest.raises(UsageError, match="symbolic link") as caught:
            act(7)
        assert caught.value.where == f"{catalog.uri}/step-7"
    assert snapshot(str(tmp_path / "moved")) == before


@pytest.mark.parametrize("link", [names.TRASH, names.PRIVATE])
def test_a_trash_that_is_a_link_takes_and_loses_nothing(
    catalog: Catalog, elsewhere: Path, link: str
) -> None:
    path = Path(catalog.uri, link)
    if path.exists():
        path.rename(path.with_name("old"))
    path.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"):
        catalog.trash(7)
    aside = names.set_aside_dir(names.TRASH, 7, "save7")
    with pytest.raises(UsageError, match="symbolic link"):
        catalog.commit.erase(aside, "step-7")
    with pytest.raises(UsageError, match="symbolic link"):
        catalog.commit.bring_back(aside, "step-8")
    assert snapshot(str(elsewhere)) == PRECIOUS
    assert catalog.checkpoint(7).state is CheckpointState.COMMITTED


def test_a_save_in_the_trash_that_is_a_link_is_passed_over(
    catalog: Catalog, elsewhere: Path
) -> None:
    trash = Path(catalog.uri, names.TRASH)
    trash.mkdir(parents=True, exist_ok=True)
    (trash / "step-7.save7").symlink_to(elsewhere)
    assert empty_trash(catalog, older_than_s=0.0, now=1e12) == {}
    with pytest.raises(UsageError, match="the trash holds no step-7"):
        catalog.restore(7)
    with pytest.raises(UsageError, match="symbolic link"):
        catalog.commit.erase(names.set_aside_dir(names.TRASH, 7, "save7"), "step-7")
    assert snapshot(str(elsewhere)) == PRECIOUS


def test_a_link_inside_a_step_goes_and_what_it_points_to_stays(
    catalog: Catalog, elsewhere: Path
) -> None:
    step = Path(catalog.uri, "step-7")
    (step / "folder").symlink_to(elsewhere)
    (step / "file").symlink_to(elsewhere / "save-x/notes.txt")
    catalog.trash(7)
    catalog.restore(7)
    assert catalog.damage(7) == []
    catalog.trash(7)
    aside = names.set_aside_dir(names.TRASH, 7, "save7")
    own = sum(p.stat().st_size for p in step.parent.rglob("*") if p.is_file() and "7" in str(p))
    freed = catalog.commit.erase(aside, "step-7")
    assert 0 < freed <= own - len(b"mine"), "what a link points to is not freed"
    assert list(catalog.store.list_folders(names.TRASH)) == []
    assert snapshot(str(elsewhere)) == PRECIOUS


def test_dead_attempts_behind_a_link_are_not_swept(catalog: Catalog, elsewhere: Path) -> None:
    staging = Path(catalog.uri, names.STAGING)
    staging.rmdir()
    staging.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"):
        catalog.commit.remains()
    assert snapshot(str(elsewhere)) == PRECIOUS


@pytest.mark.parametrize(
    "key", ["../elsewhere/save-x/notes.txt", "/etc/hostname", "a//b", "./a", ".", ""]
)
def test_a_key_that_leaves_the_root_is_never_deleted(
    catalog: Catalog, elsewhere: Path, key: str
) -> None:
    with pytest.raises(UsageError, match="is no key"):
        catalog.store.delete([key])
    assert snapshot(str(elsewhere)) == PRECIOUS


def test_where_nobody_may_look_for_a_link_nothing_is_deleted(catalog: Catalog) -> None:
    """As in a folder of another user; here a name that is longer than any may be."""
    with pytest.raises(StorageError, match="File name too long"):
        catalog.store.delete(["x" * 300])


def test_a_root_that_is_a_link_is_a_root(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(catalog.uri)
    linked = open_catalog(str(tmp_path / "link"))
    linked.trash(7)
    linked.restore(7)
    linked.verify(7)
    assert isinstance(linked.store, LocalStore)


# ---- a manifest that somebody made to harm ----


def hostile(manifest: Manifest, **changes: object) -> bytes:
    """Its JSON with other values, and the checksum that goes with them."""
    from ray_ckpt.core.manifest import _checksum

    document = json.loads(manifest.to_json())
    document.update(changes)
    document.pop("self_sha256")
    return json.dumps({**document, "self_sha256": _checksum(document)}).encode()


def file_entry(path: str) -> dict[str, object]:
    return {"path": path, "size_bytes": 4, "digest": "sha256:00"}


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def either(request: pytest.FixtureRequest) -> Catalog:
    opened = open_catalog(request.getfixturevalue(request.param))
    save_step(opened, 7)
    save_step(opened, 8)
    return opened


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [file_entry("../step-8/ray_ckpt.manifest.json")]},
        {"files": [file_entry("/etc/hostname")]},
        {"files": [file_entry("a/../../step-8/.metadata")]},
        {"save_id": "../../step-8"},
        {"save_id": "a/b"},
        {"save_id": ""},
    ],
)
def test_a_manifest_that_names_anything_outside_its_folder_is_no_manifest(
    either: Catalog, changes: dict[str, object]
) -> None:
    text = hostile(either.manifest(7), **changes)
    either.store.write(names.manifest_key("step-7"), text)
    before = {info.key for info in either.store.list_objects("step-8")}
    acts: list[Callable[[int], object]] = [either.trash, either.verify, either.checkpoint]
    for act in acts:
        with pytest.raises(IntegrityError):
            act(7)
    either.quarantine(7)
    assert not either.is_in_place(7)
    assert {info.key for info in either.store.list_objects("step-8")} == before
    either.verify(8)


def test_a_hostile_manifest_in_the_trash_erases_nothing(either: Catalog) -> None:
    manifest = either.manifest(7)
    either.trash(7)
    aside = names.set_aside_dir(names.TRASH, 7, "save7")
    text = hostile(manifest, files=[file_entry("../step-8/.metadata")])
    either.store.write(names.manifest_key(aside), text)
    assert empty_trash(either, older_than_s=0.0, now=1e12) == {}
    either.verify(8)
