"""A folder that plain torch wrote becomes a committed step, and nothing of it is changed."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ray_ckpt.core.errors import ForeignFolderError, IntegrityError, StepNotFoundError
from ray_ckpt.core.names import MANIFEST
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.adopt import adopt_step, foreign_steps
from ray_ckpt.tensors.load_into import read_tensors
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.conftest import SavedRun
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of, files_in, same_tensors, train


@pytest.fixture
def foreign_root(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A root with a step-5 that plain torch wrote, and what is in it."""
    torch.manual_seed(0)
    state = {"weight": torch.randn(4, 2), "bias": torch.randn(4).bfloat16()}
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save({**state, "step": 5}, checkpoint_id=tmp_path / "run/step-5")
    return tmp_path / "run", state


Foreign = tuple[Path, dict[str, torch.Tensor]]


def test_what_plain_torch_wrote_is_adopted_and_read_with_equal_values(
    foreign_root: Foreign,
) -> None:
    root, state = foreign_root
    before = files_in(root)
    catalog = open_catalog(str(root))
    assert foreign_steps(catalog) == [5]
    manifest = adopt_step(catalog, 5)
    assert foreign_steps(catalog) == []
    assert catalog.verify(5) == manifest
    assert same_tensors(read_tensors(catalog, manifest, ["bias", "weight"]), state)
    after = files_in(root)
    assert after.pop(f"step-5/{MANIFEST}")
    assert after == before


def test_what_torch_wrote_without_checksums_is_adopted(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        with pytest.warns(UserWarning, match="save in a single process"):
            dcp.save({"weight": torch.ones(4, 2)}, checkpoint_id=tmp_path / "step-5")
    finally:
        torch.serialization.set_crc32_options(True)
    catalog = open_catalog(str(tmp_path))
    manifest = adopt_step(catalog, 5)
    assert read_tensors(catalog, manifest, ["weight"])["weight"].eq(1).all()


def test_a_step_whose_manifest_was_lost_is_adopted_and_resumed_from(
    saved_run: SavedRun, saved_root: Path
) -> None:
    for step in (3, 6, 9):
        shutil.rmtree(saved_root / f"step-{step}")
    (saved_root / "step-12" / MANIFEST).unlink()
    adopt_step(open_catalog(str(saved_root)), 12)
    outcome = run(train, str(saved_root), 12, SaveConfig(), 3)[0]
    assert outcome.report.step == 12
    assert same_tensors(outcome.state, saved_run.ranks[0].state)


def test_a_model_alone_lacks_no_key_it_does_not_ask_for(foreign_root: Foreign) -> None:
    """Keys that only the folder has are named, not ignored."""
    root, _ = foreign_root
    adopt_step(open_catalog(str(root)), 5)
    manager = CheckpointManager(str(root), TrainingState(model=ModelWrapper(nn.Linear(2, 4))))
    error = error_of(manager.load)
    manager.close()
    assert error is not None
    assert "holds step" in error.what


class _Call:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


def test_a_hostile_folder_is_refused_and_nothing_of_it_runs(
    foreign_root: Foreign, tmp_path: Path
) -> None:
    root, _ = foreign_root
    mark = tmp_path / "ran"
    (root / "step-5/.metadata").write_bytes(pickle.dumps(_Call(mark)))
    error = _refused(root)
    assert isinstance(error, IntegrityError)
    assert "system" in error.what
    assert not mark.exists()


def test_a_missing_shard_is_named(foreign_root: Foreign) -> None:
    root, _ = foreign_root
    (root / "step-5/__0_0.distcp").unlink()
    error = _refused(root)
    assert isinstance(error, IntegrityError)
    assert "__0_0.distcp" in error.what


def test_a_short_shard_is_named(foreign_root: Foreign) -> None:
    root, _ = foreign_root
    os.truncate(root / "step-5/__0_0.distcp", 100)
    error = _refused(root)
    assert isinstance(error, IntegrityError)
    assert "__0_0.distcp" in error.what


def test_a_folder_without_an_index_is_refused(foreign_root: Foreign) -> None:
    root, _ = foreign_root
    (root / "step-5/.metadata").unlink()
    assert isinstance(_refused(root), ForeignFolderError)


def test_a_folder_that_is_not_there_is_refused(foreign_root: Foreign) -> None:
    root, _ = foreign_root
    error = error_of(lambda: adopt_step(open_catalog(str(root)), 77))
    assert isinstance(error, StepNotFoundError | ForeignFolderError)
    assert not (root / "step-77").exists()


def test_pins_of_a_folder_are_no_part_of_its_content(foreign_root: Foreign) -> None:
    root, _ = foreign_root
    (root / "step-5/ray_ckpt.pin.paper.json").write_text("{}")
    catalog = open_catalog(str(root))
    assert all("pin" not in entry.path for entry in adopt_step(catalog, 5).files)
    catalog.unpin(5)
    catalog.verify(5)


def _refused(root: Path) -> Exception | None:
    """Why adopting fails; the folder is as it was and still foreign."""
    catalog = open_catalog(str(root))
    before = files_in(root)
    error = error_of(lambda: adopt_step(catalog, 5))
    assert files_in(root) == before
    assert foreign_steps(catalog) == [5]
    return error
