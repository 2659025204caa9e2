"""The last save as a Hugging Face folder, or as the model alone: what a run ends with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.loading import FromWeights, LoadConfig
from ray_ckpt.core.saving import HuggingFace, ModelOnly, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors import tiny
from tests.tensors.plain import plain_manager
from tests.tensors.ranks import run
from tests.tensors.tiny import (
    Setup,
    make_trainer,
    record_log,
    same_tensors,
    train_step,
    weights_in,
)

SYNC = SaveConfig(every_steps=100, mode="sync")
HF = replace(SYNC, last=HuggingFace(name="final", dtype="bfloat16"))


def _save_twice(root: str, twin: str, converters: str) -> tuple[list[str], list[str]]:
    """The same training, ended as an export here and as a checkpoint there."""
    told = record_log()
    for place, config in ((root, HF), (twin, SYNC)):
        torch.manual_seed(0)
        trainer = make_trainer(place, config, setup=Setup(converters=CONVERTERS[converters]))
        for step in range(1, 4):
            train_step(trainer)
            trainer.checkpoints.save(step, last_step=step == 3)
        trainer.checkpoints.close()
    return told, sorted(tiny.files_in(root))


CONVERTERS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "lora": {"lora": {"rank": 2, "alpha": 4, "targets": ["layers.*.attention.wq"]}},
    "ema": {"ema": {"decay": 0.9}},
}


@pytest.mark.parametrize("converters", CONVERTERS)
def test_it_is_bit_for_bit_the_export_of_a_step_saved_at_the_same_moment(
    tmp_path: Path, converters: str
) -> None:
    root, twin = tmp_path / "run", tmp_path / "twin"
    run(_save_twice, str(root), str(twin), converters)
    catalog = open_catalog(str(twin))
    export_step(catalog, catalog.manifest(3), ExportSpec(name="final", dtype="bfloat16"))
    ours, theirs = root / "exports/final/step-3", twin / "exports/final/step-3"
    assert same_tensors(weights_in(ours), weights_in(theirs))
    names = {path.name for path in ours.iterdir()}
    assert names == {path.name for path in theirs.iterdir()}
    for name in names - {"README.md", "ray_ckpt.manifest.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_it_is_no_checkpoint_and_a_restart_goes_on_from_the_one_before(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    config = replace(HF, every_steps=2)
    first = run(tiny.train, root, 3, config)
    assert first[0].committed == [2, 3]
    catalog = open_catalog(root)
    assert [view.step for view in catalog.observe().readable()] == [2]
    assert [(e.name, e.step) for e in catalog.observe().exports] == [("final", 3)]
    assert run(tiny.train, root, 4, SYNC)[0].report.step == 2


def test_a_run_without_config_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        plain_manager(tmp_path, torch.nn.Linear(2, 2), HF)


def test_a_model_alone_that_would_be_an_adapter_is_refused_before_it_starts(
    tmp_path: Path,
) -> None:
    converter = LoRA(rank=2, alpha=2, targets=("0",), flavor="peft")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    converter.convert(model)
    with pytest.raises(ConfigError, match=r"lora exports it in a format of its own"):
        CheckpointManager(
            str(tmp_path),
            TrainingState(model=ModelWrapper(model, converters=[converter])),
            config=replace(SYNC, last=ModelOnly(dtype="bfloat16")),
        )


def _break_a_weight(root: str) -> list[str]:
    told = record_log()
    trainer = make_trainer(root, HF)
    train_step(trainer)
    if dist.get_rank() == 1:
        with torch.no_grad():
            trainer.model.norm.weight.to_local().fill_(float("nan"))
    trainer.checkpoints.save(1, last_step=True)
    trainer.checkpoints.close()
    return told


def test_an_export_that_fails_leaves_a_checkpoint_instead_of_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    told = run(_break_a_weight, str(root))[0]
    assert any("norm.weight" in line and "instead of an export" in line for line in told)
    catalog = open_catalog(str(root))
    assert catalog.manifest(1).non_finite == ("norm.weight",)
    assert catalog.observe().exports == ()
    assert list((root / ".ray_ckpt/staging").iterdir()) == []


def test_the_model_alone_is_cast_undone_and_starts_another_run(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    config = replace(SYNC, last=ModelOnly(dtype="bfloat16"))
    trained = run(tiny.train, root, 2, config)[0]
    manifest = open_catalog(root).manifest(2)
    assert manifest.holds == "model"
    assert {entry.dtype for entry in manifest.tensors} == {"bfloat16"}
    start = LoadConfig(start=FromWeights(path=f"{root}/step-2"))
    following = run(tiny.train, str(tmp_path / "next"), 0, SYNC, 1, tiny.SIZES, Setup(load=start))[
        0
    ]
    expected = {k: t.bfloat16().float() for k, t in trained.state.items() if ":" not in k}
    assert following.report.step == 0
    assert same_tensors({k: t for k, t in following.loaded.items() if ":" not in k}, expected)


def test_the_folder_says_in_which_type_it_is(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.train, str(root), 1, HF)
    config = json.loads((root / "exports/final/step-1/config.json").read_text())
    assert config["dtype"] == "bfloat16"
