"""A whole checkpoint is copied to another place: a root from which runs load and people fetch."""

import os
from pathlib import Path

import pytest
import torch

from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import (
    ForeignFolderError,
    IntegrityError,
    ObjectExistsError,
    PurgeRefusedError,
    UsageError,
)
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.resume import plan_resume
from ray_ckpt.core.wanted import publish_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.fetch import fetch
from ray_ckpt.storage.copies.publish import publish_checkpoint
from ray_ckpt.storage.copies.retire import retire_copy
from ray_ckpt.storage.lease import TRAINER, Lease
from ray_ckpt.storage.readers import reading
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.roots import flip_byte, make_root


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    return str(tmp_path / "copies")


@pytest.fixture
def catalog(root: str) -> Catalog:
    make_root(root, (10, 20))
    return open_catalog(root)


def copy(catalog: Catalog, step: int, destination: str) -> Action:
    """What a record would say of the copy that was made."""
    publish_checkpoint(catalog, catalog.manifest(step), destination)
    return publish_action(catalog.checkpoint(step), None, destination)


def test_a_copy_is_a_root_that_is_listed_verified_and_fetched(
    catalog: Catalog, destination: str, tmp_path: Path
) -> None:
    published = publish_checkpoint(catalog, catalog.manifest(20), destination)
    assert published.location == f"{destination}/step-20"
    there = open_catalog(destination)
    (view,) = there.observe().checkpoints
    assert (view.step, view.state) == (20, CheckpointState.COMMITTED)
    assert there.verify(20) == catalog.manifest(20)
    assert plan_resume(there.observe().checkpoints, run_id=there.observe().run_id).step == 20
    fetch(published.location, tmp_path / "fetched")
    assert (tmp_path / "fetched" / ".metadata").read_bytes() == catalog.store.read(
        "step-20/.metadata"
    )
    again = publish_checkpoint(catalog, catalog.manifest(20), destination)
    assert (again.bytes_sent, again.bytes_copied) == (0, 0)


def test_a_run_loads_from_a_copy(root: str, destination: str) -> None:
    model = make_root(root, (10,))
    publish_checkpoint(open_catalog(root), open_catalog(root).manifest(10), destination)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    manager = CheckpointManager(
        destination, TrainingState(model=ModelWrapper(model), optimizer=optimizer)
    )
    assert manager.load().step == 10
    manager.close()
    assert all(torch.equal(trained[name], t) for name, t in model.state_dict().items())


@pytest.mark.s3
def test_from_s3_to_s3_the_store_copies_it(root: str, s3_root: str) -> None:
    make_root(root, (10,))
    publish_checkpoint(open_catalog(root), open_catalog(root).manifest(10), s3_root)
    source = open_catalog(s3_root)
    published = publish_checkpoint(source, source.manifest(10), f"{s3_root}-2")
    assert (published.bytes_sent, published.bytes_copied) == (0, source.manifest(10).total_bytes)
    assert open_catalog(f"{s3_root}-2").verify(10) == source.manifest(10)


def test_a_damaged_checkpoint_is_not_copied(catalog: Catalog, destination: str, root: str) -> None:
    flip_byte(Path(root) / "step-10" / "__0_0.distcp")
    with pytest.raises(IntegrityError, match=r"__0_0\.distcp is crc64nvme") as caught:
        publish_checkpoint(catalog, catalog.manifest(10), destination)
    assert f"ray-ckpt verify {catalog.uri} --step 10" in caught.value.do
    assert not [v for v in open_catalog(destination).observe().readable()]


def test_another_checkpoint_of_that_step_is_left_alone(
    catalog: Catalog, destination: str, tmp_path: Path
) -> None:
    copy(catalog, 10, destination)
    other = str(tmp_path / "other")
    make_root(other, (10,), files={"hf_extra.json": os.urandom(8)})
    before = open_catalog(destination).manifest(10)
    with pytest.raises(ObjectExistsError, match="another checkpoint step-10 is there"):
        publish_checkpoint(open_catalog(other), open_catalog(other).manifest(10), destination)
    assert open_catalog(destination).verify(10) == before


def test_somebody_elses_folder_is_left_alone(catalog: Catalog, destination: str) -> None:
    there = open_catalog(destination)
    there.store.write("step-10/.metadata", b"theirs")
    with pytest.raises(ForeignFolderError, match="step-10"):
        publish_checkpoint(catalog, catalog.manifest(10), destination)
    assert there.store.read("step-10/.metadata") == b"theirs"


def test_nothing_is_copied_to_where_a_run_saves(catalog: Catalog, destination: str) -> None:
    lease = Lease(open_catalog(destination).store, TRAINER, owner="another run")
    lease.acquire()
    with pytest.raises(UsageError, match="saves checkpoints of its own there"):
        publish_checkpoint(catalog, catalog.manifest(10), destination)
    lease.release()


def test_a_root_is_no_place_for_copies_of_itself(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match="checkpoint step-10 would be its own copy"):
        publish_checkpoint(catalog, catalog.manifest(10), f"{catalog.uri}/")


def test_the_hub_takes_no_checkpoint(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match="no repository on the Hub") as caught:
        publish_checkpoint(catalog, catalog.manifest(10), "hf://org/repo")
    assert "s3://bucket/prefix" in caught.value.do


def test_an_older_copy_goes_whole_and_a_newer_one_stays(catalog: Catalog, destination: str) -> None:
    old, new = copy(catalog, 10, destination), copy(catalog, 20, destination)
    content_id = catalog.manifest(10).content_id
    retired = retire_copy(catalog.uri, old, content_id=content_id)
    assert retired.bytes_freed == catalog.manifest(10).total_bytes
    there = open_catalog(destination)
    assert [view.step for view in there.observe().checkpoints] == [20]
    assert list(there.store.list_objects("step-10")) == []
    assert retire_copy(catalog.uri, old, content_id=content_id).bytes_freed == 0
    with pytest.raises(UsageError, match="no newer copy"):
        retire_copy(catalog.uri, new, content_id=None)
    assert there.verify(20) == catalog.manifest(20)


def test_a_copy_that_somebody_needs_there_is_not_removed(
    catalog: Catalog, destination: str
) -> None:
    old, _ = copy(catalog, 10, destination), copy(catalog, 20, destination)
    there = open_catalog(destination)
    there.pin(10, name="paper", reason="Table 2")
    with pytest.raises(PurgeRefusedError, match="it is pinned there: paper"):
        retire_copy(catalog.uri, old, content_id=None)
    there.unpin(10)
    with (
        reading(there.store, 10, who="load"),
        pytest.raises(PurgeRefusedError, match="it is read there: load, process"),
    ):
        retire_copy(catalog.uri, old, content_id=None)
    assert there.verify(10) == catalog.manifest(10)
