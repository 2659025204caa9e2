"""Folders with names of others, which are steps as well."""

import json
from pathlib import Path

import pytest

from ray_ckpt.core.errors import ConfigError, ConflictError
from ray_ckpt.core.foreign_names import SNAPSHOT
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.foreign_folders import steps_of, strange_folders, take_folder

STAMPED = "checkpoint_2026-11-22_15-45-40.123456"


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> Store:
    return open_catalog(request.getfixturevalue(request.param)).store


def put(store: Store, folder: str, **files: bytes) -> None:
    for name, data in ({"__0_0.distcp": b"tensors", ".metadata": b"index"} | files).items():
        store.write(f"{folder}/{name}", data)


def listed_by_ray(store: Store, **steps: int) -> None:
    results = [
        {"checkpoint_dir_name": name, "metrics": {"loss": 0.5, "step": step}}
        for name, step in steps.items()
    ]
    store.write(SNAPSHOT, json.dumps({"checkpoint_results": results}).encode())


def test_a_number_in_the_name_is_the_step_and_what_ray_says_comes_first(store: Store) -> None:
    for name in (STAMPED, "checkpoint_000010", "checkpoint_000020", "other_5"):
        put(store, name)
    store.write("checkpoint_000030/weights.bin", b"no DCP checkpoint")
    listed_by_ray(store, **{STAMPED: 15, "checkpoint_000020": 21})
    assert steps_of(store, "checkpoint_*") == {
        STAMPED: 15,
        "checkpoint_000010": 10,
        "checkpoint_000020": 21,
    }
    assert strange_folders(store) == ["checkpoint_000010", "checkpoint_000020", STAMPED, "other_5"]


@pytest.mark.parametrize(
    ("names", "pattern", "says"),
    [
        (("a_1",), "b_*", "no folder of a DCP checkpoint is called b_"),
        ((STAMPED,), "checkpoint_*", f"nobody can say which step {STAMPED} is"),
        (("a_1", "a_01"), "a_*", "would both be step-1"),
    ],
)
def test_folders_that_cannot_be_told_apart_are_refused(
    root: str, names: tuple[str, ...], pattern: str, says: str
) -> None:
    store = open_catalog(root).store
    for name in names:
        put(store, name)
    with pytest.raises(ConfigError, match=says):
        steps_of(store, pattern)


def test_the_step_leads_to_the_same_bytes_and_the_folder_stays(store: Store) -> None:
    put(store, "checkpoint_7", **{"extra/dataloader.pt": b"position"})
    assert take_folder(store, "checkpoint_7", 7)
    names = (".metadata", "__0_0.distcp", "extra/dataloader.pt")
    for name in names:
        assert store.read(f"step-7/{name}") == store.read(f"checkpoint_7/{name}")
    assert not take_folder(store, "checkpoint_7", 7)
    assert sorted(info.key for info in store.list_objects("step-7")) == [
        f"step-7/{name}" for name in names
    ]


def test_a_large_folder_costs_no_room_on_a_disk(root: str) -> None:
    store = open_catalog(root).store
    put(store, "checkpoint_7")
    take_folder(store, "checkpoint_7", 7)
    first, second = (Path(root, folder, "__0_0.distcp") for folder in ("checkpoint_7", "step-7"))
    assert first.samefile(second)


def test_whoever_was_killed_before_the_index_was_there_goes_on(store: Store) -> None:
    put(store, "checkpoint_7")
    store.write("step-7/__0_0.distcp", b"half")
    assert take_folder(store, "checkpoint_7", 7)
    assert store.read("step-7/__0_0.distcp") == b"tensors"


def test_another_checkpoint_of_that_step_is_never_replaced(store: Store) -> None:
    put(store, "checkpoint_7")
    put(store, "step-7", **{"__0_0.distcp": b"other tensors"})
    with pytest.raises(ConflictError, match="step-7 is there, and is not checkpoint_7"):
        take_folder(store, "checkpoint_7", 7)
    assert store.read("step-7/__0_0.distcp") == b"other tensors"
