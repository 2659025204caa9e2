"""A step that is loaded or exported stays where it is until that has ended (scenario 50)."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import PurgeRefusedError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.loading import FromWeights, LoadConfig
from ray_ckpt.core.wanted import purge_action, verify_action
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.readers import readers_by_step
from ray_ckpt.tensors import exporting
from ray_ckpt.tensors import loader as loader_module
from ray_ckpt.tensors.export import export_step
from tests.roots import make_root
from tests.tensors.plain import Layer, plain_manager, save_steps


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Steps 1, 2 and 3, each verified, full of its own number."""
    root = str(tmp_path / "run")
    save_steps(root, 1, 2, 3)
    verify_all(open_catalog(root))
    return root


def verify_all(catalog: Catalog) -> None:
    for view in catalog.observe().readable():
        record = ActionRecord(action=verify_action(view))
        catalog.records.write_action(record.started(1.0).succeeded({}, 1.0))


def purge(root: str, step: int) -> int:
    catalog = open_catalog(root)
    return purge_step(catalog, purge_action(catalog.checkpoint(step), grace_s=60.0), now=0.0)


def in_the_middle(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], None]
) -> None:
    """`act` is called when the module's function has been entered."""
    function = getattr(module, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("step", [1, -1])
def test_a_load_holds_its_step(root: str, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    refusals: list[str] = []

    def try_to_purge() -> None:
        with pytest.raises(PurgeRefusedError) as caught:
            purge(root, 1 if step == 1 else 3)
        refusals.append(caught.value.what)

    in_the_middle(monkeypatch, loader_module, "restore", try_to_purge)
    model = Layer()
    manager = plain_manager(root, model)
    manager.load(step=step)
    manager.close()
    (refusal,) = refusals
    assert "it is being read: load, process" in refusal
    assert readers_by_step(open_catalog(root).store) == {}
    if step == 1:
        assert model.values() == {1.0}
        assert purge(root, 1) > 0


def test_a_run_that_starts_from_another_runs_step_holds_it_there(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[int, list[str]]] = []
    store = open_catalog(root).store
    in_the_middle(
        monkeypatch, loader_module, "restore", lambda: seen.append(readers_by_step(store))
    )
    manager = plain_manager(tmp_path / "other", Layer())
    manager.load(config=LoadConfig(start=FromWeights(path=f"{root}/step-1")))
    manager.close()
    assert list(seen[0]) == [1]
    assert seen[0][1][0].startswith("load into another run, process")
    assert readers_by_step(store) == {}


def test_an_export_holds_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / "run")
    make_root(root, (10, 20, 30))
    catalog = open_catalog(root)
    verify_all(catalog)
    refusals: list[str] = []

    def try_to_purge() -> None:
        with pytest.raises(PurgeRefusedError) as caught:
            purge(root, 10)
        refusals.append(caught.value.what)

    in_the_middle(monkeypatch, exporting, "plan_export", try_to_purge)
    export_step(catalog, catalog.manifest(10), ExportSpec(name="hf"))
    assert "it is being read: export hf, process" in refusals[0]
    assert purge(root, 10) > 0


def test_a_step_that_is_saved_anew_while_it_is_exported_makes_no_export_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "run")
    make_root(root, (10, 20))
    catalog = open_catalog(root)

    def roll_back_and_save_anew() -> None:
        catalog.roll_back(10, now=0.0)
        make_root(root, (20,))

    in_the_middle(monkeypatch, exporting, "write_companions", roll_back_and_save_anew)
    with pytest.raises(UsageError, match="saved anew while it was exported"):
        export_step(catalog, catalog.manifest(20), ExportSpec(name="hf"))
    assert catalog.observe().exports == ()


def test_no_thread_is_left_by_a_load_but_the_one_that_tells_of_it(root: str) -> None:
    before = set(threading.enumerate())
    manager = plain_manager(root, Layer())
    during = set(threading.enumerate())
    manager.load(step=1)
    assert {thread.name for thread in {*threading.enumerate()} - during} <= {"ray_ckpt events"}
    manager.close()
    assert not [t for t in {*threading.enumerate()} - before if t.name.startswith("ray_ckpt")]
