"""A copy goes from its destination whole, only if it is that copy and a newer one stays."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.copies.retire import retire_copy
from tests.storage.copies.test_publish import make_export

OLD, NEW = "exports/hf/step-5", "exports/hf/step-7"


@pytest.fixture
def old(catalog: Catalog, destination: str) -> ExportView:
    """Step 5, of which a copy is at the destination, and a newer one of step 7."""
    old, new = make_export(catalog, 5), make_export(catalog, 7, b"newer")
    for export in (old, new):
        publish_export(catalog, export, destination)
    return old


def publish_of(export: ExportView, destination: str) -> Action:
    return Action(
        kind=ActionKind.PUBLISH,
        step=export.step,
        source_id=str(export.manifest.lineage.source_id),
        export=ExportSpec(name=export.name),
        destination=destination,
    )


def retire(catalog: Catalog, export: ExportView, destination: str) -> int:
    action = publish_of(export, destination)
    retired = retire_copy(catalog.uri, action, content_id=export.manifest.content_id)
    assert retired.place == f"{open_catalog(destination).uri}/{OLD}"
    return retired.bytes_freed


def keys(destination: str, folder: str = "") -> list[str]:
    """But for what the process that first meets a store notes of it."""
    found = (info.key for info in open_catalog(destination).store.list_objects(folder))
    return sorted(key for key in found if not key.startswith(".ray_ckpt/store-"))


def test_a_retired_copy_leaves_nothing_and_the_newer_one_stays(
    catalog: Catalog, destination: str, old: ExportView
) -> None:
    kept = keys(destination, NEW)
    assert retire(catalog, old, destination) == old.manifest.total_bytes
    assert keys(destination) == kept
    assert catalog.export("hf", 5).manifest == old.manifest, "the root's own export stays"


def test_a_second_retire_finds_it_gone(catalog: Catalog, destination: str, old: ExportView) -> None:
    retire(catalog, old, destination)
    assert retire(catalog, old, destination) == 0


def deaths(destination: str, old: ExportView) -> Iterator[int]:
    """Puts the destination into each state in which a process that retires may die."""
    store = open_catalog(destination).store
    store.write(names.retired_key(OLD), old.manifest.to_json())
    yield 1
    store.delete([names.manifest_key(OLD)])
    yield 2
    store.delete([f"{OLD}/{old.manifest.files[0].path}"])
    yield 3
    store.delete([f"{OLD}/{entry.path}" for entry in old.manifest.files])
    yield 4


@pytest.mark.parametrize("death", [1, 2, 3, 4])
def test_what_a_dead_attempt_began_is_ended(
    catalog: Catalog, destination: str, old: ExportView, death: int
) -> None:
    next(d for d in deaths(destination, old) if d == death)
    retire(catalog, old, destination)
    assert keys(destination) == keys(destination, NEW)


@pytest.mark.parametrize("death", [1, 2, 3, 4])
def test_a_copy_after_a_dead_attempt_is_whole(
    catalog: Catalog, destination: str, old: ExportView, death: int
) -> None:
    next(d for d in deaths(destination, old) if d == death)
    publish_export(catalog, old, destination)
    copied = [f"{OLD}/{entry.path}" for entry in old.manifest.files]
    assert keys(destination, OLD) == sorted([*copied, names.manifest_key(OLD)])
    assert keys(destination, names.STAGING) == []


def test_the_newest_copy_is_not_removed(catalog: Catalog, destination: str) -> None:
    only = make_export(catalog)
    publish_export(catalog, only, destination)
    before = keys(destination)
    with pytest.raises(UsageError, match="no newer copy of this run is there"):
        retire(catalog, only, destination)
    assert keys(destination) == before


def test_another_content_of_the_same_name_is_not_removed(
    catalog: Catalog, destination: str, old: ExportView, tmp_path: Path
) -> None:
    other = make_export(open_catalog(str(tmp_path / "other")), 5, b"else")
    before = keys(destination)
    with pytest.raises(UsageError, match="something else than was copied is there"):
        retire(catalog, other, destination)
    assert keys(destination) == before


def test_an_export_of_another_recipe_is_not_removed(
    catalog: Catalog, destination: str, old: ExportView
) -> None:
    action = publish_of(old, destination)
    other = ExportSpec(name="hf", dtype="float32")
    with pytest.raises(UsageError, match="something else than was copied is there"):
        retire_copy(
            catalog.uri,
            Action(
                kind=action.kind,
                step=action.step,
                source_id=action.source_id,
                export=other,
                destination=destination,
            ),
            content_id=None,
        )


def test_files_that_are_not_the_copys_stay(
    catalog: Catalog, destination: str, old: ExportView
) -> None:
    open_catalog(destination).store.write(f"{OLD}/notes.txt", b"mine")
    retire(catalog, old, destination)
    assert keys(destination, OLD) == [f"{OLD}/notes.txt"]


def test_the_exports_of_the_root_itself_are_never_retired(catalog: Catalog) -> None:
    old, _ = make_export(catalog, 5), make_export(catalog, 7, b"newer")
    with pytest.raises(UsageError, match="the run's own root"):
        retire(catalog, old, catalog.uri)


def test_a_link_is_not_followed(catalog: Catalog, tmp_path: Path) -> None:
    destination = str(tmp_path / "copies")
    old = make_export(catalog, 5)
    for export in (old, make_export(catalog, 7, b"newer")):
        publish_export(catalog, export, destination)
    folder, elsewhere = Path(destination) / OLD, tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"):
        retire(catalog, old, destination)
    assert len(list(elsewhere.iterdir())) == len(old.manifest.files) + 1
