"""`ray-ckpt import` as it is typed, and the export of what it made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ray_ckpt.cli.output import human_bytes
from ray_ckpt.storage.backends import open_catalog
from tests.cli.conftest import Answer
from tests.tensors.tiny import same_tensors, weights_in

Cli = Callable[..., Answer]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_there_and_back(cli: Cli, base: Path, root: str) -> None:
    told = cli("import", base, root)
    assert told.code == 0
    size = human_bytes(open_catalog(root).manifest(0).total_bytes)
    assert told.out == f"{root}/step-0: 21 tensors of a llama model, {size}\n"
    assert json.loads(cli("ls", root, "--json").out)[0]["state"] == "committed"
    exported = cli("export", root, "--step", 0, "--dtype", "float32", "--json")
    made = Path(json.loads(exported.out)["path"])
    assert same_tensors(weights_in(made), weights_in(base))


def test_twice_is_refused_and_so_is_a_folder_that_is_not_there(
    cli: Cli, base: Path, root: str, tmp_path: Path
) -> None:
    document = json.loads(cli("import", base, root, "--json").out)
    assert (document["path"], document["family"], document["tensors"]) == (
        f"{root}/step-0",
        "llama",
        21,
    )
    again = cli("import", base, root)
    assert again.code == 2
    assert "step-0" in again.err
    absent = cli("import", tmp_path / "absent", f"{root}-2")
    assert absent.code == 2
    assert "config.json" in absent.err
    assert not Path(f"{root}-2", "step-0").exists()
