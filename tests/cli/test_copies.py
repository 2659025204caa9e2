"""Scenario 42: what became of a copy since it was made is found by looking again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.copies.publish import publish_export
from tests.processes import run_python
from tests.servers.hub import HubDouble
from tests.storage.copies.test_publish import make_export, publish
from tests.storage.copies.test_retire import publish_of

Cli = Callable[..., Any]
FOLDER = "exports/hf/step-5"


@pytest.fixture
def export(root: str) -> ExportView:
    return make_export(open_catalog(root))


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def copy(request: pytest.FixtureRequest, root: str, export: ExportView, tmp_path: Path) -> Store:
    """The place where a copy lies that is recorded."""
    is_s3 = request.param == "s3"
    place = request.getfixturevalue("s3_root") if is_s3 else str(tmp_path / "copies")
    publish_export(open_catalog(root), export, place)
    record(root, export, place)
    return open_catalog(place).store


def record(root: str, export: ExportView, place: str) -> None:
    """As the manager records a copy that was made."""
    made = ActionRecord(action=publish_of(export, place)).started(1.0)
    result = {"content_id": export.manifest.content_id}
    open_catalog(root).records.write_action(made.succeeded(result, 2.0))


def only_row(cli: Cli, root: str, *, code: int) -> dict[str, str]:
    answer = cli("copies", root, "--json")
    assert answer.code == code
    (row,) = answer.json
    return row


def test_a_copy_that_is_as_it_was_made_is_present(cli: Cli, root: str, copy: Store) -> None:
    assert only_row(cli, root, code=0)["state"] == "present"
    assert cli("copies", root, "--step", 6).out == ""
    assert f"publish step-5 hf to {copy.uri}\tpresent\t" in cli("copies", root).out


def test_a_copy_of_which_one_byte_is_another_is_stale(cli: Cli, root: str, copy: Store) -> None:
    """Scenario 42: its size is the same."""
    data = bytearray(copy.read(f"{FOLDER}/config.json"))
    data[0] ^= 1
    copy.write(f"{FOLDER}/config.json", bytes(data))
    row = only_row(cli, root, code=1)
    assert row["state"] == "stale"
    assert row["why"].startswith("config.json is sha256:")
    assert "remove it there; then ray-ckpt publish" in row["do"]
    assert copy.read(f"{FOLDER}/config.json") == data, "nothing was changed"


def test_a_copy_that_lacks_a_file_is_stale(cli: Cli, root: str, copy: Store) -> None:
    copy.delete([f"{FOLDER}/config.json"])
    assert only_row(cli, root, code=1)["why"] == "config.json is missing"


def test_a_copy_that_somebody_has_replaced_is_stale(
    cli: Cli, root: str, copy: Store, tmp_path: Path
) -> None:
    other = open_catalog(str(tmp_path / "other"))
    theirs = make_export(other, weights=b"else")
    copy.delete([info.key for info in copy.list_objects(FOLDER)])
    publish_export(other, theirs, copy.uri)
    assert only_row(cli, root, code=1)["why"] == "something else is there"


def test_a_copy_that_was_removed_is_gone_and_can_be_made_again(
    cli: Cli, root: str, copy: Store
) -> None:
    copy.delete([info.key for info in copy.list_objects(FOLDER)])
    row = only_row(cli, root, code=1)
    assert row["state"] == "gone"
    assert row["do"] == f"ray-ckpt publish {root} --step 5 --name hf --to {copy.uri}"


def test_a_place_that_cannot_be_looked_at_is_not_called_gone(
    cli: Cli, root: str, export: ExportView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    record(root, export, "s3://bucket/run")
    assert only_row(cli, root, code=1)["state"] == "unknown"


# ---- the Hub ----


def on_hub(root: str, hub: HubDouble) -> dict[str, str]:
    """The one row, by a process of its own, whose Hub is the double."""
    arguments = ("-m", "ray_ckpt", "copies", root, "--json")
    done = run_python(*arguments, environment=hub.environment(), check=False)
    (row,) = json.loads(done.stdout)
    assert done.returncode == int(row["state"] != "present")
    return row


def test_a_tag_on_the_hub_that_was_moved_or_removed_is_found(
    root: str, export: ExportView, hub: HubDouble
) -> None:
    """Scenarios 39 and 42: nothing is made again there."""
    client = hub.api()
    client.create_repo("ray/model")
    publish(root, hub, "hf://ray/model")
    record(root, export, "hf://ray/model")
    assert on_hub(root, hub)["state"] == "present"
    client.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ray/model")
    client.delete_tag("ray/model", tag="step-5")
    assert on_hub(root, hub)["why"] == "there is no tag step-5"
    client.create_tag("ray/model", tag="step-5", revision="main")
    assert on_hub(root, hub)["state"] == "stale"
    client.delete_repo("ray/model")
    assert on_hub(root, hub)["state"] == "gone"
    assert hub.requests.count("POST /api/repos/create") == 1, "the test's own"
