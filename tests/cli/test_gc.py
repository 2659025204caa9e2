"""`ray-ckpt gc` as a person or a script meets it."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core.garbage import ABANDONED_AFTER_S
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import MANAGER, Lease
from tests.cli.conftest import Answer
from tests.storage.steps import save_step

Cli = Callable[..., Answer]


@pytest.fixture
def littered(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A committed step, and what an export left that died a day ago."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    catalog = open_catalog(root)
    save_step(catalog, 5)
    staging = catalog.commit.staging("export-0123")
    (staging / "model.safetensors").write_bytes(b"x" * 1500)
    long_ago = time.time() - 4 * ABANDONED_AFTER_S
    for path in (staging / "model.safetensors", staging):
        os.utime(path, (long_ago, long_ago))
    return root


def staged(root: str) -> list[Path]:
    return list(Path(root, ".ray_ckpt/staging").glob("*"))


def test_gc_shows_what_could_go_and_changes_nothing(cli: Cli, littered: str) -> None:
    answer = cli("gc", littered)
    line, summary = answer.out.splitlines()
    where = f"{littered}/.ray_ckpt/staging/export-0123"
    why = "it was not committed; untouched for 24.0 h"
    assert line.split("\t") == ["attempt export-0123", where, "1.5 kB", why]
    assert summary.startswith("1.5 kB could go; nothing was changed. Do it: ray-ckpt gc")
    assert answer.code == 0
    assert len(staged(littered)) == 1


def test_gc_with_apply_removes_it(cli: Cli, littered: str) -> None:
    document = cli("gc", littered, "--apply", "--json").json
    assert document["applied"] is True
    (row,) = document["garbage"]
    assert (row["what"], row["bytes"], row["error"]) == ("attempt export-0123", 1500, None)
    assert staged(littered) == []
    assert cli("gc", littered).out == "nothing is here that nobody needs\n"
    assert cli("ls", littered, "--json").json[0]["step"] == 5


def test_gc_leaves_it_to_a_manager_that_lives(cli: Cli, littered: str) -> None:
    manager = Lease(open_catalog(littered).store, MANAGER, owner="another")
    manager.acquire()
    answer = cli("gc", littered, "--apply")
    assert "nothing was removed: another manager writes to this root" in answer.out
    assert "does it by itself" in answer.out
    assert answer.code == 0
    assert len(staged(littered)) == 1
    manager.release()


def test_gc_names_what_cannot_be_removed_and_removes_the_rest(
    cli: Cli, littered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(littered)
    catalog.store.write(".ray_ckpt/readers/5.dead.json", b"{}")
    reader = Path(littered, ".ray_ckpt/readers/5.dead.json")
    os.utime(reader, (1.0, 1.0))
    precious = Path(littered, "precious")
    precious.mkdir()
    real_find = Path.is_symlink
    monkeypatch.setattr(Path, "is_symlink", lambda p: p.name == "readers" or real_find(p))
    answer = cli("gc", littered, "--apply")
    assert answer.code == 1
    assert f"{reader} could not be removed: a symbolic link is here" in answer.err
    assert reader.exists()
    assert staged(littered) == []
