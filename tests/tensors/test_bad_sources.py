"""Folders that are not what they should be: refused by name, before a tensor is read."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.assets import make_assets
from ray_ckpt.core.errors import (
    ConfigError,
    IntegrityError,
    StateDictError,
    UsageError,
)
from ray_ckpt.tensors.hf_reader import HfFolder
from ray_ckpt.tensors.run import HfAssets
from tests.tensors.bases import (
    LORA,
    foreign_dcp,
    hf_base,
    open_manager,
    peft_adapter,
    refused,
    weights,
    with_adapter,
)
from tests.tensors.tiny import SIZES, error_of


def test_a_folder_that_is_not_there_is_named(root: str, tmp_path: Path) -> None:
    error = refused(root, weights(tmp_path / "nowhere"))
    assert "it holds no .metadata" in error.what
    error = refused(root, weights(tmp_path / "nowhere", format="hf"))
    assert "holds no safetensors file" in error.what
    assert str(tmp_path / "nowhere") in error.where


def test_a_foreign_folder_with_a_shard_missing_or_cut_short_isrefused(
    root: str, tmp_path: Path
) -> None:
    foreign_dcp(tmp_path / "a")
    shard = tmp_path / "a/__0_0.distcp"
    whole = shard.stat().st_size
    os.truncate(shard, whole - 10_000)
    error = refused(root, weights(tmp_path / "a"))
    assert isinstance(error, IntegrityError)
    assert f"__0_0.distcp has {whole - 10_000} bytes" in error.what
    shard.unlink()
    assert "__0_0.distcp is missing" in refused(root, weights(tmp_path / "a")).what


def test_a_committed_step_elsewhere_is_compared_to_its_last_byte(
    saved_root: Path, root: str
) -> None:
    shard = saved_root / "step-12/__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    manager, _ = open_manager(f"{root} 1")
    error = error_of(lambda: manager.load(config=weights(saved_root / "step-12")))
    manager.close()
    assert isinstance(error, IntegrityError)
    assert "__1_0.distcp is crc64nvme:" in error.what
    assert "do not train on" in error.safe


class _Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch /tmp/ray_ckpt_was_here",)


def test_an_index_that_runs_code_is_not_run(root: str, tmp_path: Path) -> None:
    foreign_dcp(tmp_path / "a")
    (tmp_path / "a/.metadata").write_bytes(pickle.dumps(_Hostile()))
    error = refused(root, weights(tmp_path / "a"))
    assert isinstance(error, IntegrityError)
    assert "posix.system" in error.what
    assert not Path("/tmp/ray_ckpt_was_here").exists()


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face folder of several files, of which headers may be read and no tensor."""

    def refuse(self: HfFolder, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(HfFolder, "read", refuse)
    hf_base(tmp_path / "hf", max_shard_size="10KB")
    return tmp_path / "hf"


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """One file of the folder and its index, changed in the same way."""
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = {k: v for k, v in document["weight_map"].items() if v != file.name}
    document["weight_map"].update(dict.fromkeys(tensors, file.name))
    index.write_text(json.dumps(document))


def test_a_shard_that_the_index_names_is_missing(root: str, hf: Path) -> None:
    missing = sorted(hf.glob("*.safetensors"))[1]
    missing.unlink()
    error = refused(root, weights(hf, format="hf"))
    assert isinstance(error, IntegrityError)
    assert f"1 files that are not there: {missing.name}" in error.what


def test_a_tensor_that_the_index_names_is_in_no_file(root: str, hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.layers.9.x"] = sorted(hf.glob("*.safetensors"))[0].name
    index.write_text(json.dumps(document))
    assert "model.layers.9.x in model-00001" in refused(root, weights(hf, format="hf")).what


@pytest.mark.parametrize("num_bytes", [4, 60, -1])
def test_a_file_that_is_cut_short(root: str, hf: Path, num_bytes: int) -> None:
    file = sorted(hf.glob("*.safetensors"))[0]
    os.truncate(file, num_bytes % file.stat().st_size)
    error = refused(root, weights(hf, format="hf"))
    assert isinstance(error, IntegrityError)
    assert f"{file.name} is cut short" in error.what


def test_a_config_that_is_missing(root: str, hf: Path) -> None:
    (hf / "config.json").unlink()
    error = refused(root, weights(hf, format="hf"), assets=HfAssets(family="llama", files={}))
    assert isinstance(error, UsageError)
    assert "the folder holds no config.json" in error.what


def test_a_tensor_that_no_rule_knows_or_the_source_lacks(root: str, hf: Path) -> None:
    _rewrite(hf, lambda tensors: tensors.update({"model.layers.0.stranger": torch.ones(1)}))
    error = refused(root, weights(hf, format="hf"))
    assert isinstance(error, StateDictError)
    assert "model.layers.0.stranger" in error.what
    assert error.where == str(hf)
    assert "loaded" in error.safe


def test_a_tensor_of_another_shape_in_a_hugging_face_folder(root: str, hf: Path) -> None:
    _rewrite(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    error = refused(root, weights(hf, format="hf"))
    assert "norm.weight is [16] here and [5] there" in error.what


def test_a_family_that_nobody_knows(root: str, hf: Path) -> None:
    files = make_assets(SIZES).files
    error = refused(root, weights(hf, format="hf"), assets=HfAssets(family="lama", files=files))
    assert isinstance(error, ConfigError)
    assert "'lama'" in error.what
    assert "llama" in error.do


def test_other_weights_beside_the_model_are_not_read(root: str, tmp_path: Path) -> None:
    """Some folders on the Hub hold the same model once more, under its makers' own names."""
    hf_base(tmp_path / "hf")
    save_file({"tok_embeddings.weight": torch.ones(1)}, tmp_path / "hf/consolidated.safetensors")
    manager, _ = open_manager(root)
    assert manager.load(config=weights(tmp_path / "hf", format="hf")).step == 0
    manager.close()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"lora_alpha": 16}, "scaling is 8 (r=2, lora_alpha=16), the model's is 2"),
        ({"use_rslora": True}, "scaling is 2.82843"),
        ({"use_dora": True}, "was trained with use_dora"),
    ],
)
def test_an_adapter_of_another_scaling_isrefused(
    root: str, tmp_path: Path, entries: dict[str, Any], words: str
) -> None:
    """It is in no tensor: the model would train on, and say something else."""
    peft_adapter(tmp_path / "adapter", hf_base(tmp_path / "base"))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    load = with_adapter(tmp_path / "base", tmp_path / "adapter")
    error = refused(root, load, converters=LORA)
    assert isinstance(error, ConfigError)
    assert words in error.what
