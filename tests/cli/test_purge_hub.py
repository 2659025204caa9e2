"""Old copies go from the Hub where a person asks for it, shown first."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.waiting import wait_for

TO = "hf://ray/model"
KEEP = ("--keep-latest", "1", "--squash")


def ray_ckpt(hub: HubDouble, *arguments: str, code: int = 0) -> str:
    """All that it prints; in a process whose Hub is the double."""
    done = run_python("-m", "ray_ckpt", *arguments, environment=hub.environment(), check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def purge(hub: HubDouble, root: str, *options: str) -> Any:
    return json.loads(ray_ckpt(hub, "purge-hub", root, TO, *options, "--json"))


@pytest.fixture
def published(root: str, hub: HubDouble) -> str:
    """Copies of steps 10, 20 and 30 are on the Hub; step 10 is pinned."""
    make_root(root, (10, 20, 30))
    hub.api().create_repo("ray/model")
    for step in ("10", "20", "30"):
        ray_ckpt(hub, "export", root, "--step", step, "--to", TO)
    ray_ckpt(hub, "pin", root, "10", "--reason", "the paper", "--name", "paper")
    return root


def tags(hub: HubDouble) -> set[str]:
    return {tag.name for tag in hub.api().list_repo_refs("ray/model").tags}


def blobs(hub: HubDouble) -> int:
    return len(list((hub.folder / "lfs").iterdir()))


def test_the_plan_is_shown_then_done_and_known_afterwards(published: str, hub: HubDouble) -> None:
    said = ray_ckpt(hub, "purge-hub", published, TO, *KEEP)
    assert "step-20\tpurge\t" in said
    assert "\tpinned: paper" in said
    assert "--squash rewrites history for everybody: branch main, tag step-30 keep" in said
    assert "nobody can undo it" in said
    assert "1 copies, 1 large files" in said
    assert "nothing was changed. Do it: the same with --apply" in said
    assert tags(hub) == {"step-10", "step-20", "step-30"}
    done = purge(hub, published, *KEEP, "--apply")
    assert (done["applied"], done["objects"]) == (True, 1)
    assert done["bytes_freed"] > 10_000
    assert [row["keep"] for row in done["copies"]] == [True, False, True]
    assert tags(hub) == {"step-10", "step-30"}
    assert blobs(hub) == 2
    rows = json.loads(ray_ckpt(hub, "copies", published, "--json"))
    assert [(row["step"], row["state"]) for row in rows] == [(10, "present"), (30, "present")]
    for step in ("10", "30"):
        ray_ckpt(hub, "fetch", f"{TO}@step-{step}", f"{published}-{step}")


def test_a_kill_before_the_content_goes_leaves_nothing_behind(
    published: str, hub: HubDouble
) -> None:
    hub.hang(match="POST .*/lfs-files/batch")
    arguments = ["-m", "ray_ckpt", "purge-hub", published, TO, *KEEP, "--apply"]
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **hub.environment()}
    )
    wait_for(lambda: hub.num_silent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert blobs(hub) == 3
    assert tags(hub) == {"step-10", "step-30"}
    hub.recover()
    assert purge(hub, published, *KEEP, "--apply")["objects"] == 1
    assert blobs(hub) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((TO,), "nothing says what is to stay"),
        (("/copies", "--keep-latest", "1"), "/copies is not on the Hub"),
        (("hf://ray/other", "--keep-latest", "1"), "404"),
    ],
)
def test_what_cannot_be_is_refused(
    root: str, hub: HubDouble, arguments: tuple[str, ...], said: str
) -> None:
    Path(root).mkdir()
    assert said in ray_ckpt(hub, "purge-hub", root, *arguments, code=2)
