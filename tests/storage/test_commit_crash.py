"""A process that dies at any point leaves the old truth or the new one, and a rerun ends it.

Every point is tried: the n-th call is the last thing the process does, for n = 1, 2, 3, ...
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, StepExistsError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import READABLE
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.commit import RenameCommit
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.marker import MarkerCommit
from tests.storage.steps import FILES, content_of, save_export, save_step

FIRST = {"__0_0.distcp": b"the first step"}
SYSTEM_CALLS = ("mkdir", "rename", "replace", "link", "fsync", "unlink", "rmdir")
MAX_CALLS = 200


class Death(BaseException):
    """What kills the process; nothing catches it."""


class Countdown:
    """Lets a number of calls through; the next one and all after it die."""

    def __init__(self) -> None:
        self.calls_left = MAX_CALLS

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Death
        return function(*args, **kwargs)


class DyingStore:
    """A store whose every verb goes through a countdown."""

    def __init__(self, store: LocalStore, countdown: Countdown) -> None:
        self._store = store
        self._countdown = countdown

    @property
    def uri(self) -> str:
        return self._store.uri

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return partial(self._countdown.call, getattr(self._store, verb))


class World:
    """A place where a process can die, and where another one looks afterwards."""

    def __init__(self, root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._kind = kind
        self._monkeypatch = monkeypatch

    def catalog(self) -> Catalog:
        """How a new process sees it."""
        store = LocalStore(str(self._root))
        return Catalog(
            store, RenameCommit(store) if self._kind == "rename" else MarkerCommit(store)
        )

    def dies(self, act: Callable[[Catalog], None], after: int) -> bool:
        """Whether `act` died, having had `after` calls."""
        countdown = Countdown()
        countdown.calls_left = after
        with self._monkeypatch.context() as patched:
            catalog = self._dying_catalog(countdown, patched)
            try:
                act(catalog)
            except Death:
                return True
        return False

    def _dying_catalog(self, countdown: Countdown, patched: pytest.MonkeyPatch) -> Catalog:
        if self._kind == "marker":
            store = DyingStore(LocalStore(str(self._root)), countdown)
            return Catalog(store, MarkerCommit(store))
        for name in SYSTEM_CALLS:
            patched.setattr(os, name, partial(countdown.call, getattr(os, name)))
        return self.catalog()


@pytest.fixture(params=["rename", "marker"])
def worlds(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A fresh world with step 1 committed, for each point of death in turn."""
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))

    def fresh() -> Iterator[World]:
        for number in range(MAX_CALLS):
            world = World(tmp_path / f"run{number}", request.param, monkeypatch)
            save_step(world.catalog(), 1, files=FIRST)
            yield world

    return fresh()


def truth(catalog: Catalog) -> dict[int, dict[str, bytes]]:
    """Every readable step with its content; each was read whole."""
    readable = [v.step for v in catalog.observe().checkpoints if v.state in READABLE]
    for step in readable:
        catalog.verify(step)
    return {step: content_of(catalog, step) for step in readable}


def deaths(
    worlds: Iterator[World],
    act: Callable[[Catalog], object],
    *,
    before: Callable[[Catalog], object] = lambda _: None,
) -> Iterator[World]:
    """Each world in which `act` died, one for each call it makes; there must be some."""
    for after, world in enumerate(worlds):
        before(world.catalog())
        if not world.dies(lambda catalog: act(catalog) and None, after):
            assert after > 2
            return
        yield world
    raise AssertionError("it makes more calls than anybody counted")


def save_second(catalog: Catalog, save_id: str = "second") -> None:
    save_step(catalog, 2, save_id=save_id)


def test_a_save_that_dies_shows_nothing_or_all_and_the_next_one_succeeds(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, save_second):
        seen = truth(world.catalog())
        assert seen in ({1: FIRST}, {1: FIRST, 2: dict(FILES)})
        if 2 in seen:
            with pytest.raises(StepExistsError):
                save_second(world.catalog(), "third")
        else:
            assert plan_resume(world.catalog().observe().checkpoints).step == 1
            save_second(world.catalog(), "third")
        assert truth(world.catalog()) == {1: FIRST, 2: dict(FILES)}


def test_a_save_that_dies_is_never_called_foreign(worlds: Iterator[World]) -> None:
    for world in deaths(worlds, save_second):
        states = {v.state for v in world.catalog().observe().checkpoints if v.step == 2}
        assert states <= {CheckpointState.COMMITTED, CheckpointState.SAVING}


def test_an_export_that_dies_is_there_whole_or_not_and_a_rerun_makes_it(
    worlds: Iterator[World],
) -> None:
    make = partial(save_export, name="hf", step=1, files=FILES)
    for world in deaths(worlds, lambda catalog: make(catalog, save_id="e1")):
        catalog = world.catalog()
        for export in catalog.observe().exports:
            assert [
                catalog.store.read(f"exports/hf/step-1/{e.path}") for e in export.manifest.files
            ]
        make(catalog, save_id="e2")
        folder = names.export_dir("hf", 1)
        entries = catalog.export("hf", 1).manifest.files
        assert {e.path: catalog.store.read(f"{folder}/{e.path}") for e in entries} == FILES


def test_a_purge_that_dies_leaves_the_step_in_place_or_in_the_trash(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, lambda catalog: catalog.trash(2), before=save_second):
        catalog = world.catalog()
        seen = truth(catalog)
        assert seen in ({1: FIRST}, {1: FIRST, 2: dict(FILES)})
        if 2 in seen:
            catalog.trash(2)
        assert truth(catalog) == {1: FIRST}
        catalog.restore(2)
        assert truth(catalog) == {1: FIRST, 2: dict(FILES)}


def save_and_trash_second(catalog: Catalog) -> None:
    save_second(catalog)
    catalog.trash(2)


def test_a_restore_that_dies_leaves_the_step_in_place_or_in_the_trash(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, lambda catalog: catalog.restore(2), before=save_and_trash_second):
        catalog = world.catalog()
        seen = truth(catalog)
        assert seen in ({1: FIRST}, {1: FIRST, 2: dict(FILES)})
        if 2 not in seen:
            catalog.restore(2)
        assert truth(catalog) == {1: FIRST, 2: dict(FILES)}


def erase_second(catalog: Catalog) -> None:
    aside = names.set_aside_dir(names.TRASH, 2, "second")
    catalog.commit.erase(aside, names.step_dir(2))


def test_an_erasure_that_dies_touches_no_other_step_and_a_rerun_ends_it(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, erase_second, before=save_and_trash_second):
        catalog = world.catalog()
        assert truth(catalog) == {1: FIRST}
        erase_second(catalog)
        assert truth(catalog) == {1: FIRST}
        assert list(catalog.store.list_objects("step-2")) == []
        assert list(catalog.store.list_objects(names.TRASH)) == []
        save_second(catalog, "third")
        assert truth(catalog) == {1: FIRST, 2: dict(FILES)}


ANEW = {"__0_0.distcp": b"saved anew", "hf_assets/new.json": b"[]"}


def save_second_anew(catalog: Catalog, save_id: str = "anew") -> None:
    save_step(catalog, 2, files=ANEW, save_id=save_id)


def test_saving_anew_what_is_in_the_trash_loses_neither_save_wherever_it_dies(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, save_second_anew, before=save_and_trash_second):
        catalog = world.catalog()
        seen = truth(catalog)
        assert seen in ({1: FIRST}, {1: FIRST, 2: ANEW})
        if 2 not in seen:
            save_second_anew(catalog, "again")
        catalog.quarantine(2)  # out of the way
        catalog.restore(2)
        assert truth(catalog) == {1: FIRST, 2: dict(FILES)}


def test_undoing_beside_a_save_that_died_brings_back_the_trashed_one(
    worlds: Iterator[World],
) -> None:
    for world in deaths(worlds, save_second_anew, before=save_and_trash_second):
        catalog = world.catalog()
        if 2 not in truth(catalog):
            catalog.restore(2)
            assert truth(catalog) == {1: FIRST, 2: dict(FILES)}


def test_erasing_the_older_save_never_harms_the_newer_one(worlds: Iterator[World]) -> None:
    def two_saves(catalog: Catalog) -> None:
        save_and_trash_second(catalog)
        save_second_anew(catalog)

    for world in deaths(worlds, erase_second, before=two_saves):
        catalog = world.catalog()
        assert truth(catalog) == {1: FIRST, 2: ANEW}
        erase_second(catalog)
        assert truth(catalog) == {1: FIRST, 2: ANEW}
        assert not [i for i in catalog.store.list_objects("step-2") if "second" in i.key]


def test_a_roll_back_that_dies_leaves_one_unbroken_branch_and_a_rerun_ends_it(
    worlds: Iterator[World],
) -> None:
    def third(catalog: Catalog) -> None:
        save_second(catalog)
        save_step(catalog, 3)

    for world in deaths(worlds, lambda catalog: catalog.roll_back(1, now=0.0), before=third):
        catalog = world.catalog()
        assert sorted(truth(catalog)) in ([1], [1, 2], [1, 2, 3])
        catalog.roll_back(1, now=0.0)
        assert truth(catalog) == {1: FIRST}
        save_second_anew(catalog)
        catalog.restore(3)
        assert truth(catalog) == {1: FIRST, 2: ANEW, 3: dict(FILES)}


def test_a_half_erased_step_is_never_resumed_from(worlds: Iterator[World]) -> None:
    for world in deaths(worlds, erase_second, before=save_and_trash_second):
        catalog = world.catalog()
        is_listed = any(v.step == 2 for v in catalog.observe().checkpoints)
        if is_listed:
            catalog.restore(2)
        step = plan_resume(catalog.observe().checkpoints).step
        assert step == (2 if is_listed and catalog.damage(2) == [] else 1)


def test_a_rename_onto_a_committed_folder_leaves_both_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = World(tmp_path / "run", "rename", monkeypatch).catalog()
    save_step(catalog, 1, files=FIRST)
    staging = catalog.commit.staging("late")
    (staging / "__0_0.distcp").write_bytes(b"late")
    with pytest.raises(ObjectExistsError):
        catalog.commit.publish(staging, "step-1", b"{}")
    assert truth(catalog) == {1: FIRST}
    assert (staging / "__0_0.distcp").read_bytes() == b"late"
