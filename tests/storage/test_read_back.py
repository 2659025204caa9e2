"""Where digests are to say that a copy is whole, every file is read back before it is visible."""

from pathlib import Path

import pytest

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_checkpoint, publish_export
from ray_ckpt.storage.progress import Progress
from tests.roots import flip_byte, make_root
from tests.servers.hub import HubDouble
from tests.servers.s3_proxy import S3Proxy
from tests.storage.copies.test_publish import make_export, publish

WEIGHTS = "exports/hf/step-5/model-00001-of-00001.safetensors"


class Meanwhile(Progress):
    """Does something at a destination, once everything has arrived and before it is read back."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def begin(self, doing: str, total_bytes: int | None = None) -> None:
        if doing.startswith("sends"):
            (arrived,) = self._folder.rglob("*.safetensors")
            flip_byte(arrived)
        super().begin(doing, total_bytes)


@pytest.fixture
def catalog(root: str) -> Catalog:
    return open_catalog(root)


@pytest.fixture
def export(catalog: Catalog) -> ExportView:
    return make_export(catalog)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    return str(tmp_path / "copies")


def test_a_whole_copy_is_visible(catalog: Catalog, export: ExportView, destination: str) -> None:
    publish_export(catalog, export, destination, verify="digests")
    assert open_catalog(destination).export("hf", 5).manifest == export.manifest
    assert publish_export(catalog, export, destination, verify="digests").bytes_sent == 0


def test_what_a_disk_has_lost_is_never_visible(
    catalog: Catalog, export: ExportView, tmp_path: Path
) -> None:
    to = tmp_path / "copies"
    with pytest.raises(IntegrityError, match="what was read back is not what was sent") as caught:
        publish_export(catalog, export, str(to), verify="digests", progress=Meanwhile(to))
    assert "model-00001-of-00001.safetensors is sha256" in caught.value.what
    assert "ray-ckpt retry" in caught.value.do
    assert not [path for path in to.rglob("*") if path.is_file()]
    assert catalog.export("hf", 5).manifest == export.manifest
    publish_export(catalog, export, str(to), verify="digests")


@pytest.mark.s3
def test_what_a_store_gives_wrongly_is_never_visible_and_is_sent_anew(
    catalog: Catalog, export: ExportView, s3_root: str, proxy: S3Proxy
) -> None:
    proxy.spoil(match=r"GET .*\.safetensors")
    with pytest.raises(IntegrityError, match="what was read back is not what was sent"):
        publish_export(catalog, export, s3_root, verify="digests")
    assert open_catalog(s3_root).observe().exports == ()
    proxy.recover()
    publish_export(catalog, export, s3_root, verify="digests")
    assert open_catalog(s3_root).export("hf", 5).manifest == export.manifest


@pytest.mark.s3
def test_what_the_store_has_copied_by_itself_is_read_back_as_well(
    root: str, s3_root: str, proxy: S3Proxy
) -> None:
    make_root(root, (10,))
    local = open_catalog(root)
    publish_checkpoint(local, local.manifest(10), s3_root)
    source = open_catalog(s3_root)
    place = f"{s3_root}-2"
    proxy.spoil(match=r"GET .*-2/step-10/.*\.distcp")
    with pytest.raises(IntegrityError, match=r"\.distcp is crc64nvme"):
        publish_checkpoint(source, source.manifest(10), place, verify="digests")
    assert open_catalog(place).observe().readable() == []
    proxy.recover()
    done = publish_checkpoint(source, source.manifest(10), place, verify="digests")
    assert done.bytes_sent == 0
    assert open_catalog(place).verify(10) == source.manifest(10)


def test_a_copy_that_was_altered_since_is_found_and_left_alone(
    catalog: Catalog, export: ExportView, destination: str
) -> None:
    publish_export(catalog, export, destination)
    store = open_catalog(destination).store
    altered = bytes(len(store.read(WEIGHTS)))
    store.write(WEIGHTS, altered)
    assert publish_export(catalog, export, destination).bytes_sent == 0, "its sizes are the same"
    with pytest.raises(IntegrityError, match="the copy is not what left") as caught:
        publish_export(catalog, export, destination, verify="digests")
    assert "remove it there, then publish again" in caught.value.do
    assert store.read(WEIGHTS) == altered


def test_what_the_hub_gives_wrongly_gets_no_tag(
    catalog: Catalog, root: str, hub: HubDouble, export: ExportView, tmp_path: Path
) -> None:
    """The Hub has compared what arrived; what it keeps may differ one day all the same."""
    client = hub.api()
    client.create_repo("ray/model")
    digest = next(e.digest for e in export.manifest.files if e.path.endswith(".safetensors"))

    def rot() -> None:
        (kept,) = (tmp_path / "hub").rglob(digest.removeprefix("sha256:"))
        flip_byte(kept)

    hub.meanwhile(match="POST .*/commit/", do=rot)
    said = publish(root, hub, "hf://ray/model", verify="digests")
    assert said.startswith("failed IntegrityError what the Hub gives is not what was sent")
    assert "model-00001-of-00001.safetensors is sha256" in said
    assert "no tag was set on it" in said
    assert client.list_repo_refs("ray/model").tags == []
    rot()
    assert publish(root, hub, "hf://ray/model", verify="digests").endswith(" 0")
    assert [tag.name for tag in client.list_repo_refs("ray/model").tags] == ["step-5"]
