"""`ray-ckpt diff` as a person or a script meets it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.bench.models import STEP, commit_model
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.step_tensors import step_tensors
from tests.cli.conftest import Answer
from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.waiting import PATIENCE_S

Cli = Callable[..., Answer]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAME = "layers.0.attention.wq.weight"
HF_NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("diff") / "run")
    make_root(root, (10, 20))
    return root


def by_name(answer: Answer) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in answer.json["tensors"]}


def plain(folder: Path, tensors: Mapping[str, Any]) -> Path:
    """A checkpoint that ray_ckpt did not write."""
    dcp.save(dict(tensors), checkpoint_id=str(folder), no_dist=True)
    return folder


def test_two_steps_differ_where_torch_says_so(cli: Cli, run_root: str) -> None:
    answer = cli("diff", f"{run_root}/step-10", f"{run_root}/step-20", "--json")
    assert answer.code == 1
    rows = by_name(answer)
    catalog = open_catalog(run_root)
    a, b = (step_tensors(catalog, catalog.manifest(step)) for step in (10, 20))
    for name, row in rows.items():
        if name in a.others():
            continue
        one, other = a.whole(name).double(), b.whole(name).double()
        apart = (one - other).abs()
        assert row["max_difference"] == float(apart.max()), name
        assert row["num_differing"] == int((apart > 0).sum()), name
        assert row["verdict"] == ("values" if row["num_differing"] else "equal"), name
        assert row["at"] is None or apart[tuple(row["at"])] == apart.max(), name
    assert {*a.specs(), *a.others()} == set(rows)
    worst = [row["max_difference"] for row in answer.json["tensors"] if row["verdict"] == "values"]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) > 20


def test_a_table_names_the_worst_first_and_counts_the_rest(cli: Cli, run_root: str) -> None:
    answer = cli("diff", f"{run_root}/step-10", f"{run_root}/step-20", "--only", "*.step")
    assert answer.code == 1
    *rows, total = [line.split("\t") for line in answer.out.splitlines()]
    assert all(row[1:5] == ["values", "1", "[]", "1 of 1"] for row in rows)
    assert total == [f"{len(rows)} compared: {len(rows)} values"]


def test_what_the_manifests_say_is_the_same_is_not_read(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    copy = tmp_path / "step-10"
    shutil.copytree(f"{run_root}/step-10", copy)
    answer = cli("diff", f"{run_root}/step-10", copy, "--json")
    assert answer.code == 0
    assert answer.json["equal"]
    tensors = [row for row in answer.json["tensors"] if row["a"] is not None]
    assert not any(row["was_read"] for row in tensors)
    said = cli("diff", f"{run_root}/step-10", copy).out
    assert f"of the equal ones {len(tensors)} are known by their manifests" in said
    (copy / "ray_ckpt.manifest.json").unlink()
    read = cli("diff", f"{run_root}/step-10", copy, "--json")
    assert read.code == 0
    assert all(row["was_read"] for row in read.json["tensors"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_and_its_own_export_are_equal_under_the_names_of_the_export(
    cli: Cli, run_root: str, dtype: str
) -> None:
    words = ("--step", 10, "--name", dtype, "--dtype", dtype, "--max-shard-size", "20kB")
    assert cli("export", run_root, *words).code == 0
    pair = (f"{run_root}/step-10", f"{run_root}/exports/{dtype}/step-10")
    for first, second in (pair, reversed(pair)):
        answer = cli("diff", first, second, "--json")
        assert answer.code == 0, answer.out
        assert "step-10 is compared as an export of it would be" in answer.json["note"]
        assert HF_NAME in by_name(answer)
    other = cli("diff", f"{run_root}/step-20", pair[1], "--only", HF_NAME, "--json")
    assert other.code == 1
    assert other.json["totals"] == {"values": 1}


def test_one_element_of_an_export_that_is_another_is_found(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("export", run_root, "--step", 10, "--name", "whole", "--dtype", "float32")
    folder = tmp_path / "edited"
    shutil.copytree(f"{run_root}/exports/whole/step-10", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[HF_NAME][3, 5] += 0.25
    save_file(tensors, file)
    (folder / "ray_ckpt.manifest.json").unlink()
    for one in (f"{run_root}/step-10", f"{run_root}/exports/whole/step-10"):
        answer = cli("diff", one, folder, "--json")
        assert answer.code == 1
        assert answer.json["totals"].keys() == {"values", "equal"}
        row = answer.json["tensors"][0]
        assert (row["name"], row["at"], row["num_differing"]) == (HF_NAME, [3, 5], 1)
        assert row["max_difference"] == pytest.approx(0.25)
        assert cli("diff", one, folder, "--tolerance", 0.3).code == 0


def test_a_model_on_the_hub_is_compared_as_one_at_a_path(
    cli: Cli, run_root: str, hub: HubDouble
) -> None:
    hub.api().create_repo("ray/model")
    step, there = f"{run_root}/step-10", "hf://ray/model"
    words = ("--step", "10", "--name", "hub", "--dtype", "bfloat16", "--to", there)
    for arguments in (("export", run_root, *words), ("diff", step, there, "--json")):
        done = run_python("-m", "ray_ckpt", *arguments, environment=hub.environment())
    document = json.loads(done.stdout)
    assert document["equal"]
    assert document["totals"].keys() == {"equal"}


def test_low_rank_layers_are_merged_before_they_are_compared(cli: Cli, root: str) -> None:
    commit_model(root, 2, kind="lora")
    cli("export", root, "--step", STEP, "--as", "lora=peft", "--dtype", "float32")
    own = cli("diff", f"{root}/step-{STEP}", f"{root}/exports/peft-hf-fp32/step-{STEP}", "--json")
    assert own.code == 0, own.out
    assert all("lora" in name for name in by_name(own))
    cli("export", root, "--step", STEP, "--name", "merged", "--dtype", "bfloat16")
    answer = cli("diff", f"{root}/step-{STEP}", f"{root}/exports/merged/step-{STEP}", "--json")
    assert answer.code == 0
    assert all(row["was_read"] for row in answer.json["tensors"])
    assert not any("lora" in name for name in by_name(answer))
    assert HF_NAME in by_name(answer)


A: dict[str, Tensor] = {
    "same": torch.arange(6.0),
    "shape": torch.zeros(2, 3),
    "type": torch.ones(3),
    "gone": torch.zeros(1),
    "nan": torch.tensor([float("nan"), 1.0, float("inf")]),
    "lost": torch.tensor([1.0, 2.0]),
    "large": torch.tensor([2**60, 5]),
    "tiny": torch.tensor([1.0, 1.0]),
    "none": torch.zeros(0, 4),
}
B: dict[str, Tensor] = {
    **{name: A[name] for name in ("same", "nan", "none")},
    "shape": torch.zeros(3, 2),
    "type": torch.ones(3, dtype=torch.bfloat16),
    "new": torch.zeros(1),
    "lost": torch.tensor([1.0, float("nan")]),
    "large": torch.tensor([2**60 + 1, 5]),
    "tiny": torch.tensor([1.0, 1.25]),
}


@pytest.mark.parametrize("place", ["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def test_every_way_to_differ_has_its_name(
    cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, place: str
) -> None:
    pair = [plain(tmp_path / name, tensors) for name, tensors in (("a", A), ("b", B))]
    root = request.getfixturevalue(place)
    store = open_catalog(root).store
    for folder in pair:
        for path in folder.iterdir():
            store.upload(path, f"{folder.name}/{path.name}")
    answer = cli("diff", f"{root}/a", f"{root}/b", "--json")
    assert answer.code == 1
    assert {name: row["verdict"] for name, row in by_name(answer).items()} == {
        **dict.fromkeys(("same", "nan", "none"), "equal"),
        **dict.fromkeys(("lost", "large", "tiny"), "values"),
        "shape": "shape",
        "type": "dtype",
        "gone": "only a",
        "new": "only b",
    }
    rows = by_name(answer)
    assert list(rows)[:6] == ["gone", "new", "shape", "lost", "large", "tiny"]
    assert (rows["lost"]["max_difference"], rows["lost"]["at"]) == ("Infinity", [1])
    assert (rows["large"]["max_difference"], rows["large"]["num_differing"]) == (1.0, 1)
    assert rows["type"]["b"] == {"dtype": "bfloat16", "shape": [3]}
    tolerant = cli("diff", f"{root}/a", f"{root}/b", "--tolerance", 0.25, "--json")
    verdicts = {name: row["verdict"] for name, row in by_name(tolerant).items()}
    assert (verdicts["tiny"], verdicts["type"], verdicts["large"]) == ("equal", "equal", "values")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_what_is_no_tensor_is_compared_and_never_run(cli: Cli, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    weight = {"weight": torch.ones(2)}
    one = plain(tmp_path / "a", {**weight, "state": Evil(str(trap)), "seed": 1})
    other = plain(tmp_path / "b", {**weight, "state": Evil(str(trap)), "seed": 2})
    answer = cli("diff", one, other, "--json")
    assert answer.code == 1
    verdicts = {name: row["verdict"] for name, row in by_name(answer).items()}
    assert verdicts == {"weight": "equal", "state": "equal", "seed": "bytes"}
    (other / ".metadata").write_bytes(pickle.dumps(Evil(str(trap))))
    refused = cli("diff", one, other)
    assert refused.code == 1
    assert "nothing of it was run" in refused.err
    assert not trap.exists()


def test_a_step_that_says_of_no_model_is_compared_by_its_own_names(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("export", run_root, "--step", 10, "--name", "named", "--dtype", "float32")
    tensors = {HF_NAME: torch.zeros(32, 32), "own": torch.zeros(1)}
    answer = cli(
        "diff", plain(tmp_path / "step-1", tensors), f"{run_root}/exports/named/step-10", "--json"
    )
    assert answer.code == 1
    assert answer.json["note"].startswith("names are compared as they are: step-1 has no manifest")
    assert answer.json["totals"]["only a"] == 1
    assert answer.json["totals"]["values"] == 1
    assert answer.json["totals"]["only b"] > 10


def test_what_cannot_be_compared_is_named(cli: Cli, run_root: str) -> None:
    step = f"{run_root}/step-10"
    for path in (run_root, f"{run_root}/step-99", "/nowhere/step-1"):
        answer = cli("diff", step, path)
        assert answer.code == 2
        assert f"where: {path}" in answer.err
        assert "do:    name the folder itself: ROOT/step-500" in answer.err
    nothing = cli("diff", step, step, "--only", "layer.*")
    assert nothing.code == 2
    assert "nothing of that name is in either of them" in nothing.err
    assert cli("diff", step).code == 2


def test_a_step_is_held_from_purges_while_it_is_read(
    cli: Cli, run_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_ckpt.storage.readers import living_readers
    from ray_ckpt.tensors import comparing

    store, seen = open_catalog(run_root).store, []
    pairs = comparing._pairs
    monkeypatch.setattr(
        comparing,
        "_pairs",
        lambda *args: seen.extend(living_readers(store, 10)) or pairs(*args),
    )
    cli("diff", f"{run_root}/step-10", f"{run_root}/step-20")
    assert "diff" in seen[0]
    assert living_readers(store, 10) == []


MODEL_MB, LIMIT_MB = 560, 190
COMPARE = """
import resource, sys, threading
threading.stack_size(1 << 18)  # stacks count as well
import torch
from ray_ckpt.tensors.comparable import open_folder_to_compare
from ray_ckpt.tensors.comparing import compare

torch.zeros(8).sum()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = compare(open_folder_to_compare(sys.argv[1]), open_folder_to_compare(sys.argv[2]))
assert found.are_equal, found.results[0]
assert all(result.was_read for result in found.results)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_models_three_times_as_large_as_the_memory_are_compared(
    cli: Cli, root: str, tmp_path: Path
) -> None:
    commit_model(root, MODEL_MB, kind="permute")
    cli("export", root, "--step", STEP, "--name", "full", "--dtype", "float32")
    step, export = f"{root}/step-{STEP}", f"{root}/exports/full/step-{STEP}"
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPARE, step, export, str(LIMIT_MB * 1_000_000)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
