"""Whole checkpoints go elsewhere by command and by policy, and come back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.copy_policy import CopiedSteps, KeepCopies, PublishPolicy
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.storage.backends import open_catalog
from tests.roots import flip_byte, make_root, snapshot

Cli = Callable[..., Any]


def test_a_checkpoint_is_published_listed_looked_at_and_fetched(
    cli: Cli, root: str, tmp_path: Path
) -> None:
    make_root(root, (10, 20))
    to = tmp_path / "backup"
    arguments = ("publish", root, "--step", 10, "--checkpoint", "--to", to)
    assert cli(*arguments).out == f"{to}/step-10\n"
    assert cli(*arguments, "--json").json["bytes"] == 0
    assert cli("ls", root, "--json").json[0]["copies"] == [f"{to}/step-10"]
    assert f"publish step-10 checkpoint to {to}\tsucceeded" in cli("show", root, 10).out
    assert cli("copies", root).out.startswith(f"publish step-10 checkpoint to {to}\tpresent")
    assert cli("verify", to).code == 0
    assert cli("fetch", f"{to}/step-10", tmp_path / "back").code == 0
    assert snapshot(str(tmp_path / "back")) == snapshot(f"{root}/step-10")


def test_a_copy_is_read_back_where_somebody_asks(cli: Cli, root: str, tmp_path: Path) -> None:
    make_root(root, (10,))
    to = tmp_path / "backup"
    arguments = ("publish", root, "--step", 10, "--checkpoint", "--to", to, "--json")
    assert cli(*arguments).json["verified"] == "sizes"
    flip_byte(to / "step-10" / "__0_0.distcp")
    assert cli(*arguments).json["verified"] == "sizes"
    answer = cli(*arguments, "--read-back")
    assert answer.code == 1
    assert "__0_0.distcp is crc64nvme" in answer.err
    assert "look at it and remove it there, then publish again" in answer.err
    shutil.rmtree(to / "step-10")
    assert cli(*arguments, "--read-back").json["verified"] == "digests"


def test_a_copy_that_is_gone_says_how_to_make_it_again(cli: Cli, root: str, tmp_path: Path) -> None:
    make_root(root, (10,))
    to = tmp_path / "backup"
    cli("publish", root, "--step", 10, "--checkpoint", "--to", to)
    (to / "step-10" / "ray_ckpt.manifest.json").unlink()
    (row,) = cli("copies", root, "--json").json
    assert row["state"] == "gone"
    assert row["do"] == f"ray-ckpt publish {root} --step 10 --checkpoint --to {to}"


@pytest.mark.parametrize("what", [(), ("--checkpoint", "--name", "hf")])
def test_what_is_copied_must_be_said(cli: Cli, root: str, what: tuple[str, ...]) -> None:
    make_root(root, (10,))
    answer = cli("publish", root, "--step", 10, *what, "--to", "/nowhere")
    assert answer.code == 2
    assert "--checkpoint for the checkpoint itself" in answer.err


def test_the_hub_is_refused_before_anything_is_asked_for(cli: Cli, root: str) -> None:
    make_root(root, (10,))
    answer = cli("publish", root, "--step", 10, "--checkpoint", "--to", "hf://org/repo")
    assert answer.code == 2
    assert "no repository on the Hub" in answer.err
    assert open_catalog(root).records.requests() == ()


def test_a_policy_copies_before_it_purges_and_keeps_the_newest_copies(
    cli: Cli, root: str, tmp_path: Path
) -> None:
    to = str(tmp_path / "backup")
    copy = PublishPolicy(
        checkpoint=CopiedSteps(every_steps=10), to=to, keep=KeepCopies(latest=2), verify="digests"
    )
    policy = LifecyclePolicy(publish=(copy,), keep=KeepConfig(latest=2))
    make_root(root, (10, 20, 30, 40), policy)
    planned = cli("plan", root, "--json").json["actions"]
    assert {a["action"]: a["not_now"] for a in planned}[f"publish step-10 checkpoint to {to}"] == (
        "after verify step-10"
    )
    assert cli("drain", root).code == 0
    states = {row["step"]: row["state"] for row in cli("ls", root, "--json").json}
    assert states == {10: "trashed", 20: "trashed", 30: "verified", 40: "verified"}
    there = {row["step"]: row["state"] for row in cli("ls", to, "--json").json}
    assert there == {30: "committed", 40: "committed"}
    done = json.loads(cli("drain", root, "--json").out)["succeeded"]
    assert f"publish step-10 checkpoint to {to}" in done
    assert f"retire step-10 checkpoint at {to}" in done
    made = open_catalog(root).records.actions().values()
    proven = [r.result["verified"] for r in made if r.action.kind is ActionKind.PUBLISH]
    assert proven == ["digests"] * 4
