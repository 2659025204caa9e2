"""`ray-ckpt plan`: what would be done now, in order, with reasons; nothing is changed."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import AuthorizationError
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.names import running_key
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.beats import first_beat
from tests.cli.conftest import Answer
from tests.roots import make_root, snapshot
from tests.waiting import PATIENCE_S

Cli = Callable[..., Answer]
POLICY = LifecyclePolicy(
    export=(ExportPolicy(name="hf"),), publish=(PublishPolicy(export="hf", to="/copies"),)
)
STRICT = """
root = "/another/run"
[lifecycle.keep]
latest = 2
[[lifecycle.export]]
name = "hf-best"
best = 1
last_step = false
"""


@pytest.fixture
def run_root(root: str) -> str:
    make_root(root, (10, 20, 30), POLICY)
    return root


def test_every_action_has_its_reason_and_what_it_waits_for(cli: Cli, run_root: str) -> None:
    before = snapshot(run_root)
    answer = cli("plan", run_root, "--json")
    assert answer.code == 0
    assert answer.json["policy"] == "run"
    told = [(a["action"], a["reason"], a["not_now"]) for a in answer.json["actions"]]
    verify = "every committed step is verified"
    assert told == [
        ("verify step-10", verify, None),
        ("verify step-20", verify, None),
        ("verify step-30", verify, None),
        (
            "publish step-30 hf to /copies",
            "every hf is copied there, required",
            "after verify step-30",
        ),
        ("export step-30 hf", "last step", "after verify step-30"),
    ]
    assert all(v["keep"] for v in answer.json["verdicts"])
    assert (answer.json["dead"], answer.json["problems"]) == ([], [])
    assert snapshot(run_root) == before


def test_another_policy_can_be_tried_and_changes_nothing(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("verify", run_root)
    (tmp_path / "strict.toml").write_text(STRICT)
    before = snapshot(run_root)
    lines = cli("plan", run_root, "--policy", tmp_path / "strict.toml").out.splitlines()
    assert lines == [
        "export step-30 hf-best\tnow\tbest 1 by loss (min)",
        "purge step-10\tnow\tkept by neither a pin nor: latest 2",
        "step-10\tpurge\tkept by neither a pin nor: latest 2",
        "step-20\tkeep\tnewest two verified; latest 2",
        "step-30\tkeep\tnot done yet: export step-30 hf-best; newest two verified; latest 2",
    ]
    assert snapshot(run_root) == before


def test_what_is_passed_over_for_a_newer_step_says_so(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("verify", run_root)
    newest = '[[export]]\nname = "hf"\nevery_steps = 10\nlast_step = false\nwhen_behind = "newest"'
    (tmp_path / "newest.toml").write_text(newest)
    lines = cli("plan", run_root, "--policy", tmp_path / "newest.toml").out.splitlines()
    assert lines[:3] == [
        "export step-10 hf\tsuperseded: by export step-30 hf\tevery 10 steps",
        "export step-20 hf\tsuperseded: by export step-30 hf\tevery 10 steps",
        "export step-30 hf\tnow\tevery 10 steps",
    ]


def test_a_file_that_is_no_policy_is_a_usage_error(cli: Cli, run_root: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[keep]\nlatets = 3")
    answer = cli("plan", run_root, "--policy", tmp_path / "bad.toml")
    assert answer.code == 2
    assert "did you mean 'latest'?" in answer.err


def test_what_ended_dead_is_a_finding_while_its_step_is_here(cli: Cli, run_root: str) -> None:
    catalog = open_catalog(run_root)
    record = ActionRecord(action=verify_action(catalog.checkpoint(20))).started(time.time())
    error = AuthorizationError("no", run_root, "nothing was changed", "chmod u+r")
    catalog.records.write_action(record.failed(error, time.time()))
    answer = cli("plan", run_root)
    assert answer.code == 1
    assert "verify step-20\tdead after 1 attempts: no\t" in answer.out
    assert "dead: verify step-20: no" in answer.out
    assert "do:    chmod u+r" in answer.out
    catalog.trash(20)
    assert cli("plan", run_root).code == 0


def test_what_cannot_be_as_wished_is_a_finding(cli: Cli, run_root: str, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("[keep]\nmax_bytes = 5\nbest = 1\nbest_metric = 'acc'")
    answer = cli("plan", run_root, "--policy", tmp_path / "small.toml", "--json")
    assert answer.code == 1
    assert answer.json["problems"][0].startswith("keep: best by acc, but none of 3 checkpoints")
    assert answer.json["problems"][1].startswith("keep.max_bytes is 5, but 3 checkpoints")


def test_a_root_at_rest_has_nothing_left_to_do(cli: Cli, root: str) -> None:
    make_root(root, (10, 20))
    cli("verify", root)
    answer = cli("plan", root)
    assert answer.code == 0
    assert answer.out.splitlines()[0] == "nothing is left to do"


def test_planning_imports_neither_torch_nor_ray(run_root: str) -> None:
    code = (
        "import sys; from ray_ckpt.cli.main import cli;"
        "cli(['plan', sys.argv[1]], standalone_mode=False);"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, run_root], check=True, timeout=PATIENCE_S)


def test_what_finds_no_room_says_which_limit_keeps_it_waiting(cli: Cli, root: str) -> None:
    make_root(root, (10, 20), LifecyclePolicy(limits=Limits(total=1)))
    actions = cli("plan", root, "--json").json["actions"]
    assert [a["not_now"] for a in actions] == [None, "1 action runs already, limits.total"]


def test_what_runs_says_how_far_it_is(cli: Cli, run_root: str) -> None:
    catalog = open_catalog(run_root)
    record = ActionRecord(action=verify_action(catalog.checkpoint(10))).started(0.0)
    catalog.records.write_action(record)
    beat = replace(
        first_beat(attempt_started_at=0.0, node=None), doing="reads step-10", done_bytes=3
    )
    key = running_key(record.action.key, 1)
    catalog.store.write(key, replace(beat, total_bytes=4).to_json())
    actions = cli("plan", run_root, "--json").json["actions"]
    assert actions[0]["not_now"].endswith(", attempt 1, reads step-10 75 %")
    assert "running: verify step-10: reads step-10 75 %" in cli("ls", run_root).out
    catalog.store.write(key, replace(beat, attempt_started_at=-1.0).to_json())
    assert "running" not in cli("ls", run_root).out  # an older attempt's
