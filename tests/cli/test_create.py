"""A repository on the Hub comes into being only where a person asks for it, and a private one."""

from pathlib import Path

from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble


def ray_ckpt(hub: HubDouble, *arguments: str) -> tuple[int, str]:
    """Exit code and all that is said."""
    done = run_python("-m", "ray_ckpt", *arguments, environment=hub.environment(), check=False)
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
    api = hub.api()
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
    assert "only repositories and buckets on the Hub are made beforehand" in said
    code, said = ray_ckpt(hub, "export", root, "--step", "10", "--create")
    assert code == 2
    assert "--create says nothing without --to" in said
    assert hub.requests == []
