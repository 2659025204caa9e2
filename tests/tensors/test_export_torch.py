"""An export as one torch file: what `torch.load` and `from_pretrained` make of it."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.converters import ExportLayout
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.exporting import begin_export
from ray_ckpt.tensors.output_shards import in_one_torch_file
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import TorchFrame, specs_in_torch_file
from tests.tensors.conftest import SavedRun
from tests.tensors.tiny import files_in

SPEC = ExportSpec(name="torch", format="torch", max_shard_bytes=20_000)
SAME = ExportSpec(name="hf")


@pytest.fixture(scope="module")
def root(saved_run: SavedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, its last step exported in both formats."""
    root = saved_run.copy(tmp_path_factory.mktemp("torch") / "run")
    catalog = open_catalog(str(root))
    for spec in (SPEC, SAME):
        export_step(catalog, catalog.manifest(12), spec)
    return root


@pytest.fixture
def file(root: Path) -> Path:
    return root / "exports/torch/step-12/pytorch_model.bin"


@pytest.mark.parametrize("mmap", [False, True])
def test_it_holds_the_tensors_of_the_safetensors_export_and_no_pickle_but_plain_ones(
    root: Path, file: Path, mmap: bool
) -> None:
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True, mmap=mmap)
    expected = load_file(root / "exports/hf/step-12/model-00001-of-00001.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(loaded[key].dtype == expected[key].dtype for key in expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_transformers_loads_the_folder_which_has_no_other_weights(root: Path, file: Path) -> None:
    assert [path for path in files_in(file.parent) if "model" in path] == ["pytorch_model.bin"]
    model = AutoModelForCausalLM.from_pretrained(file.parent)
    same = AutoModelForCausalLM.from_pretrained(root / "exports/hf/step-12")
    loaded, expected = model.state_dict(), same.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_every_entry_of_the_zip_file_is_whole_by_its_crc(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data/3"))
    damaged = bytearray(file.read_bytes())
    damaged[entry.header_offset + entry.file_size // 2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "damaged") as archive:
        assert archive.testzip() == entry.filename


def test_a_killed_one_goes_on_from_the_file_that_was_finished(saved_root: Path) -> None:
    catalog = open_catalog(str(saved_root))
    export = begin_export(catalog, catalog.manifest(12), SPEC)
    export.make(export.plan.shards[0])
    again = begin_export(catalog, catalog.manifest(12), SPEC)
    assert again.missing() == []
    assert "pytorch_model.bin" in {entry.path for entry in again.finish().files}


def test_scalars_and_empty_tensors_keep_their_places(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.int64),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    }
    specs = {k: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for k, t in tensors.items()}
    frame = TorchFrame(specs, {})
    data = bytearray(frame.front)
    for name, tensor in tensors.items():
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        frame.look(memoryview(values))
        data += values + frame.behind(name)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with path.open("rb") as stream:
        assert specs_in_torch_file(stream) == specs


def test_an_adapter_is_called_as_peft_calls_it(saved_run: SavedRun) -> None:
    plan = plan_export(saved_run.catalog, saved_run.catalog.manifest(12), SAME)
    (whole,) = in_one_torch_file(plan.shards, ExportLayout(weights="adapter_model"))
    assert whole.file == "adapter_model.bin"
    assert whole.size_bytes == plan.total_bytes


def test_tensors_that_a_header_describes_are_refused() -> None:
    with pytest.raises(UsageError, match="stands in the headers of safetensors files"):
        in_one_torch_file((), ExportLayout(metadata={"torchao": "{}"}))


def test_an_export_of_another_format_is_another_export(root: Path) -> None:
    catalog = open_catalog(str(root))
    manifest = catalog.manifest(12)
    here = begin_export(catalog, manifest, SPEC)
    there = begin_export(catalog, manifest, replace(SPEC, format="safetensors"))
    assert here.parts.export_id != there.parts.export_id
    recipe = catalog.export("torch", 12).manifest.lineage.recipe
    assert ExportSpec.of_recipe(recipe) == SPEC
