"""A repository on the Hub comes into being only where a person asks for it, and a private one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.waiting import PATIENCE_S


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    with HubDouble(tmp_path / "hub") as hub:
        yield hub


def ray_ckpt(hub: HubDouble, *arguments: str) -> tuple[int, str]:
    """Exit code and all that is said."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "ray_ckpt", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_create_nothing_is_made_and_the_way_is_told(root: str, hub: HubDouble) -> None:
    make_root(root, (10,))
    code, said = ray_ckpt(hub, "export", root, "--step", "10", "--to", "hf://ray/model")
    assert code == 2
    assert "add --create" in said
    assert not any("repos/create" in line for line in hub.requests)


def test_with_create_the_repository_and_branch_are_made_private(root: str, hub: HubDouble) -> None:
    make_root(root, (10,))
    export = ("export", root, "--step", "10", "--to", "hf://ray/model@best", "--create")
    code, said = ray_ckpt(hub, *export)
    assert code == 0, said
    assert "hf://ray/model@step-10" in said
    api = HfApi(endpoint=hub.url, token=hub.token)
    assert api.repo_info("ray/model").private
    assert {branch.name for branch in api.list_repo_refs("ray/model").branches} == {"main", "best"}
    assert "config.json" in api.list_repo_files("ray/model", revision="best")
    assert "config.json" not in api.list_repo_files("ray/model", revision="main")
    code, said = ray_ckpt(hub, *export)
    assert code == 0, said


def test_create_without_the_hub_is_refused(root: str, hub: HubDouble, tmp_path: Path) -> None:
    make_root(root, (10,))
    code, said = ray_ckpt(
        hub, "export", root, "--step", "10", "--to", str(tmp_path / "copies"), "--create"
    )
    assert code == 2
    assert "only repositories on the Hub are made beforehand" in said
    code, said = ray_ckpt(hub, "export", root, "--step", "10", "--create")
    assert code == 2
    assert "--create says nothing without --to" in said
    assert hub.requests == []
