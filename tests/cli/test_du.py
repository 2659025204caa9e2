"""`ray-ckpt du` as a person or a script meets it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core.garbage import ABANDONED_AFTER_S
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.storage.backends import open_catalog
from tests.cli.conftest import Answer
from tests.roots import flip_byte, make_root, snapshot

Cli = Callable[..., Answer]
KEEP = LifecyclePolicy(keep=KeepConfig(latest=3))


def bytes_below(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def test_everything_has_its_row_and_the_sum_is_what_lies_there(
    cli: Cli, root: str, tmp_path: Path
) -> None:
    make_root(root, (10, 20, 30, 40, 50), KEEP)
    base, copies = Path(root), tmp_path / "copies"
    flip_byte(base / "step-20/__0_0.distcp")
    cli("export", root, "--step", 20)
    cli("export", root, "--step", 50, "--to", copies)
    open_catalog(root).trash(30)
    dead = open_catalog(root).commit.staging("export-0123") / "model.safetensors"
    dead.write_bytes(b"x" * 1500)
    for path in (dead, dead.parent):
        os.utime(path, (time.time() - 4 * ABANDONED_AFTER_S,) * 2)
    (base / "wandb").mkdir()
    (base / "wandb/log").write_bytes(b"x" * 700)
    before = snapshot(root)
    document = cli("du", root, "--json").json
    assert snapshot(root) == before
    assert document["bytes"] == bytes_below(base)
    rows = {(row["what"], row["name"]): row for row in document["items"]}
    for step in (10, 40, 50):
        row = rows["checkpoint", f"step-{step}"]
        assert row["bytes"] == bytes_below(base / f"step-{step}")
        assert row["model"] + row["optimizer"] + row["rest"] == row["bytes"]
        assert row["optimizer"] > 2 * row["model"] > 2 * 40_000  # Adam holds two of each, framed
    assert rows["trash", "step-30"]["bytes"] == bytes_below(base / ".ray_ckpt/trash")
    assert rows["quarantine", "step-20"]["bytes"] == bytes_below(base / ".ray_ckpt/quarantine")
    assert rows["export", "hf-bf16 of step-50"]["bytes"] == bytes_below(base / "exports")
    assert rows["unfinished", "attempt export-0123"]["bytes"] == 1500
    assert rows["not ours", "wandb"]["bytes"] == 700
    sizes = [row["bytes"] for row in document["items"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(row["bytes"] for row in document["groups"]) == document["bytes"]
    (copy,) = document["elsewhere"]
    assert copy["where"] == f"{copies}/exports/hf-bf16/step-50"
    assert copy["bytes"] > 80_000
    could_go = {row["do"]: (row["count"], row["bytes"]) for row in document["could_go"]}
    assert could_go[f"ray-ckpt gc {root} --apply"] == (1, 1500)
    assert f"ray-ckpt purge {root} --apply" not in could_go  # the three that are here are kept


def test_what_the_policy_lets_go_is_told_with_the_command(cli: Cli, root: str) -> None:
    make_root(root, (10, 20, 30, 40), LifecyclePolicy(keep=KeepConfig(latest=2)))
    sizes = [open_catalog(root).manifest(step).total_bytes for step in (10, 20)]
    out = cli("du", root).out
    assert "could go: checkpoints that the run's policy lets go; from the trash after " in out
    assert f"(2). Do it: ray-ckpt purge {root} --apply" in out
    (row,) = cli("du", root, "--json").json["could_go"]
    assert row["bytes"] == sum(sizes)
    assert out.splitlines()[0].split("\t")[:2] == ["checkpoint", "4"]
    assert [line.split("\t")[0] for line in out.splitlines()[1:4]] == [
        "checkpoint: model",
        "checkpoint: optimizer",
        "checkpoint: rest",
    ]


def test_a_root_with_nothing_in_it_takes_no_room(cli: Cli, tmp_path: Path) -> None:
    document = cli("du", tmp_path, "--json").json
    assert (document["bytes"], document["items"], document["could_go"]) == (0, [], [])
    assert document["free_bytes"] > 0


@pytest.mark.s3
def test_on_s3_shards_of_trashed_steps_and_uploads_that_never_ended_are_found(
    cli: Cli, s3_root: str
) -> None:
    make_root(s3_root, (10, 20, 30))
    catalog = open_catalog(s3_root)
    total = catalog.manifest(10).total_bytes
    catalog.trash(10)
    upload = catalog.store.begin("step-40/__0_dead_0.distcp", 6 << 20)
    upload.put(0, memoryview(bytearray(upload.block_bytes)), upload.block_bytes)
    rows = {(r["what"], r["name"]): r for r in cli("du", s3_root, "--json").json["items"]}
    assert rows["trash", "step-10"]["bytes"] >= total
    assert ("checkpoint", "step-10") not in rows
    assert rows["checkpoint", "step-20"]["bytes"] >= catalog.manifest(20).total_bytes
    unfinished = rows["unfinished", "upload of step-40/__0_dead_0.distcp"]
    assert unfinished["bytes"] == upload.block_bytes
    assert cli("du", s3_root, "--json").json["free_bytes"] is None
    upload.abandon()
