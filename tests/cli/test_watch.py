"""`ray-ckpt watch`, in a pipe, on a terminal, and ended by Ctrl-C."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ray_ckpt.cli.watch import Looker, duration, picture
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.beats import beating, first_beat
from tests.cli.conftest import Answer
from tests.roots import make_root
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint, make_bucket
from tests.waiting import PATIENCE_S, wait_for

Cli = Callable[..., Answer]
COMMAND = (sys.executable, "-m", "ray_ckpt", "watch")


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def made(request: pytest.FixtureRequest) -> str:
    root = request.getfixturevalue(request.param)
    make_root(root, (10, 20))
    return root


def test_one_look_tells_what_is_there(cli: Cli, made: str) -> None:
    answer = cli("watch", made, "--once")
    assert answer == Answer(0, "step-10 is committed\nstep-20 is committed\n", "")
    told = cli("watch", made, "--once", "--json").json
    assert told["checkpoints"] == {"10": "committed", "20": "committed"}
    assert [w["title"] for w in told["waiting"]] == ["verify step-10", "verify step-20"]


def test_a_root_that_is_not_there_is_told(cli: Cli, root: str) -> None:
    assert cli("watch", root).code == 2


def test_in_a_pipe_a_line_tells_each_change_until_ctrl_c(made: str) -> None:
    with subprocess.Popen(
        [*COMMAND, made, "--every", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        first = [program.stdout.readline() for _ in range(2)]
        open_catalog(made).trash(10)
        later = program.stdout.readline()
        program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE_S) == 0
        rest, errors = program.stdout.read(), program.stderr.read()
    assert first == ["step-10 is committed\n", "step-20 is committed\n"]
    assert later == "step-10 is trashed\n"
    assert (rest, errors) == ("", "")


def running_verify(root: str, step: int) -> ActionRecord:
    """The record of a verify that somebody has begun."""
    catalog = open_catalog(root)
    record = ActionRecord(action=verify_action(catalog.checkpoint(step))).started(1000.0)
    catalog.records.write_action(record)
    return record


def test_what_runs_is_shown_with_how_far_and_how_fast(root: str) -> None:
    make_root(root, (10, 20))
    record = running_verify(root, 20)
    catalog, key = open_catalog(root), f".ray_ckpt/running/{record.action.key}-a1.json"
    looker = Looker(catalog)
    first = first_beat(attempt_started_at=record.changed_at, node=None)
    with beating(catalog.store, key, first=first, every_s=0.05) as progress:
        progress.begin("reads step-20", 100)
        wait_for(lambda: [g for g in looker.look().going if g.doing == "reads step-20"])
        progress.advance(63)
        seen = wait_for(lambda: s if (s := looker.look()).going[0].bytes_per_s else None)
    assert seen.going[0].percent == 63
    assert seen.going[0].eta_s is not None
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(picture(seen, root, now=2000.0))
    text = console.export_text()
    assert re.search(r"running +verify step-20 +reads step-20 .*63 % .*/s .*left", text)
    assert "nobody saves here now" in text
    assert re.search(r"^20 +committed ", text, flags=re.M)
    assert record.state is ActionState.RUNNING


def test_on_a_terminal_it_draws_and_ctrl_c_ends_it_without_a_word(root: str) -> None:
    make_root(root, (10, 20))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(
        [*COMMAND, root, "--every", "0.1"],
        stdout=theirs, stderr=theirs, stdin=theirs, env=environment, start_new_session=True,
    ) as program:  # fmt: skip
        os.close(theirs)
        text = ""
        while text.count("waiting") < 6:  # three pictures
            text += os.read(ours, 65536).decode()
        program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE_S) == 0
    os.close(ours)
    assert "verify step-20" in text
    assert "Traceback" not in text
    assert "interrupted" not in text


@pytest.mark.s3
def test_a_store_that_is_away_for_a_while_is_told_and_looked_at_again(
    s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Proxy(s3_server) as s3:
        for name, value in s3.endpoint.environment().items():
            monkeypatch.setenv(name, value)
        bucket = f"test-{uuid.uuid4().hex[:12]}"
        make_bucket(s3_server, bucket)
        root = f"s3://{bucket}/run"
        make_root(root, (10, 20))
        with subprocess.Popen(
            [*COMMAND, root, "--every", "0.1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as program:  # fmt: skip
            assert program.stdout is not None and program.stderr is not None
            assert program.stdout.readline() == "step-10 is committed\n"
            s3.fail(match="GET", status=403, code="AccessDenied")
            assert "no look at s3://" in program.stderr.readline()
            s3.recover()
            open_catalog(root).trash(10)
            assert program.stdout.readline() == "step-20 is committed\n"
            assert program.stdout.readline() == "step-10 is trashed\n"
            program.send_signal(signal.SIGINT)
            assert program.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(5, "5 s"), (89.6, "90 s"), (600, "10 min"), (7200, "2.0 h"), (200_000, "2.3 d")],
)
def test_durations_are_short(seconds: float, says: str) -> None:
    assert duration(seconds) == says


def test_json_in_a_pipe_is_one_object_a_look(root: str) -> None:
    make_root(root, (10, 20))
    with subprocess.Popen(
        [*COMMAND, root, "--every", "0.1", "--json"], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        looks = [json.loads(program.stdout.readline()) for _ in range(2)]
        program.send_signal(signal.SIGINT)
    assert [look["checkpoints"] for look in looks] == [{"10": "committed", "20": "committed"}] * 2
    assert Path(root).is_dir()
