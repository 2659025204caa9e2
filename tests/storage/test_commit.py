import os
import time
from pathlib import Path

import pytest

from ray_ckpt.storage.backends import open_catalog
from tests.roots import make_root


def test_an_attempt_that_is_given_up_is_gone_and_a_young_one_stays(root: str) -> None:
    commit = open_catalog(root).commit
    old, young = commit.staging("export-old"), commit.staging("export-young")
    (old / "shard").write_bytes(b"x" * 1000)
    (young / "shard").write_bytes(b"x" * 1000)
    an_hour_ago = time.time() - 3600
    for path in (old / "shard", old):
        os.utime(path, (an_hour_ago, an_hour_ago))
    age_s = {remains.attempt: time.time() - remains.changed_at for remains in commit.remains()}
    assert age_s["export-old"] >= 3600 > 600 > age_s["export-young"]
    old_one = next(remains for remains in commit.remains() if remains.attempt == "export-old")
    assert old_one.size_bytes == 1000
    commit.give_up(old_one)
    commit.give_up(old_one)
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
    assert "removed what save-dead left" in caplog.text
