import os
import time
from pathlib import Path

import pytest

from ray_ckpt.storage.backends import open_catalog
from tests.roots import make_root


def test_attempts_of_dead_processes_are_swept_and_young_ones_stay(root: str) -> None:
    commit = open_catalog(root).commit
    old, young = commit.staging("export-old"), commit.staging("export-young")
    (old / "shard").write_bytes(b"x" * 1000)
    (young / "shard").write_bytes(b"x" * 1000)
    an_hour_ago = time.time() - 3600
    for path in (old / "shard", old):
        os.utime(path, (an_hour_ago, an_hour_ago))
    assert commit.sweep(prefix="export-", idle_s=1800, now=time.time()) == ["export-old"]
    assert not old.exists()
    assert (young / "shard").exists()


def test_the_next_trainer_sweeps_what_a_dead_one_left(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit = open_catalog(root).commit
    (commit.staging("save-dead") / "__0_0.distcp").write_bytes(b"x" * 1000)
    commit.staging("export-of-the-manager")
    make_root(root, (10, 20))
    left = [path.name for path in (Path(root) / ".ray_ckpt" / "staging").iterdir()]
    assert left == ["export-of-the-manager"]
    assert "removed save-dead" in caplog.text
