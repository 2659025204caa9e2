"""One training of two ranks, whose checkpoints most tests of this folder read or copy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from tests.tensors.ranks import run
from tests.tensors.tiny import Outcome, train

STEPS = [3, 6, 9, 12]


@dataclass(frozen=True)
class SavedRun:
    """A root with steps 3, 6, 9 and 12; nobody may change it."""

    root: Path
    ranks: list[Outcome]

    @property
    def catalog(self) -> Catalog:
        return open_catalog(str(self.root))

    def copy(self, target: Path) -> Path:
        """Another root of the same content, which may be changed."""
        return shutil.copytree(self.root, target)


@pytest.fixture(scope="package")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """Twelve steps without an interruption, saved asynchronously every three."""
    root = tmp_path_factory.mktemp("saved") / "run"
    return SavedRun(
        root, run(train, str(root), STEPS[-1], SaveConfig(every_steps=3, when_busy="wait"))
    )


@pytest.fixture
def saved_root(saved_run: SavedRun, tmp_path: Path) -> Path:
    """A copy of that root, this test's own."""
    return saved_run.copy(tmp_path / "run")
