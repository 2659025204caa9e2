"""`ray-ckpt events` as a person or a script meets it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from ray_ckpt.core.events import Event, event_id, utc
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.history import append_events
from tests.cli.conftest import Answer

Cli = Callable[..., Answer]


def tell(root: str, step: int, *, age_s: float = 0.0) -> Event:
    event = Event(
        id=event_id(step),
        at=utc(time.time() - age_s),
        who="trainer llama",
        what="save.committed",
        step=step,
        text=f"the save of step-{step} is committed: every 5 steps",
        details={"seconds": 0.5},
    )
    append_events(open_catalog(root).store, [event])
    return event


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def told(request: pytest.FixtureRequest) -> str:
    root = request.getfixturevalue(request.param)
    tell(root, 5, age_s=7200)
    tell(root, 10, age_s=60)
    return root


def test_events_are_one_line_each(cli: Cli, told: str) -> None:
    rows = [line.split("\t") for line in cli("events", told).out.splitlines()]
    assert [row[1:4] for row in rows] == [
        ["trainer llama", "save.committed", "5"],
        ["trainer llama", "save.committed", "10"],
    ]
    assert rows[0][4] == "the save of step-5 is committed: every 5 steps"


def test_events_of_one_step_or_of_late(cli: Cli, told: str) -> None:
    for option, value in (("--step", 10), ("--since", "1h")):
        lines = cli("events", told, option, value, "--json").out.splitlines()
        assert [json.loads(line)["step"] for line in lines] == [10]
    [line] = cli("events", told, "--step", 5, "--json").out.splitlines()
    assert json.loads(line)["details"] == {"seconds": 0.5}


def test_a_root_without_events_tells_nothing(cli: Cli, tmp_path) -> None:
    assert cli("events", tmp_path) == Answer(0, "", "nothing was told here yet\n")


def test_an_age_that_is_none_is_refused(cli: Cli, tmp_path) -> None:
    answer = cli("events", tmp_path, "--since", "yesterday")
    assert answer.code == 2
    assert "'yesterday' is no age: write 90s, 30m, 1h or 7d" in answer.err


def test_following_tells_what_happens_next(root: str) -> None:
    tell(root, 5)
    command = [sys.executable, "-m", "ray_ckpt", "events", root, "-f", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["step"] == 5
            tell(root, 10)
            assert json.loads(process.stdout.readline())["step"] == 10
        finally:
            process.terminate()
