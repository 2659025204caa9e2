import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ray_ckpt.core.errors import (
    AuthorizationError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    UsageError,
)
from ray_ckpt.core.manifest import Lineage, Manifest
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.digests import describe_file
from ray_ckpt.storage.hub.client import parse_hub
from tests.processes import run_python
from tests.servers.hub import HubDouble, Way

WEIGHTS = os.urandom(200_000)


def make_export(
    catalog: Catalog, step: int = 5, weights: bytes = WEIGHTS, *more: bytes
) -> ExportView:
    """A small export, committed as the export engine commits one; `more` weights, more files."""
    staging = catalog.commit.staging("export-test")
    (staging / "config.json").write_text('{"model_type": "llama"}')
    contents = (weights, *more)
    for number, content in enumerate(contents, start=1):
        name = f"model-{number:05}-of-{len(contents):05}.safetensors"
        (staging / name).write_bytes(content)
    files = sorted(path for path in staging.iterdir())
    manifest = Manifest(
        step=step,
        save_id=f"e{step}",
        created_at="2026-01-01T00:00:00+00:00",
        lineage=Lineage(run_id="run", source_id="s", recipe={"name": "hf", "dtype": "bfloat16"}),
        files=tuple(describe_file(path, path.name, "sha256") for path in files),
    )
    catalog.commit_export(staging, "hf", manifest)
    return catalog.export("hf", step)


@pytest.fixture
def catalog(root: str) -> Catalog:
    return open_catalog(root)


@pytest.fixture(params=["folder", "fsspec", pytest.param("s3", marks=pytest.mark.s3), "bucket"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "bucket"):
        return str(request.getfixturevalue(f"{request.param}_root"))
    if request.param == "fsspec":
        return f"local://{tmp_path}/copies"
    return str(tmp_path / "copies")


def test_a_copy_is_equal_and_its_manifest_comes_along(catalog: Catalog, destination: str) -> None:
    export = make_export(catalog)
    published = publish_export(catalog, export, destination)
    assert published.location == f"{destination}/exports/hf/step-5"
    assert published.bytes_sent == export.manifest.total_bytes
    copy = open_catalog(destination)
    assert copy.export("hf", 5).manifest == export.manifest
    assert copy.store.read("exports/hf/step-5/model-00001-of-00001.safetensors") == WEIGHTS


def test_a_second_publish_sends_nothing(catalog: Catalog, destination: str) -> None:
    export = make_export(catalog)
    publish_export(catalog, export, destination)
    assert publish_export(catalog, export, destination).bytes_sent == 0


def test_another_export_of_that_name_is_not_overwritten(
    catalog: Catalog, destination: str, tmp_path: Path
) -> None:
    publish_export(catalog, make_export(catalog), destination)
    other = open_catalog(str(tmp_path / "other"))
    with pytest.raises(ObjectExistsError, match="another export hf of step-5"):
        publish_export(other, make_export(other, weights=b"else"), destination)
    copy = open_catalog(destination).store
    assert copy.read("exports/hf/step-5/model-00001-of-00001.safetensors") == WEIGHTS


def test_a_damaged_export_is_not_published(catalog: Catalog, destination: str, root: str) -> None:
    export = make_export(catalog)
    (Path(root) / "exports/hf/step-5/config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        publish_export(catalog, export, destination)
    assert list(open_catalog(destination).observe().exports) == []


def test_a_copy_that_was_altered_since_is_not_said_to_be_there(
    catalog: Catalog, destination: str
) -> None:
    export = make_export(catalog)
    publish_export(catalog, export, destination)
    store = open_catalog(destination).store
    store.write("exports/hf/step-5/config.json", b"{}")
    with pytest.raises(IntegrityError, match=r"config\.json has 2 bytes"):
        publish_export(catalog, export, destination)
    assert store.read("exports/hf/step-5/config.json") == b"{}"


@pytest.mark.s3
def test_a_root_on_s3_publishes_to_a_folder(s3_root: str, tmp_path: Path) -> None:
    catalog = open_catalog(s3_root)
    export = make_export(catalog)
    publish_export(catalog, export, str(tmp_path / "copies"))
    assert open_catalog(str(tmp_path / "copies")).export("hf", 5).manifest == export.manifest


# ---- the Hub ----


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


PUBLISH = """
import sys; from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.failures import classify
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.publish import publish_export
catalog = open_catalog(sys.argv[1])
try:
    root, to, step, *verify = sys.argv[1:]
    export = catalog.export("hf", int(step))
    done = publish_export(catalog, export, to, verify=verify[0] if verify else "sizes")
    print("done", done.location, done.bytes_sent)
except RayCkptError as error:
    print("failed", type(error).__name__, error)
    print("class", classify(error), getattr(error, "retry_after_s", None))
"""


def publish(
    root: str,
    hub: HubDouble,
    to: str,
    *,
    step: int = 5,
    token: str | None = None,
    settings: Mapping[str, str] = {},
    verify: str = "sizes",
) -> str:
    """Publishes a step in a process of its own, whose Hub is the double; its output or error."""
    environment = {**hub.environment(), "HF_TOKEN": token or hub.token, **settings}
    done = run_python("-c", PUBLISH, root, to, str(step), verify, environment=environment)
    return done.stdout.strip()


def test_an_export_becomes_one_commit_and_a_tag(
    catalog: Catalog, root: str, hub: HubDouble, tmp_path: Path
) -> None:
    export = make_export(catalog)
    client = hub.api()
    client.create_repo("ray/model")
    before = len(client.list_repo_commits("ray/model"))
    said = publish(root, hub, "hf://ray/model")
    assert said == f"done hf://ray/model@step-5 {export.manifest.total_bytes}"
    assert len(client.list_repo_commits("ray/model")) == before + 1
    folder = client.snapshot_download("ray/model", revision="step-5", cache_dir=tmp_path / "cache")
    assert (Path(folder) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert (Path(folder) / "ray_ckpt.manifest.json").read_bytes() == export.manifest.to_json()


def test_publishing_to_the_hub_twice_makes_one_commit(
    catalog: Catalog, root: str, hub: HubDouble
) -> None:
    make_export(catalog)
    client = hub.api()
    client.create_repo("ray/model")
    publish(root, hub, "hf://ray/model")
    commits = client.list_repo_commits("ray/model")
    assert publish(root, hub, "hf://ray/model").endswith(" 0")
    assert client.list_repo_commits("ray/model") == commits


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(
    catalog: Catalog, root: str, hub: HubDouble
) -> None:
    """Scenario 36: the Hub says 500, and has committed."""
    make_export(catalog)
    client = hub.api()
    client.create_repo("ray/model")
    before = len(client.list_repo_commits("ray/model"))
    hub.fail(match=r"POST .*/commit/", times=1, status=500, after=True)
    assert publish(root, hub, "hf://ray/model").startswith("failed TransientError")
    assert publish(root, hub, "hf://ray/model").endswith(" 0")
    assert len(client.list_repo_commits("ray/model")) == before + 1
    assert [tag.name for tag in client.list_repo_refs("ray/model").tags] == ["step-5"]


def test_files_of_the_step_before_do_not_stay(catalog: Catalog, root: str, hub: HubDouble) -> None:
    make_export(catalog)
    client = hub.api()
    client.create_repo("ray/model")
    client.upload_file(
        path_or_fileobj=b"old", path_in_repo="model-00002-of-00002.safetensors", repo_id="ray/model"
    )
    publish(root, hub, "hf://ray/model")
    assert sorted(client.list_repo_files("ray/model")) == [
        ".gitattributes",
        "config.json",
        "model-00001-of-00001.safetensors",
        "ray_ckpt.manifest.json",
    ]


@pytest.mark.parametrize(
    ("to", "token", "kind"),
    [
        ("hf://ray/not-there", None, ObjectNotFoundError),
        ("hf://ray/model", "hf_wrong", AuthorizationError),
        ("hf://ray/model", "hf_readonly", AuthorizationError),
        ("hf://model", None, UsageError),
    ],
)
def test_what_the_hub_refuses_is_told_before_anything_is_sent(
    catalog: Catalog, root: str, hub: HubDouble, to: str, token: str | None, kind: type[Exception]
) -> None:
    make_export(catalog)
    hub.api().create_repo("ray/model")
    said = publish(root, hub, to, token=token)
    assert said.startswith(f"failed {kind.__name__}")
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_a_hub_that_is_down_is_transient(catalog: Catalog, root: str, tmp_path: Path) -> None:
    make_export(catalog)
    with HubDouble(tmp_path / "hub") as hub:
        pass
    assert publish(root, hub, "hf://ray/model").startswith("failed TransientError")


def test_a_branch_may_be_named() -> None:
    assert parse_hub("hf://org/repo@best") == ("org/repo", "best")
