"""An export is cut into files as the base model is, where that came along with the run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.run import INDEX, HfAssets
from tests.roots import make_root

HF = ExportSpec(name="hf")


def _names(root: str) -> list[str]:
    """Every tensor of an export."""
    make_root(root, (10,))
    catalog = open_catalog(root)
    return list(plan_export(catalog, catalog.manifest(10), HF).recording.outputs)


def _index(weight_map: object) -> dict[str, bytes]:
    return {INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def _cut(root: str) -> dict[str, str]:
    """A base in three files, cut in a way that nobody would guess."""
    names = sorted(_names(f"{root}-names"))
    return {name: f"model-0000{1 + n % 3}-of-00003.safetensors" for n, name in enumerate(names)}


def test_files_hold_what_the_files_of_the_base_hold(root: str) -> None:
    cut = {**_cut(root), "model.layers.99.mtp.weight": "model-00004-of-00004.safetensors"}
    make_root(root, (10,), files=_index(cut))
    catalog = open_catalog(root)
    export_step(catalog, catalog.manifest(10), HF)
    folder = Path(root, "exports/hf/step-10")
    held: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert held == {key: file for key, file in cut.items() if "mtp" not in key}
    assert json.loads((folder / INDEX).read_text())["weight_map"] == held
    assert AutoModelForCausalLM.from_pretrained(folder)


def test_whoever_says_how_large_files_may_be_gets_these(root: str) -> None:
    make_root(root, (10,), files=_index(_cut(root)))
    catalog = open_catalog(root)
    plan = plan_export(catalog, catalog.manifest(10), replace(HF, max_shard_bytes=10**9))
    assert [shard.file for shard in plan.shards] == ["model-00001-of-00001.safetensors"]


def test_an_index_that_names_not_every_tensor_is_another_models(root: str) -> None:
    cut = dict(list(_cut(root).items())[1:])
    make_root(root, (10,), files=_index(cut))
    catalog = open_catalog(root)
    plan = plan_export(catalog, catalog.manifest(10), HF)
    assert [shard.file for shard in plan.shards] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("file", ["../../escape.safetensors", "model.bin", ".x.safetensors", 3])
def test_an_index_that_names_what_is_no_file_of_weights_is_refused(root: str, file: object) -> None:
    make_root(root, (10,), files=_index({"model.norm.weight": file}))
    catalog = open_catalog(root)
    with pytest.raises(IntegrityError, match="is no index of safetensors files") as caught:
        export_step(catalog, catalog.manifest(10), HF)
    assert str(file) in caught.value.what
    assert catalog.observe().exports == ()


def test_the_index_comes_along_with_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("config.json", INDEX, "pytorch_model.bin.index.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    assert set(HfAssets.of_folder("llama", tmp_path).files) == {"config.json", INDEX}
