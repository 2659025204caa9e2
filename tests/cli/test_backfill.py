"""`ray-ckpt backfill` as a person meets it, with a folder of checkpoints that others wrote."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.trash import Trash
from tests.cli.conftest import Answer
from tests.roots import TINY, flip_byte, snapshot
from tests.waiting import PATIENCE_S, wait_for

Cli = Callable[..., Answer]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = (5, 10, 15)


@pytest.fixture
def old(tmp_path: Path) -> str:
    """A run's checkpoints, by plain DCP."""
    torch.manual_seed(0)
    for step in STEPS:
        model = Decoder(TINY, VOCAB_SIZE)
        dcp.save(
            {**model.state_dict(), "optimizer.step": torch.tensor(step)},
            checkpoint_id=str(tmp_path / f"old/step-{step}"),
            no_dist=True,
        )
    return str(tmp_path / "old")


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    for name, data in make_assets(TINY).files.items():
        (folder / name).write_bytes(data)
    return folder


def words(old: str, assets: Path, to: Path) -> list[str]:
    options = ("--family", "llama", "--hf-assets", assets, "--dtype", "float32", "--to", to)
    return ["backfill", *map(str, (old, *options))]


def told(answer: Answer) -> dict[int, list[str]]:
    return {row["step"]: row["did"] for row in answer.json["steps"]}


def versions(folder: str) -> dict[str, tuple[int, int]]:
    """Which file each is: one that was made again is another."""
    found = {str(p): p.stat() for p in Path(folder).rglob("*") if p.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def test_old_checkpoints_are_adopted_verified_exported_and_published(
    cli: Cli, old: str, assets: Path, tmp_path: Path
) -> None:
    before = snapshot(old)
    answer = cli(*words(old, assets, tmp_path / "copies"), "--rate", "1GB", "--json")
    assert answer.code == 0, answer.err
    assert told(answer) == {step: ["adopted", "verified", "published"] for step in STEPS}
    after = snapshot(old)
    assert {name: after[name] for name in before} == before
    rows = cli("ls", old, "--json").json
    assert [(row["state"], row["exports"]) for row in rows] == [("verified", ["hf-fp32"])] * 3
    for row in rows:
        (copy,) = row["copies"]
        assert copy == f"{tmp_path}/copies/exports/hf-fp32/step-{row['step']}"
        assert cli("diff", f"{old}/step-{row['step']}", copy).code == 0
    again = cli(*words(old, assets, tmp_path / "copies"), "--json")
    assert again.code == 0
    assert told(again) == {step: [] for step in STEPS}
    assert snapshot(f"{old}/exports") == {
        name.removeprefix("exports/"): data
        for name, data in after.items()
        if name.startswith("exports/")
    }


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_does_nothing_twice(
    cli: Cli, old: str, assets: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    command = [sys.executable, "-m", "ray_ckpt", *words(old, assets, copies)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    moments = (
        Path(old, "step-5/ray_ckpt.manifest.json"),
        Path(old, "exports/hf-fp32/step-5/ray_ckpt.manifest.json"),
        copies / "exports/hf-fp32/step-10/ray_ckpt.manifest.json",
    )
    for moment in moments:
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                wait_for(moment.exists)
            finally:
                process.kill()
    done = {**versions(f"{old}/step-5"), **versions(f"{copies}/exports/hf-fp32/step-5")}
    done |= versions(f"{old}/exports/hf-fp32/step-5")
    assert len(done) > 10
    last = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert last.returncode == 0, last.stderr
    assert "step-15: adopted, verified, published" in last.stderr
    now = {**versions(old), **versions(str(copies))}
    assert {name: now[name] for name in done} == done
    records = open_catalog(old).records.actions().values()
    assert {record.state for record in records} == {ActionState.SUCCEEDED}
    for step in STEPS:
        assert cli("diff", f"{old}/step-{step}", f"{copies}/exports/hf-fp32/step-{step}").code == 0


def test_what_cannot_be_done_is_named_and_the_rest_is_done(
    cli: Cli, old: str, assets: Path, tmp_path: Path
) -> None:
    flip_byte(Path(old, "step-10/__0_0.distcp"))
    (Path(old) / "step-12").mkdir()
    Path(old, "step-5").rename(Path(old, "checkpoint_000005"))
    before = snapshot(f"{old}/checkpoint_000005")
    options = ("--family", "llama", "--hf-assets", assets, "--dtype", "bfloat16", "--every", 15)
    answer = cli("backfill", old, *options, "--json")
    assert answer.code == 1
    rows = {row["step"]: row for row in answer.json["steps"]}
    assert rows[10]["did"] == []
    assert "step-10 is not whole: __0_0.distcp is damaged" in rows[10]["error"]
    assert rows[15]["did"] == ["adopted", "verified", "exported"]
    assert answer.json["no_steps"] == ["checkpoint_000005"]
    assert "add --folders checkpoint_000005" in cli("backfill", old).err
    assert snapshot(f"{old}/checkpoint_000005") == before
    (weights,) = Path(old, "exports/hf-bf16/step-15").glob("*.safetensors")
    assert "model.embed_tokens.weight" in load_file(weights)


def test_without_an_export_steps_are_adopted_and_verified(cli: Cli, old: str) -> None:
    answer = cli("backfill", old, "--json")
    assert told(answer) == {step: ["adopted", "verified"] for step in STEPS}
    assert {row["state"] for row in cli("ls", old, "--json").json} == {"verified"}
    refused = cli("backfill", old, "--to", "/nowhere")
    assert refused.code == 2
    assert "add --dtype bfloat16" in refused.err


@pytest.mark.s3
def test_a_destination_that_says_no_ends_it_and_all_that_is_done_stays_done(
    cli: Cli, old: str, assets: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of somebody else")
    options = ("--family", "llama", "--hf-assets", assets, "--dtype", "float32")
    answer = cli("backfill", old, *options, "--to", s3_root)
    assert answer.code == 4
    rows = cli("ls", old, "--json").json
    assert [row["state"] for row in rows] == ["verified", "foreign", "foreign"]
    assert rows[0]["exports"] == ["hf-fp32"]


@pytest.mark.parametrize("place", ["here", pytest.param("s3", marks=pytest.mark.s3)])
def test_folders_with_other_names_become_steps_and_stay_what_they_are(
    cli: Cli, old: str, place: str, request: pytest.FixtureRequest
) -> None:
    for step in STEPS:
        Path(old, f"step-{step}").rename(Path(old, f"checkpoint_{step:06}"))
    before = snapshot(old)
    where = old
    if place == "s3":
        where = request.getfixturevalue("s3_root")
        for name, data in before.items():
            open_catalog(where).store.write(name, data)
    answer = cli("backfill", where, "--folders", "checkpoint_*", "--json")
    assert answer.code == 0, answer.err
    assert told(answer) == {step: ["adopted", "verified"] for step in STEPS}
    assert told(cli("backfill", where, "--folders", "checkpoint_*", "--json")) == {
        step: [] for step in STEPS
    }
    store = open_catalog(where).store
    assert {name: store.read(name) for name in before} == before
    refused = cli("backfill", where, "--folders", "ckpt_*")
    assert refused.code == 2
    assert "no folder of a DCP checkpoint is called ckpt_*" in refused.err


@pytest.mark.parametrize("place", ["here", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_step_that_was_purged_since_is_told_of_and_taken_again_only_if_it_is_asked_for(
    cli: Cli, old: str, place: str, request: pytest.FixtureRequest
) -> None:
    for step in STEPS:
        Path(old, f"step-{step}").rename(Path(old, f"checkpoint_{step:06}"))
    where = old
    if place == "s3":
        where = request.getfixturevalue("s3_root")
        for name, data in snapshot(old).items():
            open_catalog(where).store.write(name, data)
    words = ("backfill", where, "--folders", "checkpoint_*")
    assert cli(*words).code == 0
    assert cli("purge", where, "--keep-latest", 2, "--apply").code == 0
    answer = cli(*words, "--json")
    assert (answer.code, told(answer)) == (0, {step: [] for step in STEPS})
    in_trash = f"it is in the trash; ray-ckpt undo {where} 5 brings it back"
    assert [row["left"] for row in answer.json["steps"]] == [in_trash, None, None]

    catalog = open_catalog(where)
    trash = Trash(catalog.store, catalog.commit, catalog.records)
    (trashed,) = trash.expired(older_than_s=0.0, now=time.time() + 1)
    trash.erase(trashed)
    for record in catalog.records.actions().values():
        catalog.records.forget_action(record.action)
    answer = cli(*words)
    purged = "it was taken before and purged since; with --again it is taken once more"
    assert (answer.code, answer.out.splitlines()[0]) == (0, f"step-5\t0 B\t-\t{purged}")
    assert f"step-5: {purged}" in answer.err
    assert [row["step"] for row in cli("ls", where, "--json").json] == [10, 15]

    assert told(cli(*words, "--again", "--json"))[5] == ["adopted", "verified"]
    assert [row["step"] for row in cli("ls", where, "--json").json] == [5, 10, 15]


def test_a_folder_that_cannot_become_its_step_is_named_and_the_others_are_done(
    cli: Cli, old: str
) -> None:
    other = {"weight": torch.ones(3)}
    dcp.save(other, checkpoint_id=f"{old}/checkpoint_000005", no_dist=True)
    Path(old, "step-10").rename(Path(old, "checkpoint_000010"))
    answer = cli("backfill", old, "--folders", "checkpoint_*", "--json")
    assert answer.code == 1
    assert told(answer) == {step: ["adopted", "verified"] for step in STEPS}
    errors = {row["step"]: row["error"] for row in answer.json["steps"] if row["error"]}
    assert list(errors) == [5]
    assert "step-5 is there, and is not checkpoint_000005" in errors[5]
    assert "step-5: adopted, verified; step-5 is there" in answer.err
    assert "move one of them to another root" in answer.err
