import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt.cli.main import VERBS
from ray_ckpt.cli.main import cli as command_group
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.readers import reading
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.cli.conftest import Answer
from tests.roots import flip_byte, make_root, snapshot
from tests.waiting import PATIENCE_S

Cli = Callable[..., Answer]
OF_A_ROOT = (
    ("ls",),
    ("watch", "--once"),
    ("show", 10),
    ("verify",),
    ("resume-plan",),
    ("plan",),
    ("events",),
    ("report",),
    ("adopt",),
    ("backfill",),
    ("export", "--step", 10),
    ("publish", "--step", 10, "--checkpoint", "--to", "/nowhere"),
    ("copies",),
    ("pin", 10, "--reason", "x"),
    ("unpin", 10),
    ("purge",),
    ("purge-hub", "hf://org/repo", "--keep-latest", 3),
    ("undo", 10),
    ("du",),
    ("gc",),
    ("save-now",),
    ("drain",),
    ("retry",),
    ("cancel", "--step", 10),
)


@pytest.fixture
def run_root(root: str) -> str:
    make_root(root, (10, 20, 30, 40))
    return root


@pytest.fixture(scope="module")
def same_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For those who change nothing."""
    root = str(tmp_path_factory.mktemp("same") / "run")
    make_root(root, (10, 20, 30, 40))
    return root


def test_ls_lists_every_step_with_the_promised_keys(cli: Cli, run_root: str) -> None:
    rows = cli("ls", run_root, "--json").json
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    keys = {
        "step",
        "state",
        "bytes",
        "committed_at",
        "pins",
        "exports",
        "copies",
        "lost_copies",
        "note",
    }
    assert set(rows[0]) == keys
    assert {row["note"] for row in rows} == {None}
    assert {row["state"] for row in rows} == {"committed"}
    assert all(row["bytes"] > 10_000 for row in rows)


def test_ls_in_a_pipe_is_plain_lines(cli: Cli, run_root: str) -> None:
    lines = cli("ls", run_root).out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        [str(s), "committed"] for s in (10, 20, 30, 40)
    ]


def test_show_tells_what_a_step_holds(cli: Cli, run_root: str) -> None:
    document = cli("show", run_root, 20, "--json").json
    assert document["state"] == "committed"
    assert document["manifest"]["metrics"] == {"loss": 0.05}
    assert document["manifest"]["model"]["family"] == "llama"
    assert "step-20" not in cli("show", run_root, 10).out


def test_verify_makes_steps_verified(cli: Cli, run_root: str) -> None:
    answer = cli("verify", run_root, "--json")
    assert answer.code == 0
    assert {finding["result"] for finding in answer.json} == {"verified"}
    assert {row["state"] for row in cli("ls", run_root, "--json").json} == {"verified"}


def test_verify_finds_a_flipped_byte_and_changes_nothing(cli: Cli, run_root: str) -> None:
    flip_byte(Path(run_root) / "step-40" / "__0_0.distcp")
    before = snapshot(run_root)
    answer = cli("verify", run_root, "--step", 40)
    assert answer.code == 1
    assert "__0_0.distcp" in answer.out
    assert f"ray-ckpt resume-plan {run_root}" in answer.err
    assert snapshot(run_root) == before


def test_verify_of_nothing_is_no_good_news(cli: Cli, tmp_path: Path) -> None:
    answer = cli("verify", tmp_path)
    assert answer.code == 2
    assert "no checkpoint and no export is here" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_verify_names_a_missing_file(cli: Cli, run_root: str) -> None:
    (Path(run_root) / "step-30" / "__0_0.distcp").unlink()
    answer = cli("verify", run_root)
    assert answer.code == 1
    assert "__0_0.distcp is missing" in answer.out


def test_resume_plan_passes_over_what_cannot_be_used(cli: Cli, run_root: str) -> None:
    (Path(run_root) / "step-40" / "__0_0.distcp").unlink()
    (Path(run_root) / "step-50").mkdir()
    (Path(run_root) / "step-50" / ".metadata").write_bytes(b"torn")
    plan = cli("resume-plan", run_root, "--json").json
    assert plan["step"] == 30
    assert [skipped["step"] for skipped in plan["skipped"]] == [50, 40]
    assert "no manifest" in plan["skipped"][0]["reason"]
    assert "is missing" in plan["skipped"][1]["reason"]


def test_export_writes_a_folder_that_transformers_loads(cli: Cli, root: str) -> None:
    from transformers import AutoModelForCausalLM

    model = make_root(root, (10, 20))
    answer = cli("export", root, "--step", 20, "--name", "hf-fp32", "--dtype", "float32", "--json")
    assert answer.code == 0
    assert answer.json["path"] == f"{root}/exports/hf-fp32/step-20"
    loaded = AutoModelForCausalLM.from_pretrained(answer.json["path"])
    assert torch.equal(loaded.lm_head.weight, model.output.weight)
    assert cli("ls", root, "--json").json[1]["exports"] == ["hf-fp32"]
    before = snapshot(f"{root}/exports")
    assert cli("export", root, "--step", 20, "--name", "hf-fp32", "--dtype", "float32").code == 0
    assert snapshot(f"{root}/exports") == before


def test_export_of_a_corrupt_step_is_refused_and_the_step_set_aside(
    cli: Cli, run_root: str
) -> None:
    flip_byte(Path(run_root) / "step-20" / "__0_0.distcp")
    answer = cli("export", run_root, "--step", 20)
    assert answer.code == 1
    assert "step-20 is corrupt" in answer.err
    assert "do:" in answer.err
    states = {row["step"]: row["state"] for row in cli("ls", run_root, "--json").json}
    assert states == {10: "committed", 20: "quarantined", 30: "committed", 40: "committed"}
    assert open_catalog(run_root).observe().exports == ()


def test_export_to_a_destination_publishes_it(cli: Cli, run_root: str, tmp_path: Path) -> None:
    answer = cli("export", run_root, "--step", 40, "--to", tmp_path / "copies", "--json")
    location = answer.json["published"]["location"]
    assert location == f"{tmp_path}/copies/exports/hf-bf16/step-40"
    made = {k: v for k, v in snapshot(f"{run_root}/exports/hf-bf16/step-40").items()}
    assert snapshot(location) == made
    assert cli("ls", run_root, "--json").json[-1]["copies"] == [location]


def test_publishing_twice_sends_nothing_the_second_time(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("export", run_root, "--step", 40)
    arguments = ("publish", run_root, "--step", 40, "--name", "hf-bf16", "--to", tmp_path / "c")
    assert cli(*arguments, "--json").json["bytes"] > 0
    assert cli(*arguments, "--json").json["bytes"] == 0


def test_publishing_an_export_that_is_not_there_says_how_to_make_it(
    cli: Cli, run_root: str
) -> None:
    answer = cli("publish", run_root, "--step", 40, "--name", "hf-bf16", "--to", "/nowhere")
    assert answer.code == 2
    assert f"ray-ckpt export {run_root} --step 40 --name hf-bf16" in answer.err


def test_purge_without_apply_changes_nothing_and_gives_reasons(cli: Cli, run_root: str) -> None:
    before = snapshot(run_root)
    plan = cli("purge", run_root, "--keep-latest", 2, "--keep-every", 20, "--json").json
    assert [row["step"] for row in plan["purge"]] == [10]
    assert {row["step"]: row["reasons"] for row in plan["keep"]}[20] == ["every 20 steps"]
    assert not plan["applied"]
    assert snapshot(run_root) == before


def test_purge_with_apply_moves_to_the_trash_and_undo_brings_back(cli: Cli, run_root: str) -> None:
    before = snapshot(f"{run_root}/step-10")
    assert cli("purge", run_root, "--keep-latest", 2, "--apply").code == 0
    states = {row["step"]: row["state"] for row in cli("ls", run_root, "--json").json}
    assert states == {10: "trashed", 20: "trashed", 30: "verified", 40: "verified"}
    assert cli("undo", run_root, 10).code == 0
    assert snapshot(f"{run_root}/step-10") == before


def test_purge_without_any_rule_keeps_everything(cli: Cli, run_root: str) -> None:
    assert "nothing to purge" in cli("purge", run_root, "--apply").out


def test_purge_keeps_what_is_pinned(cli: Cli, run_root: str) -> None:
    assert cli("pin", run_root, 10, "--reason", "the paper", "--name", "ada").code == 0
    cli("purge", run_root, "--keep-latest", 2, "--apply")
    rows = {row["step"]: row for row in cli("ls", run_root, "--json").json}
    assert rows[10]["state"] == "verified"
    assert rows[20]["state"] == "trashed"
    assert rows[10]["pins"] == ["ada"]
    assert cli("unpin", run_root, 10, "--json").json == {"step": 10, "removed": ["ada"]}
    cli("purge", run_root, "--keep-latest", 2, "--apply")
    assert cli("ls", run_root, "--json").json[0]["state"] == "trashed"


def test_a_pin_tells_who_why_and_until_when_and_then_holds_nothing(cli: Cli, run_root: str) -> None:
    pinned = ("pin", run_root, 10, "--reason", "the paper", "--name", "ada")
    end = cli(*pinned, "--for", "7d", "--json").json["until"]
    assert cli("ls", run_root, "--json").json[0]["pins"] == [f"ada until {end[:10]}"]
    (shown,) = cli("show", run_root, 10, "--json").json["pins"]
    assert (shown["name"], shown["reason"], shown["until"]) == ("ada", "the paper", end)
    assert (
        f"ada: the paper, since {shown['pinned_at']}, until {end}" in cli("show", run_root, 10).out
    )
    expired = json.dumps({**shown, "until": "2020-01-01T00:00:00+00:00"})
    Path(run_root, "step-10/ray_ckpt.pin.ada.json").write_text(expired)
    assert "expired: it holds nothing" in cli("show", run_root, 10).out
    assert cli("ls", run_root, "--json").json[0]["pins"] == []
    cli("purge", run_root, "--keep-latest", 2, "--apply")
    assert cli("ls", run_root, "--json").json[0]["state"] == "trashed"
    assert cli("pin", run_root, 30, "--reason", "x", "--until", "2020-01-01").code == 2
    assert cli("pin", run_root, 30, "--reason", "x", "--until", "x", "--for", "7d").code == 2


def test_a_step_that_is_being_read_is_kept_and_the_others_go(cli: Cli, run_root: str) -> None:
    store = open_catalog(run_root).store
    with reading(store, 10, who="load"):
        plan = cli("purge", run_root, "--keep-latest", 2, "--json").json
        assert [row["step"] for row in plan["purge"]] == [20]
        assert "it is being read: load, process" in plan["keep"][0]["reasons"][0]
        applied = cli("purge", run_root, "--keep-latest", 2, "--apply", "--json")
        assert applied.code == 0
        assert [row["step"] for row in applied.json["purge"]] == [20]
        assert "step-10 stays: it is being read" in applied.json["keep"][0]["reasons"][0]
    cli("purge", run_root, "--keep-latest", 2, "--apply")
    states = {row["step"]: row["state"] for row in cli("ls", run_root, "--json").json}
    assert states == {10: "trashed", 20: "trashed", 30: "verified", 40: "verified"}


def test_purge_stops_when_a_step_that_should_stay_is_damaged(cli: Cli, run_root: str) -> None:
    flip_byte(Path(run_root) / "step-40" / "__0_0.distcp")
    answer = cli("purge", run_root, "--keep-latest", 2, "--apply")
    assert answer.code == 1
    assert "step-40 is corrupt" in answer.err
    assert "nothing is purged" in answer.err
    states = {row["step"]: row["state"] for row in cli("ls", run_root, "--json").json}
    assert states.pop(40) == "quarantined"
    assert set(states.values()) <= {"committed", "verified"}


def test_no_option_keeps_fewer_than_two(cli: Cli, run_root: str) -> None:
    answer = cli("purge", run_root, "--keep-latest", 1, "--apply")
    assert answer.code == 2
    assert "'--keep-latest': 1 is not in the range x>=2" in answer.err


def test_adopt_takes_over_a_plain_dcp_folder(cli: Cli, root: str) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    with pytest.warns(UserWarning):
        dcp.save({"weight": weight}, checkpoint_id=f"{root}/step-7", no_dist=True)
    assert cli("ls", root, "--json").json[0]["state"] == "foreign"
    before = snapshot(f"{root}/step-7")
    assert cli("adopt", root, "--json").json[0]["step"] == 7
    assert cli("verify", root).code == 0
    after = snapshot(f"{root}/step-7")
    assert set(after) - set(before) == {"ray_ckpt.manifest.json"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("show", "{root}", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("export", "{root}", "--step", 99), 2, "step-99 is not there"),
        (("pin", "{root}", 99, "--reason", "x"), 2, "step-99 is not there"),
        (("undo", "{root}", 10), 2, "the trash holds no step-10"),
        (("unpin", "{root}", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("adopt", "{root}", "--step", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("copies", "{root}", "--step", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("events", "{root}", "--step", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("retry", "{root}", "--step", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("cancel", "{root}", "--step", 99), 2, "committed steps: 10, 20, 30, 40"),
        (("pin", "{root}", 10, "--reason", " "), 2, "say why the step must stay"),
        (("drain", "{root}", "--timeout", "nan"), 2, "'nan' is no number"),
        (("drain", "{root}", "--timeout", -1), 2, "x>=0"),
        (("watch", "{root}", "--every", "inf"), 2, "'inf' is no number"),
        (("copies", "{root}"), 0, "no copy was made"),
        (("events", "{root}", "--since", "0s"), 0, "nothing was told within 0s"),
        (("plan", "{root}", "--policy", sys.executable), 2, "is no UTF-8, so it is no TOML"),
        (("doctor", "{root}", "--policy", sys.executable), 2, "is no UTF-8, so it is no TOML"),
        (("fetch", "{root}/step-10", "/proc/x"), 2, "No such file or directory"),
        (("export", "{root}", "--step", 10, "--to", ""), 2, "no backend for ''"),
        (("export", "{root}", "--step", 10, "--to", "hf://org"), 2, "names no repository"),
        (("export", "{root}", "--step", 10, "--to", sys.executable), 2, "a file is here"),
        (("submit", sys.executable), 2, "is no UTF-8, so it is no TOML"),
        (("ls", "{root}-misspelt"), 2, "no such folder"),
        (("ls", "tape://host/x"), 2, "no backend"),
        (("export", "{root}", "--step", 10, "--name", "step-1"), 2, "cannot be a folder name"),
        (("export", "{root}", "--step", 10, "--dtype", "float8"), 2, "Invalid value"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_bad_input_gets_a_clear_error_and_changes_nothing(
    cli: Cli, same_root: str, arguments: tuple[object, ...], code: int, says: str
) -> None:
    before = snapshot(same_root)
    answer = cli(*(str(a).replace("{root}", same_root) for a in arguments))
    assert answer.code == code
    assert says in answer.err
    assert snapshot(same_root) == before


def test_where_no_store_answers_the_address_is_to_be_checked(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    answer = cli("ls", "s3://bucket/run")
    assert answer.code == 3
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:1/bucket' in answer.err
    assert "check the address: AWS_ENDPOINT_URL" in answer.err


def test_an_age_before_all_time_is_the_whole_story(cli: Cli, same_root: str) -> None:
    assert cli("events", same_root, "--since", f"{10**20}d").out == cli("events", same_root).out


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{root}-misspelt", "no such folder"),
        ("{file}", "a file is here, and no folder"),
        ("hf://org/repo", "a repository on the Hub is no root"),
        ("https://host/x", "no backend"),
        ("s3://", "no bucket is named"),
    ],
)
@pytest.mark.parametrize("verb", OF_A_ROOT, ids=lambda verb: verb[0])
def test_a_place_that_is_no_root_is_told_by_every_verb(
    cli: Cli, tmp_path: Path, verb: tuple[object, ...], place: str, says: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    root = place.format(root=tmp_path / "run", file=tmp_path / "file")
    answer = cli(verb[0], root, *verb[1:])
    assert answer.code == 2
    assert says in answer.err
    assert "  do:    " in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_manifest_is_named_with_the_way_out(cli: Cli, run_root: str) -> None:
    (Path(run_root) / "step-50").mkdir()
    (Path(run_root) / "step-50" / ".metadata").write_bytes(b"torn")
    answer = cli("export", run_root, "--step", 50)
    assert answer.code == 2
    assert f"ray-ckpt adopt {run_root}" in answer.err


def test_every_verb_helps_and_takes_json() -> None:
    for verb in VERBS:
        assert verb.help
        assert "--json" in [flag for param in verb.params for flag in param.opts]
    assert set(command_group.commands) == {
        *("demo", "ls", "show", "verify", "resume-plan", "adopt", "export", "publish", "fetch"),
        *("pin", "unpin", "purge", "undo", "save-now", "plan", "events"),
        *("drain", "retry", "cancel", "gc", "import", "copies", "purge-hub"),
        *("doctor", "submit", "watch", "diff", "du", "report", "backfill"),
    }


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_example_in_each_help_is_a_command_that_parses(
    verb: click.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.toml").touch()
    for folder in ("Llama-3.1-8B", "Qwen3-8B"):
        (tmp_path / folder).mkdir()
    _, _, example = (verb.help or "").partition("Example: ray-ckpt ")
    name, *arguments = shlex.split(example)
    assert name == verb.name
    assert verb.make_context(name, arguments).params


def test_python_dash_m_is_the_same_command(run_root: str) -> None:
    command = [sys.executable, "-m", "ray_ckpt", "ls", run_root, "--json"]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE_S
    ).stdout
    assert [row["step"] for row in json.loads(out)] == [10, 20, 30, 40]


def test_looking_at_a_root_imports_neither_torch_nor_ray(run_root: str) -> None:
    code = (
        "import sys; from ray_ckpt.cli.main import cli;"
        "cli(['ls', sys.argv[1]], standalone_mode=False);"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, run_root], check=True, timeout=PATIENCE_S)


@pytest.mark.s3
def test_the_same_verbs_work_on_s3(cli: Cli, s3_root: str, tmp_path: Path) -> None:
    make_root(s3_root, (10, 20, 30))
    assert cli("verify", s3_root).code == 0
    assert cli("export", s3_root, "--step", 30, "--to", tmp_path / "copies").code == 0
    assert cli("purge", s3_root, "--keep-latest", 2, "--apply").code == 0
    rows = cli("ls", s3_root, "--json").json
    assert {row["step"]: row["state"] for row in rows} == {
        10: "trashed",
        20: "verified",
        30: "verified",
    }
    assert rows[-1]["exports"] == ["hf-bf16"]
    assert cli("undo", s3_root, 10).code == 0
    assert open_catalog(s3_root).damage(10) == []


def test_a_root_of_foreign_folders_is_no_place_to_start_from_scratch(cli: Cli, root: str) -> None:
    (Path(root) / "step-5").mkdir(parents=True)
    (Path(root) / "step-5" / ".metadata").write_bytes(b"torn")
    answer = cli("resume-plan", root)
    assert answer.code == 1
    assert "refuse to start from scratch: steps 5 are here and cannot be used" in answer.out
    before = snapshot(f"{root}/step-5")
    with pytest.raises(IntegrityError, match="training did not start from scratch"):
        load(root)
    assert snapshot(f"{root}/step-5") == before


def load(root: str) -> None:
    """What a trainer does first."""
    model = torch.nn.Linear(2, 2)
    manager = CheckpointManager(root, TrainingState(model=ModelWrapper(model)))
    try:
        manager.load()
    finally:
        manager.close()


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [("AWS_SECRET_ACCESS_KEY", "wrong", 4), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", 3)],
)
def test_scripts_can_tell_a_refusal_from_an_outage(
    s3_root: str, variable: str, value: str, code: int
) -> None:
    command = [sys.executable, "-m", "ray_ckpt", "ls", s3_root]
    done = subprocess.run(
        command,
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == code, done.stderr
    assert "do:" in done.stderr
    assert "Traceback" not in done.stderr
