"""The benchmark runs as it is typed, and its last line is for a script."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.bench.check import Checked, too_slow
from jobs.bench.export import LIMIT, WAYS
from jobs.bench.models import STEP, commit_model
from jobs.bench.plan import LLAMA_3_405B, llama_shapes
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export_plan import plan_export
from tests.processes import run_python
from tests.servers.hub import HubDouble


def measure(*arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """The table's first line, and the rows for a script."""
    done = run_python("-m", "jobs.bench", *arguments, "--json", environment={})
    header, *rows, last = done.stdout.splitlines()
    [measured] = json.loads(last).values()
    assert len(rows) == len(measured)
    return header, measured


def test_plans_of_small_models_are_measured() -> None:
    header, (llama, deepseek) = measure("plan", "--layers", "4", "--nodes", "3")
    assert header.split() == list(llama)
    assert (llama["model"], llama["num_inputs"], llama["num_outputs"]) == ("llama-3-405b", 39, 39)
    assert deepseek["num_outputs"] - deepseek["num_inputs"] == 3 * 255
    assert all(one["cpu_s"] > 0 and one["wall_s"] > 0 for one in (llama, deepseek))
    shapes = llama_shapes(LLAMA_3_405B | {"num_hidden_layers": 4})
    total_gb = 4 * sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert llama["read_ratio"] == 1.0
    assert total_gb / 3 <= llama["node_read_gb"] < total_gb
    assert llama["num_files"] >= total_gb / 2 / 5
    assert 1.0 <= deepseek["read_ratio"] < 1.1


def test_a_file_says_what_is_not_typed(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text("layers = 4\nnodes = 3\njson = true\n")
    known = ["plan", "--config", str(tmp_path / "bench.toml")]
    done = run_python("-m", "jobs.bench", *known, "--nodes", "1", environment={})
    llama, _ = json.loads(done.stdout.splitlines()[-1])["plan"]
    assert llama["num_inputs"] == 39
    assert llama["node_read_gb"] > 60  # all of it by one node, not by three


@pytest.mark.slow
def test_saves_of_simulated_ranks_are_planned_and_indexed_beside_dcps_planner() -> None:
    header, rows = measure("scale", "--ranks", "2,16", "--tensors", "50", "--peers")
    assert header.split() == list(rows[0])
    ways = [(row["what"], row["num_ranks"]) for row in rows]
    assert ways == [(way, n) for n in (2, 16) for way in ("ray_ckpt", "DefaultSavePlanner")]
    for ours, theirs in (rows[:2], rows[2:]):
        assert 0 < ours["again_mb"] < ours["gathered_mb"] < theirs["gathered_mb"]
        assert ours["metadata_mb"] > 0
        assert ours["plan_cpu_s"] > 0
        assert ours["peak_mb"] >= 0
        assert all(one["load_cpu_s"] > 0 and one["load_mb"] > 0 for one in (ours, theirs))


def test_what_trust_costs_is_measured_beside_torchs_own_save_and_load(tmp_path: Path) -> None:
    words = ("--size-mb", "1", "--repeats", "2", "--folder", str(tmp_path))
    _, rows = measure("integrity", *words)
    assert {"save", "dcp.save", "verify", "load, which verifies", "dcp.load"} < {
        row["what"] for row in rows
    }
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "ways"),
    [
        ("save", ("raw write", "ray_ckpt", "dcp.save")),
        pytest.param(
            *("async", ("ray_ckpt: stands still", "dcp.async_save: until durable")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("losing", ("training alone", "ray_ckpt, process", "dcp.async_save, process")),
            marks=pytest.mark.slow,
        ),
        ("restart", ("copy in memory", "ray_ckpt, from memory", "dcp.load, from storage")),
        ("load", ("copy in memory: warm", "ray_ckpt: warm", "raw read: cold", "dcp.load: cold")),
    ],
)
def test_a_training_state_is_saved_and_loaded_by_two_ranks(
    tmp_path: Path, what: str, ways: tuple[str, ...]
) -> None:
    words = ("--size-mb", "1", "--repeats", "1", "--folder", str(tmp_path))
    _, rows = measure(what, *words)
    assert set(ways) <= {row["what"] for row in rows}
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_as_fast_as_it_must_be_is_told_by_its_ratio() -> None:
    good = Checked(what="a", other="b", min_s=1.0, other_min_s=0.8, ratio=0.8, least=0.7)
    slow = replace(good, what="c", ratio=0.5)
    assert too_slow([good]) == []
    assert too_slow([good, slow]) == ["c: 0.50 times as fast as b, at least 0.7 expected"]


def test_what_stands_still_is_not_written_again(tmp_path: Path) -> None:
    words = ("--size-mb", "40", "--still", "0.75", "--repeats", "1", "--folder", str(tmp_path))
    _, rows = measure("still", *words)
    written = {row["what"]: row["written_mb"] for row in rows}
    assert written["ray_ckpt, what moved"] == pytest.approx(10, abs=0.5)
    assert written["ray_ckpt, all"] == pytest.approx(40, abs=0.5)
    assert written["dcp.save"] == pytest.approx(40, abs=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_step_without_a_save_is_measured_on_two_ranks() -> None:
    _, rows = measure("vote", "--repeats", "1")
    assert [row["what"].partition(" x ")[2] for row in rows] == [
        "save(), which listens",
        "save(), which does not",
        "dist.barrier",
    ]


@pytest.mark.slow
def test_training_is_measured_beside_exports_that_give_way_and_others(tmp_path: Path) -> None:
    words = ("--size-mb", "1", "--repeats", "1", "--folder", str(tmp_path))
    _, (alone, polite, rude) = measure("beside", *words)
    assert (alone["ratio"], alone["num_exports"]) == (1.0, 0)
    assert rude["num_exports"] > 0
    for row in (alone, polite, rude):
        assert row["ratio"] == pytest.approx(row["median_s"] / alone["median_s"])
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "root", ["tmp_path", pytest.param("s3_root", marks=[pytest.mark.s3, pytest.mark.slow])]
)
def test_looks_of_a_manager_are_measured_and_counted(
    root: str, request: pytest.FixtureRequest
) -> None:
    uri = str(request.getfixturevalue(root))
    _, rows = measure("manager", "--root", uri, "--steps", "3,5", "--actions", "7")
    looks = [(row["num_steps"], row["look"]) for row in rows]
    names = ("first", "again", "one more step", "close", "a manager starts", "7 actions")
    assert looks == [(steps, name) for steps in (3, 5) for name in names]
    assert [row["num_get"] for row in rows[:4]] == [2 * 3 + 1, 1, 3, 1]
    assert all(row["wall_s"] > 0 for row in rows)
    assert all(row["num_head"] == 0 for row in rows if row["look"] in names[:4])
    assert list(open_catalog(uri).store.list_objects("")) == []


@pytest.mark.slow
def test_exports_are_measured_beside_others_and_a_bare_copy(tmp_path: Path) -> None:
    words = ("--kind", "lora", "--size-mb", "1", "--repeats", "1", "--folder", str(tmp_path))
    _, rows = measure("export", *words)
    assert {row["kind"] for row in rows} == {"lora"}
    assert [row["dtype"] for row in rows] == ["float32"] * 4 + ["bfloat16"] * 4
    for copy, ours, *others in (rows[:4], rows[4:]):
        assert (copy["what"], copy["ratio"]) == ("bare copy", 1.0)
        assert ours["what"] == "ray_ckpt export"
        assert ours["written_mb"] < min(other["written_mb"] for other in others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "moved", "merged"),
    [
        ("plain", set(), set()),
        ("permute", {"q_proj", "k_proj"}, set()),
        ("lora", {"k_proj"}, {"q_proj", "v_proj"}),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_every_way_to_export_a_kind_of_model_gives_the_same_tensors(
    kind: str, moved: set[str], merged: set[str], root: str, tmp_path: Path
) -> None:
    commit_model(root, 1, kind=kind)
    catalog = open_catalog(root)
    planned = plan_export(catalog, catalog.manifest(STEP), ExportSpec(name="a", dtype="float32"))
    views = {name: output.view for name, output in planned.recording.outputs.items()}
    assert {_layer(name) for name, view in views.items() if view is None} == merged
    assert {_layer(name) for name, v in views.items() if v and not v.is_contiguous} == moved
    ours, *others = [way for what, way in WAYS.items() if what != LIMIT]
    ours(root, "", "float32")
    expected = _tensors(Path(root, "exports/hf/step-1"))
    assert expected.keys() == views.keys()
    for number, other in enumerate(others):
        other(root, str(tmp_path / f"{number}"), "float32")
        found = _tensors(tmp_path / f"{number}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _layer(name: str) -> str:
    return name.split(".")[-2]


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.slow
def test_an_export_is_measured_by_the_number_of_tasks_that_make_it(tmp_path: Path) -> None:
    words = ("--tasks", "1,2", "--size-mb", "1", "--repeats", "1", "--folder", str(tmp_path))
    _, rows = measure("crew", *words)
    assert [row["num_tasks"] for row in rows] == [1, 2]
    for row in rows:
        # as many as wrote a shard: a task that a busy machine starts late may find none left
        assert 1 <= row["num_nodes"] <= row["num_tasks"]
        assert row["num_shards"] >= 8
        assert row["ratio"] == pytest.approx(row["median_s"] / rows[0]["median_s"])
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["cpu_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_last_saves_are_measured_beside_torchtitans_and_a_raw_write(tmp_path: Path) -> None:
    words = ("--size-mb", "1", "--repeats", "1", "--folder", str(tmp_path))
    _, rows = measure("last", *words)
    assert [row["what"] for row in rows] == [
        f"{dtype}: {what}"
        for dtype in ("float32", "bfloat16")
        for what in ("raw write", "ray_ckpt", "TorchTitan")
    ]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_goes_to_the_hub_is_measured_beside_its_own_client(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.api().create_repo("ray/model")
    sizes = ("--size-mb", "2", "--files", "3", "--repeats", "1")
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bench").mkdir()
    at = ("--root", "hf://ray/model", "--folder", str(tmp_path / "bench"))
    _, rows = measure("upload", *at, *sizes)
    assert [row["way"] for row in rows] == ["ray_ckpt", "HfApi.upload_folder"]
    assert all(row["median_s"] > 0 and row["ratio"] > 0 for row in rows)
    tags = [tag.name for tag in hub.api().list_repo_refs("ray/model").tags]
    assert len(tags) == 2  # ours, in the round that is not counted and in the one that is
    assert list((tmp_path / "bench").iterdir()) == []


@pytest.mark.s3
def test_uploads_are_measured_beside_other_clients_and_a_socket(
    s3_root: str, tmp_path: Path
) -> None:
    sizes = ("--size-mb", "20", "--files", "5", "--repeats", "1")
    header, rows = measure("upload", "--root", s3_root, "--folder", str(tmp_path), *sizes)
    assert header.split() == list(rows[0])
    ways = {(row["what"], row["way"]) for row in rows}
    assert {("large up", way) for way in ("a socket to nobody", "ray_ckpt", "s3fs.put_file")} < ways
    assert {("large down", "ray_ckpt"), ("many up", "ray_ckpt"), ("many up", "s3fs.put")} < ways
    assert {("many down", "ray_ckpt"), ("many down", "s3fs.get")} < ways
    assert all(row["median_s"] > 0 and row["ratio"] > 0 and row["mb_per_s"] > 0 for row in rows)
    store = open_catalog(s3_root).store
    large = store.stat("large")
    assert large is not None
    assert large.size_bytes == 20_000_000
    small = [info for info in store.list_objects("many") if info.size_bytes == 16_384]
    assert {info.key.rpartition("/")[2] for info in small} == {f"{n:04d}" for n in range(5)}
    assert list(tmp_path.iterdir()) == []


def test_a_purge_is_measured_beside_a_plain_removal(tmp_path: Path) -> None:
    words = ("--size-mb", "1", "--files", "3", "--repeats", "2", "--folder", str(tmp_path))
    _, rows = measure("purge", *words)
    assert [row["what"] for row in rows] == [
        "ray_ckpt: out of sight",
        "ray_ckpt: gone",
        "shutil.rmtree",
    ]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert list(tmp_path.iterdir()) == []
