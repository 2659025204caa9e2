"""Files of an export that is still being made are on the Hub already, where nobody sees them."""

import pytest

from ray_ckpt.storage.backends import open_catalog
from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble, Way

PLACE = "hf://ray/model"
EXPORT = """
import logging, sys, threading
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.hand_over import handing_over
from ray_ckpt.tensors.export import export_step
from tests.waiting import wait_for

logging.basicConfig(level=logging.INFO, format="%(message)s")
root, *places = sys.argv[1:]
said = []
listener = logging.Handler()
listener.emit = lambda record: said.append(record.getMessage())
logging.getLogger("ray_ckpt").addHandler(listener)

def is_handed_over(file):
    return any(text.startswith(f"handed over {file} ") for text in said)

def is_at_work():
    return any(thread.name == "ray_ckpt hand over" for thread in threading.enumerate())

catalog = open_catalog(root)

def slowly(export, shards, progress):
    with handing_over(catalog.store, export.parts, places):
        for shard in shards:
            export.make(shard, progress=progress)
            wait_for(lambda: is_handed_over(shard.file) or not is_at_work())

spec = ExportSpec(name="hf", max_shard_bytes=16_000)
export_step(catalog, catalog.manifest(10), spec, crew=slowly)
"""
PUBLISH = """
import sys
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.publish import publish_export
catalog = open_catalog(sys.argv[1])
print(publish_export(catalog, catalog.export("hf", 10), sys.argv[2]).location)
"""


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def hub(hub: HubDouble) -> HubDouble:
    """With a repository."""
    hub.api().create_repo("ray/model")
    return hub


def in_process(code: str, hub: HubDouble, *arguments: str) -> str:
    """What it prints and logs."""
    done = run_python("-c", code, *arguments, environment=hub.environment())
    return done.stdout + done.stderr


def export(root: str, hub: HubDouble, *places: str) -> str:
    """Each shard is made once the one before has been handed over, or nothing is any more."""
    return in_process(EXPORT, hub, root, *places)


def files_sent(hub: HubDouble) -> int:
    return sum(line.startswith(("PUT /lfs-blobs/", "POST /v1/xorbs/")) for line in hub.requests)


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_every_file_is_there_when_the_export_ends_and_the_copy_sends_none(
    request: pytest.FixtureRequest, hub: HubDouble, kind: str
) -> None:
    root = str(request.getfixturevalue("root" if kind == "folder" else "s3_root"))
    make_root(root, (10,))
    api = hub.api()
    before = api.list_repo_files("ray/model")
    said = export(root, hub, PLACE, "/elsewhere")
    made = open_catalog(root).export("hf", 10)
    weights = [e.path for e in made.manifest.files if e.path.endswith(".safetensors")]
    assert len(weights) > 2
    assert files_sent(hub) == len(weights)
    assert all(f"handed over {path} to {PLACE}" in said for path in weights)
    assert api.list_repo_files("ray/model") == before
    assert f"{PLACE}@step-10\n" in in_process(PUBLISH, hub, root, PLACE)
    assert files_sent(hub) == len(weights)
    assert set(weights) < set(api.list_repo_files("ray/model", revision="step-10"))


def test_a_hub_that_refuses_does_not_keep_the_export_from_being_made(
    root: str, hub: HubDouble
) -> None:
    make_root(root, (10,))
    hub.fail(match="POST .*/preupload/", status=403)
    said = export(root, hub, PLACE)
    assert open_catalog(root).export("hf", 10).step == 10
    assert files_sent(hub) == 0
    assert said.count(f"{PLACE} takes no file early, it is sent with the copy") == 1
    hub.recover()
    in_process(PUBLISH, hub, root, PLACE)
    assert "config.json" in hub.api().list_repo_files("ray/model")


def test_places_that_take_nothing_early_get_nothing(root: str, hub: HubDouble) -> None:
    make_root(root, (10,))
    export(root, hub, "/elsewhere", "s3://bucket/prefix")
    assert hub.requests == [line for line in hub.requests if "create" in line or "yaml" in line]
