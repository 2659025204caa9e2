"""`ray-ckpt export` in other forms, and of a step that only a person should export."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Answer
from tests.roots import make_root, snapshot

Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("forms") / "run")
    make_root(root, (10,))
    return root


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (("lora",), "write --as lora=peft"),
        (("lora=",), "write --as lora=peft"),
        (("lora=peft", "lora=merged"), "one CONVERTER=FLAVOR a converter"),
        (("lora=peft",), "lora, which did not change this model"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    cli: Cli, root: str, forms: tuple[str, ...], says: str
) -> None:
    options = [word for form in forms for word in ("--as", form)]
    answer = cli("export", root, "--step", 10, *options)
    assert answer.code == 2
    assert says in answer.err
    assert not (Path(root) / "exports").exists()


def test_a_step_that_is_finite_is_exported_the_same_if_others_were_allowed(
    cli: Cli, root: str
) -> None:
    assert cli("export", root, "--step", 10).code == 0
    before = snapshot(f"{root}/exports")
    assert cli("export", root, "--step", 10, "--allow-non-finite").code == 0
    assert snapshot(f"{root}/exports") == before


def test_a_plan_is_what_is_made_and_writes_nothing(cli: Cli, root: str) -> None:
    words = ("export", root, "--step", 10, "--name", "planned", "--max-shard-size", "20 kB")
    before = snapshot(root)
    plan = json.loads(cli(*words, "--plan", "--json").out)
    assert snapshot(root) == before
    assert cli(*words).code == 0
    folder = Path(root, "exports/planned/step-10")
    made = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert {file["file"] for file in plan["files"]} == set(made)
    for file in plan["files"]:
        assert {
            tensor["name"]: (tensor["shape"], f"torch.{tensor['dtype']}", tensor["bytes"])
            for tensor in file["tensors"]
        } == {k: (list(t.shape), str(t.dtype), t.nbytes) for k, t in made[file["file"]].items()}
    (query,) = (
        tensor
        for file in plan["files"]
        for tensor in file["tensors"]
        if tensor["name"] == "model.layers.0.self_attn.q_proj.weight"
    )
    assert query["how"] == ["in another order", "cast to bfloat16"]
    (source,) = query["sources"]
    assert source["name"] == "layers.0.attention.wq.weight"
    (place,) = source["bytes_at"]
    piece = Path(root, "step-10", place["file"]).read_bytes()[place["offset"] :][: place["length"]]
    assert torch.load(io.BytesIO(piece)).shape == (32, 32)


def test_a_plan_for_people_says_how_large_and_how(cli: Cli, root: str) -> None:
    answer = cli("export", root, "--step", 10, "--dtype", "float32", "--plan")
    file, total = answer.out.splitlines()
    assert file.split("\t") == [
        *("model-00001-of-00001.safetensors", "21 tensors", "140.2 kB", "from 173.3 kB"),
        "17 as it is; 4 in another order",
    ]
    assert total == "140.2 kB in all, to exports/hf-fp32/step-10; takes 64.0 MB of memory"


@pytest.mark.parametrize("size", ["20XB", "0", "-5GB", "large", "1.2.3GB"])
def test_what_is_no_size_is_refused(cli: Cli, root: str, size: str) -> None:
    answer = cli("export", root, "--step", 10, f"--max-shard-size={size}")
    assert answer.code == 2
    assert "is no size; write 5GB, 500MB or 4GiB" in answer.err
