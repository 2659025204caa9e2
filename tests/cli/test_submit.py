"""`ray-ckpt submit`, as a person or a script meets it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core.names import run_name
from tests.cli.conftest import Answer
from tests.roots import make_root

# Ray's own client of its Jobs API asks aiohttp so
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
Cli = Callable[..., Answer]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def config(tmp_path: Path, root: str) -> Path:
    path = tmp_path / "drain.toml"
    path.write_text(f'root = "{root}"\ntimeout_s = 200.0\n')
    return path


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ("--job", "trian"),
            2,
            "use one of: backfill, export, publish, purge, reconcile",
        ),
        (("timeout_s",), 2, "'timeout_s' is no override"),
        (("--address", NOBODY), 3, "no Ray dashboard answers"),
    ],
)
def test_what_cannot_be_submitted_is_told_at_once(
    cli: Cli, config: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    address = () if "--address" in words else ("--address", NOBODY)
    answer = cli("submit", config, "--job", "reconcile", *address, *words)
    assert answer.code == code
    assert says in answer.err
    assert "nothing was submitted" in answer.err or code == 2


def test_a_config_without_a_root_is_told(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("steps = 3\n")
    answer = cli("submit", path, "--address", NOBODY)
    assert answer.code == 2
    assert "'root' is missing" in answer.err


@pytest.mark.ray
def test_a_job_is_submitted_and_followed_to_its_end(
    cli: Cli, config: Path, root: str, ray_cluster: str
) -> None:
    from ray.job_submission import JobSubmissionClient

    make_root(root, (10, 20))
    where = ("--address", ray_cluster)
    answer = cli("submit", config, "--job", "reconcile", *where, "timeout_s=100.0", "--wait")
    assert answer.code == 0, answer.out + answer.err
    (job,) = re.findall(r"submitted  reconcile \S+ as (\S+)\n", answer.out)
    assert f"watch      ray-ckpt watch {root}\n" in answer.out
    assert answer.out.count("nothing is left to do") == 1  # the log, each line once
    info = JobSubmissionClient(ray_cluster).get_job_info(job)
    assert info.metadata == {
        "job_name": f"reconcile {run_name(root)}",
        "run": run_name(root),
        "root": root,
        "newest": "step-20",
    }
    assert re.search(rf"dashboard  http://\S+/#/jobs/{job}\n", answer.out)


@pytest.mark.ray
def test_a_job_that_fails_ends_with_its_own_code(cli: Cli, config: Path, ray_cluster: str) -> None:
    where = ("--address", ray_cluster, "--job", "reconcile", "--wait", "--json")
    answer = cli("submit", config, "timeout=1", *where)
    assert answer.code == 2, answer.err
    assert "did you mean 'timeout_s'?" in answer.err
    assert set(answer.json) == {"job", "name", "root", "dashboard", "watch", "log"}


@pytest.mark.ray
def test_code_of_ones_own_is_sent_along(
    cli: Cli, tmp_path: Path, root: str, ray_cluster: str
) -> None:
    folder = tmp_path / "mine"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "say.py").write_text("import sys; print('I run', sys.argv[1:])")
    (folder / "say.toml").write_text(f'root = "{root}"')
    where = ("--address", ray_cluster, "--working-dir", folder, "--wait")
    answer = cli("submit", folder / "say.toml", "a.b=1", "--job", "mine.say", *where)
    assert answer.code == 0, answer.out + answer.err
    assert "I run ['--config', 'say.toml', 'a.b=1']" in answer.out
    outside = tmp_path / "outside.toml"
    outside.write_text(f'root = "{root}"')
    refused = cli("submit", outside, *where)
    assert refused.code == 2
    assert "so it would not be sent along" in refused.err
