"""Both servers answer the real clients as the services they stand for would."""

import os

# huggingface_hub reads these once, when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

import errno
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.servers.hub import HubDouble
from tests.servers.seaweed import S3Endpoint, make_bucket, seaweedfs

# huggingface_hub 2.4.0 hands httpx2 each LFS file in a way that httpx2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "ray/checkpoint"
WEIGHTS = bytes(range(256)) * 5000
CONFIG = b'{"hidden_size": 8}'


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture
def api(hub: HubDouble) -> HfApi:
    api = hub.api()
    api.create_repo(REPOSITORY)
    return api


def filesystem(endpoint: S3Endpoint) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=endpoint.access_key,
        secret=endpoint.secret_key,
        endpoint_url=endpoint.url,
        client_kwargs={"region_name": endpoint.region},
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def additions() -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd("model.safetensors", WEIGHTS),
        CommitOperationAdd("settings/config.json", CONFIG),
    ]


def commit_once(api: HfApi, *, title: str = "step 1") -> str:
    return api.create_commit(REPOSITORY, additions(), commit_message=title).oid


def status_of(caught: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return caught.value.response.status_code


@pytest.mark.s3
def test_s3_gives_back_what_was_put(endpoint: S3Endpoint) -> None:
    files = filesystem(endpoint)
    files.pipe_file("bucket/step/shard", WEIGHTS)
    assert files.cat_file("bucket/step/shard") == WEIGHTS
    assert files.cat_file("bucket/step/shard", start=10, end=20) == WEIGHTS[10:20]


@pytest.mark.s3
def test_s3_creates_a_key_only_once(endpoint: S3Endpoint) -> None:
    files = filesystem(endpoint)
    files.pipe_file("bucket/claim", b"first", mode="create")
    with pytest.raises(OSError) as caught:
        files.pipe_file("bucket/claim", b"second", mode="create")
    assert caught.value.errno == errno.EINVAL
    assert files.cat_file("bucket/claim") == b"first"


@pytest.mark.s3
def test_s3_lets_the_reader_read_and_nothing_else(endpoint: S3Endpoint) -> None:
    filesystem(endpoint).pipe_file("bucket/read/me", b"here")
    reader = filesystem(endpoint.read_only())
    assert reader.cat_file("bucket/read/me") == b"here"
    with pytest.raises(PermissionError):
        reader.pipe_file("bucket/read/me", b"changed")


@pytest.mark.s3
def test_s3_makes_no_bucket_by_accident(endpoint: S3Endpoint) -> None:
    with pytest.raises(FileNotFoundError):
        filesystem(endpoint).pipe_file("typo/key", b"lost")


@pytest.mark.s3
def test_s3_is_found_through_the_environment(
    endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    assert s3fs.S3FileSystem(skip_instance_cache=True).ls("") == ["bucket"]


def test_a_tagged_commit_comes_back_byte_for_byte(
    hub: HubDouble, api: HfApi, tmp_path: Path
) -> None:
    operations = additions()
    api.preupload_lfs_files(REPOSITORY, operations)
    api.create_commit(REPOSITORY, operations, commit_message="step 1")
    api.create_tag(REPOSITORY, tag="step-1")
    folder = Path(
        api.snapshot_download(REPOSITORY, revision="step-1", cache_dir=tmp_path / "cache")
    )
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "settings/config.json").read_bytes() == CONFIG
    assert sum(line.startswith("PUT /lfs-blobs/") for line in hub.requests) == 1


def test_one_file_is_downloaded_through_a_branch_name_with_a_slash(
    api: HfApi, tmp_path: Path
) -> None:
    commit_once(api)
    api.create_branch(REPOSITORY, branch="run/7")
    path = api.hf_hub_download(
        REPOSITORY, "model.safetensors", revision="run/7", cache_dir=tmp_path / "cache"
    )
    assert Path(path).read_bytes() == WEIGHTS


def test_a_range_of_a_file_is_served(hub: HubDouble, api: HfApi) -> None:
    commit_once(api)
    url = f"{hub.url}/{REPOSITORY}/resolve/main/model.safetensors"
    request = urllib.request.Request(url, headers={"Range": "bytes=100-"})
    with urllib.request.urlopen(request) as response:
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes 100-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
        assert response.read() == WEIGHTS[100:]


def test_listings_tell_what_a_commit_holds(api: HfApi) -> None:
    oid = commit_once(api)
    info = api.model_info(REPOSITORY, files_metadata=True)
    assert info.sha == oid
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    assert sizes["model.safetensors"] == len(WEIGHTS)
    top = {entry.path for entry in api.list_repo_tree(REPOSITORY)}
    assert top == {".gitattributes", "model.safetensors", "settings"}
    below = {entry.path for entry in api.list_repo_tree(REPOSITORY, recursive=True)}
    assert below == top | {"settings/config.json"}
    titles = [commit.title for commit in api.list_repo_commits(REPOSITORY)]
    assert titles == ["step 1", "initial commit"]


def test_branches_and_tags_come_and_go(api: HfApi) -> None:
    oid = commit_once(api)
    api.create_branch(REPOSITORY, branch="trial")
    api.create_tag(REPOSITORY, tag="step-1", revision=oid)
    references = api.list_repo_refs(REPOSITORY)
    assert {branch.name for branch in references.branches} == {"main", "trial"}
    assert [(tag.name, tag.target_commit) for tag in references.tags] == [("step-1", oid)]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_tag(REPOSITORY, tag="step-1")
    assert status_of(caught) == 409
    api.delete_branch(REPOSITORY, branch="trial")
    api.delete_tag(REPOSITORY, tag="step-1")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPOSITORY, revision="step-1")


def test_a_commit_is_all_or_nothing(api: HfApi) -> None:
    oid = commit_once(api)
    operations = [
        CommitOperationAdd("new.json", b"{}"),
        CommitOperationDelete("no-such-file"),
    ]
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPOSITORY, operations, commit_message="half")
    assert api.repo_info(REPOSITORY).sha == oid
    assert not api.file_exists(REPOSITORY, "new.json")


def test_a_stale_parent_is_refused(api: HfApi) -> None:
    born = api.repo_info(REPOSITORY).sha
    commit_once(api)
    late = [CommitOperationAdd("late.json", b"{}")]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(REPOSITORY, late, commit_message="late", parent_commit=born)
    assert status_of(caught) == 412


def test_an_equal_commit_is_dropped_by_the_client(hub: HubDouble, api: HfApi) -> None:
    first = commit_once(api)
    seen = len(hub.requests)
    assert commit_once(api, title="again") == first
    assert not any("/commit/" in line for line in hub.requests[seen:])


def test_the_reader_may_look_and_not_touch(hub: HubDouble, api: HfApi) -> None:
    commit_once(api)
    reader = HfApi(endpoint=hub.url, token=hub.read_only_token)
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert reader.file_exists(REPOSITORY, "model.safetensors")
    for refused in (
        lambda: reader.auth_check(REPOSITORY, write=True),
        lambda: reader.create_repo("ray/other"),
        lambda: reader.create_tag(REPOSITORY, tag="mine"),
        lambda: commit_once(reader),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            refused()
        assert status_of(caught) == 403


def test_strangers_see_public_repositories_only(hub: HubDouble, api: HfApi) -> None:
    api.create_repo("ray/secret", private=True)
    stranger = HfApi(endpoint=hub.url, token=False)
    assert stranger.repo_info(REPOSITORY).private is False
    with pytest.raises(RepositoryNotFoundError):
        stranger.repo_info("ray/secret")
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.url, token="hf_nobody").whoami()
    assert status_of(caught) == 401


def test_a_repository_is_created_once(hub: HubDouble, api: HfApi) -> None:
    assert api.create_repo(REPOSITORY, exist_ok=True).repo_id == REPOSITORY
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPOSITORY)
    assert status_of(caught) == 409
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("ray/missing")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("somebody/else")
    assert status_of(caught) == 403


def test_a_commit_of_bytes_that_never_arrived_is_refused(hub: HubDouble, api: HfApi) -> None:
    operations = additions()
    api.preupload_lfs_files(REPOSITORY, operations)
    for blob in (hub.folder / "lfs").iterdir():
        blob.unlink()
    with pytest.raises(BadRequestError):
        api.create_commit(REPOSITORY, operations, commit_message="hollow")


def test_a_fault_before_the_commit_leaves_nothing(hub: HubDouble, api: HfApi) -> None:
    born = api.repo_info(REPOSITORY).sha
    hub.fail(match=r"POST .*/commit/")
    with pytest.raises(HfHubHTTPError) as caught:
        commit_once(api)
    assert status_of(caught) == 500
    assert api.repo_info(REPOSITORY).sha == born
    assert commit_once(api) == api.repo_info(REPOSITORY).sha


def test_a_lost_answer_leaves_the_commit_applied(hub: HubDouble, api: HfApi) -> None:
    hub.fail(match=r"POST .*/commit/", status=503, after=True)
    with pytest.raises(HfHubHTTPError) as caught:
        commit_once(api)
    assert status_of(caught) == 503
    assert commit_once(api) == api.repo_info(REPOSITORY).sha
    assert len(api.list_repo_commits(REPOSITORY)) == 2


def test_a_failed_upload_of_bytes_is_repeated_by_the_client(hub: HubDouble, api: HfApi) -> None:
    hub.fail(match=r"PUT /lfs-blobs/")
    commit_once(api)
    assert sum(line.startswith("PUT ") for line in hub.requests) == 2


def test_a_closed_hub_answers_nobody(tmp_path: Path) -> None:
    with HubDouble(tmp_path) as hub:
        url = f"{hub.url}/api/whoami-v2"
    with pytest.raises(OSError):
        urllib.request.urlopen(url)


def test_a_readme_is_checked_before_it_is_committed(hub: HubDouble, api: HfApi) -> None:
    card = [CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# Checkpoint\n")]
    api.create_commit(REPOSITORY, card, commit_message="card")
    assert "POST /api/validate-yaml" in hub.requests
