"""Scenario 10: a power cut leaves the old truth or the new one, and never takes back a commit."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.observation import READABLE
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.backends import open_catalog
from tests.power import watched
from tests.storage.steps import save_export
from tests.tensors.plain import save_steps

Truth = dict[int, str]


def truth(root: Path) -> Truth:
    """Save id of every readable step, each byte of which was read and is as committed."""
    catalog = open_catalog(str(root))
    readable = [v for v in catalog.observe().checkpoints if v.state in READABLE]
    return {view.step: catalog.verify(view.step).save_id for view in readable}


def cuts(
    folder: Path, act: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> list[Truth]:
    """What is true after a cut at any moment of `act`, oldest first; it ends well otherwise."""
    found: list[Truth] = []
    with watched(folder, monkeypatch) as disk:
        act(folder / "run")
        for number in itertools.count():
            if number == len(disk.states):
                break
            found.append(truth(disk.restore(number, folder.parent / f"cut{number}") / "run"))
    return [now for now, before in zip(found, [None, *found], strict=False) if now != before]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the root lies; its own name must become durable as well."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def test_the_first_save_makes_its_root_durable_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = cuts(folder, lambda root: save_steps(root, 1), monkeypatch)
    assert seen == [{}, truth(folder / "run")]


def test_a_save_is_there_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(folder / "run", 1)
    before = truth(folder / "run")
    seen = cuts(folder, lambda root: save_steps(root, 2), monkeypatch)
    assert seen == [before, truth(folder / "run")]
    assert sorted(seen[1]) == [1, 2]


def test_what_is_purged_can_come_back_whenever_the_power_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first purge makes the trash; a cut must lose neither it nor what is in it."""
    save_steps(folder / "run", 1, 2)
    both = truth(folder / "run")
    with watched(folder, monkeypatch) as disk:
        open_catalog(str(folder / "run")).trash(2)
        for number in range(len(disk.states)):
            root = disk.restore(number, folder.parent / f"cut{number}") / "run"
            if 2 not in truth(root):
                open_catalog(str(root)).restore(2)
            assert truth(root) == both
    assert 2 not in truth(root.parent.parent / "disk/run")


def test_an_export_and_a_record_are_there_once_they_were_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders that were made for them are durable, too."""
    save_steps(folder / "run", 1)
    catalog = open_catalog(str(folder / "run"))
    record = ActionRecord(action=verify_action(catalog.checkpoint(1)))
    with watched(folder, monkeypatch) as disk:
        save_export(catalog, "hf", 1, files={}, save_id="e1")
        catalog.records.write_action(record)
        root = disk.restore(-1, folder.parent / "cut") / "run"
    after = open_catalog(str(root))
    assert after.export("hf", 1).manifest.save_id == "e1"
    assert after.records.actions() == {record.action.key: record}
    assert (root / names.export_dir("hf", 1)).is_dir()
