"""A Hub that fails, is silent or full, or was changed by others: what is said, and what stays."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    ObjectExistsError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.core.failures import BLOCKS, RETRIES, ErrorClass, classify
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.retry_after import retry_after_s
from tests.servers.hub import HubDouble
from tests.storage.copies.test_fetch import fetched
from tests.storage.copies.test_publish import PUBLISH, WEIGHTS, make_export, publish
from tests.waiting import PATIENCE_S, wait_for

TO = "hf://ray/model"
COMMIT = r"POST .*/commit/"
SOON = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
FULL = "Private repository storage limit reached, please upgrade your plan"
FULL_FILE = {"oid": "0", "size": 1, "error": {"code": 507, "message": FULL}}


@pytest.fixture
def hub(hub: HubDouble) -> HubDouble:
    """With a repository."""
    hub.api().create_repo("ray/model")
    return hub


@pytest.fixture
def client(hub: HubDouble) -> HfApi:
    return hub.api()


@pytest.fixture(autouse=True)
def exported(root: str) -> None:
    make_export(open_catalog(root))


def kind_of(said: str) -> str:
    assert said.startswith("failed ")
    return said.split()[1]


def class_of(said: str) -> tuple[ErrorClass, float | None]:
    """And the seconds that the Hub has asked for."""
    name, wait_s = said.splitlines()[-1].removeprefix("class ").split()
    return ErrorClass(name), None if wait_s == "None" else float(wait_s)


@pytest.mark.parametrize(
    "match",
    ["GET .*/auth-check", "GET .*/revision/", "GET .*/refs", COMMIT, "POST .*/tag/"],
)
def test_a_hub_that_never_answers_is_worth_another_try(
    root: str, hub: HubDouble, match: str
) -> None:
    hub.hang(match=match)
    said = publish(root, hub, TO, settings=SOON)
    assert kind_of(said) == "TransientError"
    hub.recover()
    assert publish(root, hub, TO).startswith("done")


@pytest.mark.parametrize("match", ["GET .*/commits/", "GET .*/tree/", "PUT ", "POST .*/batch"])
def test_a_hub_that_does_not_answer_once_is_asked_again(
    root: str, hub: HubDouble, match: str
) -> None:
    hub.hang(match=match, times=1)
    assert publish(root, hub, TO, settings=SOON).startswith("done")


def test_an_answer_that_breaks_off_is_worth_another_try(root: str, hub: HubDouble) -> None:
    hub.drop(match="GET .*/revision/", after_bytes=10)
    assert kind_of(publish(root, hub, TO)) == "TransientError"
    hub.drop(match="GET .*/tree/", after_bytes=10)
    assert publish(root, hub, TO).startswith("done")


OWN_CLIENT = """
from huggingface_hub import get_session, set_client_factory
from ray_ckpt.storage.hub.client import hub_api, limit_request
kind = type(get_session())
set_client_factory(lambda: kind(timeout=5))
mine = get_session()
hub_api(); hub_api()
assert get_session() is mine
assert mine.event_hooks["request"] == [limit_request]
for asked, read_s in ((mine.build_request("GET", "http://hub"), 5),
                      (mine.build_request("GET", "http://hub", timeout=None), 60)):
    limit_request(asked)
    assert asked.extensions["timeout"]["read"] == read_s
"""


def test_a_client_that_somebody_has_made_stays_and_its_limits_count() -> None:
    subprocess.run([sys.executable, "-c", OWN_CLIENT], check=True, timeout=PATIENCE_S)


ANSWERS: tuple[tuple[str, int, str, dict[str, str], type[RayCkptError]], ...] = (
    (COMMIT, 429, "", {"Retry-After": "33"}, ThrottledError),
    (COMMIT, 429, "", {"ratelimit": '"api";r=0;t=33'}, ThrottledError),
    (COMMIT, 503, "", {"Retry-After": "33"}, ThrottledError),
    (COMMIT, 429, "", {}, ThrottledError),
    (COMMIT, 503, "", {}, TransientError),
    (COMMIT, 500, "", {}, TransientError),
    (COMMIT, 409, "", {}, ConflictError),
    (COMMIT, 412, "", {}, ConflictError),
    (COMMIT, 401, "Invalid credentials in Authorization header", {}, AuthorizationError),
    (COMMIT, 403, "Forbidden", {}, AuthorizationError),
    ("auth-check", 403, "", {"X-Error-Code": "GatedRepo"}, AuthorizationError),
    (COMMIT, 402, "Payment required", {}, StorageFullError),
    (COMMIT, 403, FULL, {}, StorageFullError),
    ("PUT ", 403, FULL, {}, StorageFullError),
    (COMMIT, 413, "", {}, StorageFullError),
    ("PUT ", 507, "", {}, StorageFullError),
    ("revision", 404, "", {"X-Error-Code": "RevisionNotFound"}, ObjectNotFoundError),
    (COMMIT, 422, "", {}, StorageError),
)


@pytest.mark.parametrize(("match", "status", "text", "headers", "kind"), ANSWERS)
def test_every_answer_has_its_class(
    root: str, hub: HubDouble, match: str, status: int, text: str, headers: dict[str, str], kind
) -> None:
    """Scenario 38: what a person must mend is dead or blocked, with the way out."""
    hub.fail(match=match, status=status, text=text or "no", headers=headers, times=10)
    said = publish(root, hub, TO)
    assert kind_of(said) == kind.__name__
    error_class, wait_s = class_of(said)
    assert error_class is classify(kind("x"))
    assert wait_s == retry_after_s(headers)
    if kind in (AuthorizationError, StorageFullError, ObjectNotFoundError):
        assert "  do:    " in said
        assert error_class in BLOCKS or error_class not in RETRIES


def test_a_file_that_the_hub_has_no_room_for_is_a_full_store(root: str, hub: HubDouble) -> None:
    body = json.dumps({"transfer": "basic", "objects": [FULL_FILE]}).encode()
    hub.fail(match="POST .*/batch", status=200, body=body)
    assert kind_of(publish(root, hub, TO)) == "StorageFullError"


def test_offline_mode_is_told_with_the_way_out(root: str, hub: HubDouble) -> None:
    said = publish(root, hub, TO, settings={"HF_HUB_OFFLINE": "1"})
    assert kind_of(said) == "StorageError"
    assert "unset HF_HUB_OFFLINE" in said


def test_a_date_says_when_to_come_back() -> None:
    assert retry_after_s({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert (retry_after_s({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e9
    assert retry_after_s({"Retry-After": "soon"}) is None


def test_what_others_commit_meanwhile_stays(root: str, hub: HubDouble, client: HfApi) -> None:
    """Scenario 37: the branch has moved (412); it is looked at again, and nothing is lost."""
    client.upload_file(path_or_fileobj=b"1", path_in_repo="old.json", repo_id="ray/model")

    def somebody_commits() -> None:
        client.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.md", repo_id="ray/model")

    hub.meanwhile(match=COMMIT, do=somebody_commits)
    assert publish(root, hub, TO).startswith("done")
    files = set(client.list_repo_files("ray/model", revision="step-5"))
    assert {"notes.md", "config.json", "ray_ckpt.manifest.json"} <= files
    assert "old.json" not in files


@pytest.mark.parametrize("path", ["config.json", "old.json"])
def test_what_others_have_changed_meanwhile_is_not_written_over(
    root: str, hub: HubDouble, client: HfApi, path: str
) -> None:
    """Scenario 37: a file that this copy would replace, or remove, is somebody else's now."""
    client.upload_file(path_or_fileobj=b"1", path_in_repo="old.json", repo_id="ray/model")

    def somebody_commits() -> None:
        client.upload_file(path_or_fileobj=b"theirs", path_in_repo=path, repo_id="ray/model")

    hub.meanwhile(match=COMMIT, do=somebody_commits)
    said = publish(root, hub, TO)
    assert kind_of(said) == ObjectExistsError.__name__
    assert path in said
    assert class_of(said)[0] not in RETRIES
    newest = client.list_repo_commits("ray/model")[0]
    assert newest.title.startswith("Upload ")
    assert client.list_repo_refs("ray/model").tags == []


def test_a_repository_that_is_gone_is_never_made_again(
    root: str, hub: HubDouble, client: HfApi
) -> None:
    """Scenario 39: somebody has deleted it; a new one would be public where it was not."""
    publish(root, hub, TO)
    client.delete_repo("ray/model")
    said = publish(root, hub, TO)
    assert kind_of(said) == ObjectNotFoundError.__name__
    assert "hf repos create ORG/REPO --private" in said
    assert class_of(said)[0] not in RETRIES
    assert sum(line == "POST /api/repos/create" for line in hub.requests) == 1, "the test's own"


def test_a_kill_in_the_middle_shows_nothing_and_no_file_is_sent_twice(
    root: str, hub: HubDouble, client: HfApi
) -> None:
    """Scenario 40, on the Hub without Xet; `test_hub_xet.py` has it with."""
    files = [os.urandom(17_000_000) for _ in range(3)]
    export = make_export(open_catalog(root), 7, *files)
    hub.meanwhile(match="POST .*/verify", do=lambda: hub.hang(match="PUT "))
    arguments = [sys.executable, "-c", PUBLISH, root, TO, "7"]
    process = subprocess.Popen(arguments, env={**os.environ, **hub.environment()})
    wait_for(lambda: hub.num_silent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = len(list((hub.folder / "lfs").iterdir()))
    assert 1 <= arrived < 3
    assert client.list_repo_files("ray/model") == [".gitattributes"]
    assert client.list_repo_refs("ray/model").tags == []
    hub.recover()
    num_requests = len(hub.requests)
    total_bytes = export.manifest.total_bytes
    assert publish(root, hub, TO, step=7) == f"done hf://ray/model@step-7 {total_bytes}"
    sent = [line for line in hub.requests[num_requests:] if line.startswith("PUT ")]
    assert len(sent) == 3 - arrived


def test_a_tag_that_somebody_has_moved_stays_where_it_is(
    root: str, hub: HubDouble, client: HfApi
) -> None:
    """Scenario 39: step-5 is something else now; nothing is sent, and nobody is told it is ours."""
    publish(root, hub, TO)
    client.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ray/model")
    client.delete_tag("ray/model", tag="step-5")
    client.create_tag("ray/model", tag="step-5", revision="main")
    before = client.list_repo_refs("ray/model").tags
    num_requests = len(hub.requests)
    said = publish(root, hub, TO)
    assert kind_of(said) == ObjectExistsError.__name__
    assert "tag delete ray/model step-5" in said
    assert client.list_repo_refs("ray/model").tags == before
    assert not any(line.startswith("P") for line in hub.requests[num_requests:])


def test_a_branch_that_somebody_has_rewritten_leads_to_a_copy_again(
    root: str, hub: HubDouble, client: HfApi, tmp_path: Path
) -> None:
    """Scenario 39: the branch has lost our commit; the tag has it still, and stays."""
    publish(root, hub, "hf://ray/model@main")
    tags = client.list_repo_refs("ray/model").tags
    client.create_branch("ray/model", branch="best", revision=first_commit(client))
    said = publish(root, hub, "hf://ray/model@best")
    assert said.startswith("done hf://ray/model@step-5")
    assert client.list_repo_refs("ray/model").tags == tags
    folder = client.snapshot_download("ray/model", revision="best", cache_dir=tmp_path / "cache")
    assert (Path(folder) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS


def first_commit(client: HfApi) -> str:
    return client.list_repo_commits("ray/model")[-1].commit_id


def test_a_hub_that_goes_away_in_the_middle_is_worth_another_try(
    root: str, hub: HubDouble, tmp_path: Path
) -> None:
    publish(root, hub, TO)
    hub.fail(match="HEAD .*/resolve/", status=503, times=1000)
    code, said = fetched(hub, TO, tmp_path / "mine")
    assert code == 3
    assert "error: the Hub cannot be reached" in said
    hub.recover()
    code, said = fetched(hub, TO, tmp_path / "mine")
    assert code == 0, said
