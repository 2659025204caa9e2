"""What a step holds, in columns: the same from a save, from its file, and from DCP's own index."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.reader import DcpReader, step_reader
from ray_ckpt.tensors.step_index import StepIndex
from tests.roots import flip_byte, make_root


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index") / "run"
    make_root(str(root), (10,))
    return root / "step-10"


def by_name(index: StepIndex) -> dict[str, Any]:
    """All that it says, whatever the order."""
    return {
        name: (
            index.shapes[number],
            index.dtypes[number],
            sorted(
                (index.offsets_in(number, p), index.sizes_in(number, p), index.place(p))
                for p in index.pieces(number)
            ),
        )
        for name, number in index.numbers.items()
    }


def test_a_step_has_an_index_that_says_what_dcps_own_says(step: Path) -> None:
    catalog = open_catalog(str(step.parent))
    own = step_reader(catalog, catalog.manifest(10))
    dcps = DcpReader(catalog.store, step.name, digests=None)
    assert by_name(own.index) == by_name(dcps.index)
    assert own.index.specs() == dcps.index.specs()
    assert own.index.ends() == dcps.index.ends()
    assert len(own.index.values()) > 0


@pytest.mark.s3
def test_a_second_save_says_the_same_of_files_of_its_own(s3_root: str) -> None:
    """Shards on a store have the name of their save; `.metadata` is made of that before."""
    make_root(s3_root, (10, 20))
    catalog = open_catalog(s3_root)
    files: list[set[str]] = []
    for step in (10, 20):
        own = step_reader(catalog, catalog.manifest(step))
        dcps = DcpReader(catalog.store, names.step_dir(step), digests=None)
        assert by_name(own.index) == by_name(dcps.index)
        assert dcps.read_metadata().storage_meta.checkpoint_id == names.step_dir(step)
        files.append(set(own.index.files))
    assert not files[0] & files[1]


def test_a_load_of_a_step_of_ours_needs_no_pickle_of_objects(
    step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(str(step.parent))

    def refuse(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(DcpReader, "read_metadata", refuse)
    assert step_reader(catalog, catalog.manifest(10)).index.names


def test_an_index_that_was_altered_is_refused(tmp_path: Path) -> None:
    make_root(str(tmp_path), (10,))
    flip_byte(tmp_path / "step-10" / names.INDEX)
    catalog = open_catalog(str(tmp_path))
    with pytest.raises(IntegrityError, match=f"{names.INDEX} is sha256"):
        _ = step_reader(catalog, catalog.manifest(10)).index


@pytest.mark.parametrize("largest", [0, 255, 256, 2**31, 2**40])
def test_numbers_of_any_size_come_back(largest: int) -> None:
    rows = np.array([[0, largest], [largest, 1]], np.int64)
    index = StepIndex(
        names=["a", "läßt", "v"],
        shapes=[(largest, 2), (), ()],
        dtypes=[torch.bfloat16, torch.float8_e4m3fn, None],
        starts=np.array([0, 1, 2, 2]),
        offsets=rows,
        sizes=rows + 1,
        files=["__0_0.distcp"],
        file_numbers=np.zeros(2, np.int32),
        begins=rows[:, 1],
        lengths=rows[:, 0],
    )
    again = StepIndex.from_bytes(index.to_bytes())
    assert (again.names, again.shapes, again.dtypes) == (index.names, index.shapes, index.dtypes)
    for name in ("starts", "offsets", "sizes", "begins", "lengths", "file_numbers"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
        assert getattr(again, name).dtype == getattr(index, name).dtype


def test_an_index_of_nothing_comes_back() -> None:
    again = StepIndex.from_bytes(StepIndex.of_specs({}).to_bytes())
    assert (again.names, again.files) == ([], [""])
    assert again.offsets.shape == (0, 0)


def test_an_index_of_files_that_the_manifest_does_not_list_is_refused(step: Path) -> None:
    """Readers open a file by its name."""
    catalog = open_catalog(str(step.parent))
    digests = {entry.path: entry.digest for entry in catalog.manifest(10).files}
    shard = next(path for path in digests if path.endswith(".distcp"))
    without = {path: digest for path, digest in digests.items() if path != shard}
    for digests in (without, {p: d for p, d in without.items() if p != names.INDEX}):
        with pytest.raises(IntegrityError, match=f"lie in {shard}, of which the manifest says no"):
            _ = DcpReader(catalog.store, step.name, digests=digests).index


def test_the_manifest_says_how_much_of_each_file_is_the_models(step: Path) -> None:
    """Frames included, which are some hundred bytes each."""
    catalog = open_catalog(str(step.parent))
    manifest = catalog.manifest(10)
    assert manifest.model is not None
    held = {"model": 0, "optimizer": 0}
    frames = dict(held)
    for entry in manifest.tensors:
        is_models = entry.name in manifest.model.keys
        whose = "model" if is_models else "optimizer" * entry.name.startswith("optimizer.")
        if whose:
            held[whose] += math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
            frames[whose] += 1
    shards = {entry.path: entry.size_bytes for entry in manifest.files}
    assert manifest.tensor_bytes.keys() == {path for path in shards if path.endswith(".distcp")}
    for whose in held:
        found = sum(getattr(b, whose) for b in manifest.tensor_bytes.values())
        assert held[whose] < found < held[whose] + 2000 * frames[whose]
    for path, found in manifest.tensor_bytes.items():
        assert found.model + found.optimizer < shards[path]
