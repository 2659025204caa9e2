"""What a GPU changes: states are copied from it, drawn from its generators, and brought by NCCL."""

import json
from pathlib import Path

import pytest
import torch

from jobs.assets import make_assets
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.transforms import cast_floating
from tests.tensors.ranks import run
from tests.tensors.tiny import SIZES, Setup, same_tensors, train, weights_in

STOP, END = 10, 20
ON_GPU = Setup(dropout=0.1, device="cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", ["sync", "async", "process"])
@pytest.mark.parametrize("converter", ["none", "lora", "ema"])
def test_a_run_on_a_gpu_that_was_stopped_is_bit_identical_to_one_that_was_not(
    root: str, mode: Mode, converter: str
) -> None:
    converters = {
        "none": {},
        "lora": {"lora": {"rank": 2, "alpha": 4, "targets": ["layers.*.attention.w[qkvo]"]}},
        "ema": {"ema": {"decay": 0.9}},
    }
    setup = Setup(dropout=0.1, device="cuda", converters=converters[converter])
    never = SaveConfig(every_steps=None)
    save = SaveConfig(every_steps=STOP, mode=mode, when_busy="wait")
    (straight,) = run(train, f"{root}-straight", END, never, 0, SIZES, setup, num_ranks=1)
    (before,) = run(train, root, STOP, save, 0, SIZES, setup, num_ranks=1)
    (after,) = run(train, root, END, save, 1, SIZES, setup, num_ranks=1)
    assert after.report.step == STOP
    assert {**before.losses, **after.losses} == straight.losses
    assert {**before.draws, **after.draws} == straight.draws
    assert same_tensors(after.loaded, before.state)
    assert same_tensors(after.state, straight.state)


def test_an_export_needs_no_gpu_and_holds_what_was_trained_on_one(root: str) -> None:
    save = SaveConfig(every_steps=STOP, mode="async", when_busy="wait")
    (outcome,) = run(train, root, STOP, save, 0, SIZES, ON_GPU, num_ranks=1)
    catalog = open_catalog(root)
    export_step(catalog, catalog.manifest(STOP), ExportSpec(name="hf"))
    config = json.loads(make_assets(SIZES).files["config.json"])
    trained = {key: value for key, value in outcome.state.items() if ":" not in key}
    expected = make_adapter("llama", config).to_hf(cast_floating(trained, torch.bfloat16))
    assert same_tensors(weights_in(Path(root, f"exports/hf/step-{STOP}")), dict(expected))


def test_a_merge_on_a_gpu_is_the_one_on_the_cpu_but_for_its_last_bits(root: str) -> None:
    setup = Setup(
        converters={"lora": {"rank": 2, "alpha": 4, "targets": ["layers.*.attention.w[qkvo]"]}}
    )
    save = SaveConfig(every_steps=STOP, mode="sync")
    run(train, root, STOP, save, 0, SIZES, setup, num_ranks=1)
    catalog = open_catalog(root)
    for name, device in (("here", "cpu"), ("there", "cuda")):
        spec = ExportSpec(name=name, dtype="float32", device=device)
        export_step(catalog, catalog.manifest(STOP), spec)
    here, there = (weights_in(Path(root, f"exports/{n}/step-{STOP}")) for n in ("here", "there"))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, msg=lambda text, of=name: f"{of}: {text}")


def test_a_gpu_resumes_what_a_cpu_saved_and_the_other_way_round(root: str) -> None:
    save = SaveConfig(every_steps=STOP, mode="sync")
    (on_cpu,) = run(train, root, STOP, save, num_ranks=1)
    (on_gpu,) = run(train, root, 2 * STOP, save, 0, SIZES, Setup(device="cuda"), num_ranks=1)
    (again,) = run(train, root, 3 * STOP, save, num_ranks=1)
    assert same_tensors(on_gpu.loaded, on_cpu.state)
    assert same_tensors(again.loaded, on_gpu.state)
