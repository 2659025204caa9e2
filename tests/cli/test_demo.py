import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt.storage.backends import open_catalog
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.ray


def demo(root: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command in a session of its own, as a terminal starts it."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "ray_ckpt", "demo", "--root", str(root), "--json", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the demo's last line says; run once for all tests of this module."""
    process = demo(tmp_path_factory.mktemp("demo") / "run")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_killed_worker_costs_nothing_but_time(told: dict[str, Any]) -> None:
    assert told["killed_at_step"] >= 30
    assert told["resumed_from_step"] in (30, 40)
    assert told["resumed_from_step"] <= told["killed_at_step"]
    if told["killed_at_step"] % 10 > 2:  # no save was under way
        assert told["resumed_from_memory_bytes"] > 1_000_000
    assert told["losses_repeated"] >= 1
    assert told["losses_identical"]
    assert told["last_loss"] < told["first_loss"]


def test_every_step_has_the_fate_that_its_policy_says(told: dict[str, Any]) -> None:
    assert told["steps_committed"] == [10, 20, 30, 40, 50, 60]
    assert told["purged_steps"] == [10, 20, 40]
    assert [(e["name"], e["step"]) for e in told["exports"]] == [("hf-bf16", 30), ("hf-bf16", 60)]
    states = {c.step: str(c.state) for c in open_catalog(told["root"]).observe().checkpoints}
    assert states == {
        10: "trashed",
        20: "trashed",
        30: "verified",
        40: "trashed",
        50: "verified",
        60: "verified",
    }


def test_the_copies_are_equal_to_the_exports(told: dict[str, Any]) -> None:
    assert sorted(p["step"] for p in told["published"]) == [30, 60]
    copies = open_catalog(told["published"][0]["destination"])
    for export in open_catalog(told["root"]).observe().exports:
        copy = copies.export(export.name, export.step)
        assert copy.manifest == export.manifest
        for entry in copy.manifest.files:
            key = f"exports/{export.name}/step-{export.step}/{entry.path}"
            assert copies.store.read(key) == open_catalog(told["root"]).store.read(key)


def test_the_export_is_the_trained_model(told: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = told["exports"][-1]["path"]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(path).decode([100, 101, 102]) == "def"
    assert told["sample"]["weights_equal"]
    assert told["sample"]["max_logit_difference"] < 1e-3
    assert told["sample"]["text"].startswith("def ")


def test_it_says_how_long_each_part_took(told: dict[str, Any]) -> None:
    assert {"train", "export", "publish", "total"} <= set(told["seconds"])
    assert told["seconds"]["total"] > told["seconds"]["train"]


@pytest.mark.slow
def test_run_again_it_has_nothing_left_to_do(told: dict[str, Any]) -> None:
    process = demo(Path(told["root"]))
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    again = json.loads(out.splitlines()[-1])
    assert again["killed_at_step"] is None
    assert again["steps_committed"] == told["steps_committed"]
    assert again["exports"] == told["exports"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_root_that_training_resumes_from(tmp_path: Path) -> None:
    process = demo(tmp_path / "run")
    catalog = open_catalog(str(tmp_path / "run"))
    wait_for(lambda: [v for v in catalog.observe().readable() if v.step >= 10])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    started = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert f"ray-ckpt demo --root {tmp_path / 'run'}" in err
    assert time.monotonic() - started < 60
    newest = catalog.observe().readable()[-1].step
    assert catalog.damage(newest) == []
    process = demo(tmp_path / "run")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["steps_committed"] == [10, 20, 30, 40, 50, 60]
