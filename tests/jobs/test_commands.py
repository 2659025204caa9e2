import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.core.config import load_toml
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import Lease
from tests.processes import run_python
from tests.roots import make_root

JOBS = ("train", "export", "publish", "purge", "reconcile", "verify", "backfill", "sample")


def run(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", f"jobs.{job}", *arguments, environment=os.environ, check=False)


def test_the_demo_config_is_valid_and_says_what_the_demo_says() -> None:
    from jobs.train import TrainConfig

    path = Path("jobs/configs/demo.toml")
    config = load_toml(TrainConfig, path.read_text(), where=str(path))
    assert config.steps == 60
    assert config.save.every_steps == 10
    assert config.lifecycle.keep.latest == 2
    assert [export.name for export in config.lifecycle.export] == ["hf-bf16"]


@pytest.mark.parametrize(
    ("job", "arguments", "says"),
    [
        ("train", ("--config", "missing.toml"), "cannot be read"),
        ("train", ("--config", sys.executable), "is no UTF-8, so it is no TOML"),
        ("train", (), "'root' is missing"),
        ("train", ("root=/x", "save.every_stepz=5"), "did you mean 'every_steps'"),
        ("train", ("root=/x", "steps=many"), "expected int"),
        ("export", ("root=/nowhere", "step=1"), "no such folder"),
        ("export", ("root=tests", "step=1"), "step-1 is not there"),
        ("export", ("root=tests",), "no checkpoint is here yet"),
        ("purge", ("root=/nowhere", "keep.latest=1"), "at least 2"),
        ("publish", ("root=tests", "step=1", "to=/x"), "step-1 is not there"),
        ("publish", ("root=/nowhere", "step=1", "to=/x", "verify=maybe"), "verify"),
        ("reconcile", ("root=/nowhere", "timeout_s=soon"), "expected float"),
        ("reconcile", ("root=/nowhere", "timeout_s=nan"), "expected float, got nan"),
        ("reconcile", ("root=/nowhere", "timeout_s=-1"), "timeout_s must be at least 0"),
        ("verify", ("root=/nowhere", "stpe=1"), "did you mean 'step'"),
        ("verify", ("root=s3://",), "no bucket is named"),
        ("verify", ("root=/nowhere",), "no such folder"),
        ("backfill", ("root=/nowhere",), "no such folder"),
        ("reconcile", ("root=/nowhere",), "no such folder"),
        ("backfill", ("root=/nowhere", "to=/x"), "add dtype=bfloat16"),
        ("backfill", ("root=/nowhere", "hf_assets=/nowhere"), "there is no folder /nowhere"),
        ("sample", (), "is missing"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(
    job: str, arguments: tuple[str, ...], says: str
) -> None:
    done = run(job, *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_an_example_and_every_field(job: str) -> None:
    done = run(job, "--help")
    assert done.returncode == 0
    assert f"python -m jobs.{job}" in done.stdout
    assert re.search(r"fields:\n  \w+: str\n      \S.*\.", done.stdout)


ON_A_CLUSTER = {
    "train": ("num_workers=1",),
    "reconcile": (),
    "verify": (),
    "backfill": (),
    "export": (),
    "publish": ("step=20", "to=/nowhere"),
}


@pytest.mark.parametrize("job", ON_A_CLUSTER)
def test_without_a_cluster_it_says_where_it_looked_and_how_to_start_one(
    job: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_root(root, (10, 20))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = run(job, f"root={root}", *ON_A_CLUSTER[job])
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "no Ray cluster answers" in done.stderr
    assert "where: 127.0.0.1:1\n" in done.stderr
    assert "every committed step is as it was" in done.stderr
    assert "ray status --address 127.0.0.1:1; or ray start --head" in done.stderr


def test_the_address_of_a_dashboard_is_told_from_that_of_a_cluster(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_root(root, (10, 20))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    done = run("verify", f"root={root}")
    assert done.returncode == 2, done.stderr
    assert "RAY_ADDRESS names a dashboard, which takes jobs alone" in done.stderr
    assert "ray-ckpt submit FILE --job NAME" in done.stderr


def test_every_job_is_in_the_readme() -> None:
    readme = Path("README.md").read_text()
    present = {p.stem for p in Path("jobs").glob("*.py") if "run_job(main)" in p.read_text()}
    assert present == set(JOBS)
    assert all(f"jobs/{job}.py" in readme for job in JOBS)


def test_a_trainer_whose_root_is_a_file_hears_that_alone() -> None:
    done = run("train", "root=README.md")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: not usable as a place for checkpoints: Not a directory")


def test_a_second_trainer_on_the_same_root_is_refused_before_anything_starts(root: str) -> None:
    lease = Lease(open_catalog(root).store, "trainer", owner="somebody else")
    lease.acquire()
    try:
        done = run("train", f"root={root}")
    finally:
        lease.release()
    assert done.returncode == 2, done.stderr
    assert f"held by process {os.getpid()}" in done.stderr
    assert "give this run a root of its own" in done.stderr


def test_a_folder_to_start_from_that_is_not_there_is_told_before_anything_starts(root: str) -> None:
    start = ("load.start.kind=weights", "load.start.path=/nowhere/base", "load.start.format=hf")
    done = run("train", f"root={root}", *start)
    assert done.returncode == 2, done.stderr
    assert "/nowhere/base" in done.stderr
    assert "Traceback" not in done.stderr
