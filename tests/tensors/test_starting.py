"""What a run begins from: its own steps, else the folder it is told, bit for bit, on two ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ray_ckpt.cli.main import cli
from ray_ckpt.core import names
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.manifest import Lineage, StartSource
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.history import EventReader
from tests.tensors.bases import (
    LORA,
    decoder_of,
    foreign_dcp,
    hf_base,
    open_manager,
    peft_adapter,
    same_logits,
    weights,
    with_adapter,
)
from tests.tensors.conftest import SavedRun
from tests.tensors.ranks import run
from tests.tensors.test_exactness import NEVER
from tests.tensors.tiny import (
    SIZES,
    Outcome,
    Setup,
    make_trainer,
    same_tensors,
    train,
    train_step,
)

PARTS = {"rng", "optimizer", "lr_scheduler", "dataloader"}


def _start(
    root: Path | str, load: LoadConfig, *, steps: int = 0, seed: int = 3, **setup: Any
) -> list[Outcome]:
    """Both ranks of a run that starts as told, trains and saves its last step."""
    save = SaveConfig(every_steps=None, mode="sync")
    return run(train, str(root), steps, save, seed, SIZES, Setup(load=load, **setup))


def _model(outcome_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in outcome_state.items() if ":" not in key}


# ---- steps of the run itself ----


def test_a_run_resumes_from_its_newest_step_and_says_why(saved_run: SavedRun, root: str) -> None:
    saved_run.copy(Path(root))
    for rank, outcome in enumerate(_start(root, LoadConfig(), steps=12)):
        report = outcome.report
        assert (report.step, report.reason) == (12, "newest committed checkpoint")
        assert (report.skipped, report.as_initialised) == ((), ())
        assert report.sources == (
            f"base, rng, optimizer, lr_scheduler, dataloader from {root}/step-12",
        )
        assert same_tensors(outcome.loaded, saved_run.ranks[rank].state)
        said = [line for line in outcome.log if "resuming" in line]
        assert said == (["INFO resuming from step-12: newest committed checkpoint"] * (rank == 0))


def test_the_plan_that_is_shown_is_the_choice_that_is_made(
    saved_root: Path,
) -> None:
    (saved_root / "step-12/__0_0.distcp").unlink()
    shown = CliRunner().invoke(cli, ["resume-plan", str(saved_root)]).output
    report = _start(saved_root, LoadConfig(), steps=9)[0].report
    assert f"resume from step-{report.step}: {report.reason}" in shown
    assert [step for step, _ in report.skipped] == [12]
    assert f"passed over step-12: committed: {report.skipped[0][1]}" in shown


def _load_step_6(root: str) -> tuple[Any, int, float]:
    trainer = make_trainer(root, NEVER)
    report = trainer.checkpoints.load(step=6)
    loss = train_step(trainer)
    trainer.checkpoints.close()
    return report, trainer.windows.num_samples, loss


def test_a_step_that_is_asked_for_by_number_is_loaded(
    saved_run: SavedRun, saved_root: Path
) -> None:
    for report, num_samples, loss in run(_load_step_6, str(saved_root)):
        assert (report.step, report.reason) == (6, "asked for by number")
        assert num_samples == 7 * 4
        assert loss == saved_run.ranks[0].losses[7]


def test_without_a_checkpoint_a_run_starts_from_its_own_weights(root: str) -> None:
    for outcome in _start(root, LoadConfig()):
        report = outcome.report
        assert (report.step, report.reason) == (0, "no committed checkpoint is here")
        assert report.sources == ()
        assert set(report.as_initialised) == {"base", *PARTS}
        assert outcome.log[:1] in ([], ["INFO starting at step 0: no committed checkpoint is here"])


def test_parts_that_are_excluded_keep_what_they_have(saved_run: SavedRun, root: str) -> None:
    saved_run.copy(Path(root))
    config = LoadConfig(exclude=("dataloader", "optimizer", "lr_scheduler"))
    for rank, outcome in enumerate(_start(root, config, steps=12)):
        assert same_tensors(outcome.loaded, _model(saved_run.ranks[rank].state))  # no moments
        assert outcome.num_samples == 0
        assert outcome.report.step == 12
        assert set(outcome.report.as_initialised) == {"dataloader", "optimizer", "lr_scheduler"}


# ---- weights from elsewhere ----


def test_weights_of_another_run_are_taken_and_nothing_else(saved_run: SavedRun, root: str) -> None:
    step = saved_run.root / "step-12"
    for rank, outcome in enumerate(_start(root, weights(step))):
        assert outcome.report.step == 0
        assert outcome.report.sources == (f"base from {step}",)
        assert set(outcome.report.as_initialised) == PARTS
        assert outcome.num_samples == 0
        assert same_tensors(outcome.loaded, _model(saved_run.ranks[rank].state))


def _lineage(root: str, step: int) -> Lineage:
    return open_catalog(root).manifest(step).lineage


def test_what_a_run_started_from_is_told_by_every_step_after_it(
    saved_run: SavedRun, root: str
) -> None:
    source = open_catalog(str(saved_run.root)).manifest(12)
    origin = StartSource(
        name="step-12",
        format="dcp",
        owners=("base",),
        digest=f"content:{source.content_id}",
        run_id=source.lineage.run_id,
    )
    _start(root, weights(saved_run.root / "step-12"), steps=1)
    assert _lineage(root, 1).started_from == (origin,)
    _start(root, LoadConfig(), steps=2)
    assert (_lineage(root, 2).resumed_from, _lineage(root, 2).started_from) == (1, (origin,))
    began = [e for e in EventReader(open_catalog(root).store).read() if e.what.startswith("run.")]
    assert [event.details["started_from"] for event in began] == [["step-12"], ["step-12"]]
    assert (
        f"step-12 (dcp of {origin.run_id})" in CliRunner().invoke(cli, ["show", root, "2"]).output
    )
    assert str(saved_run.root) not in (Path(root) / "step-2" / names.MANIFEST).read_text()


def test_a_folder_that_is_not_ours_is_told_by_its_name_and_sizes(tmp_path: Path) -> None:
    told = []
    for number, seed in enumerate((5, 5, 6)):
        base, root = tmp_path / f"{number}/Tiny-Llama", str(tmp_path / f"{number}/run")
        hf_base(base, seed=seed, max_shard_size="20KB" if number == 2 else "5GB")
        _start(root, weights(base, format="hf"), steps=1)
        [origin] = _lineage(root, 1).started_from
        told.append(origin)
    assert told[0] == told[1]
    assert (told[0].name, told[0].format, told[0].run_id) == ("Tiny-Llama", "hf", None)
    assert told[0].digest.startswith("sizes:")
    assert told[0].digest != told[2].digest


def test_optimizer_and_schedule_of_another_run_are_taken_when_they_are_named(
    saved_run: SavedRun, root: str
) -> None:
    load = weights(saved_run.root / "step-12", parts=("lr_scheduler", "optimizer"))
    for rank, outcome in enumerate(_start(root, load, steps=1)):
        assert same_tensors(outcome.loaded, saved_run.ranks[rank].state)
        assert set(outcome.report.as_initialised) == {"rng", "dataloader"}
        assert outcome.samples[1] == [rank, rank + 2]
    rates = run(_learning_rates, f"{root} 1", load)
    assert rates == [[pytest.approx(1e-2 * 0.99**12)] * 2] * 2  # of step 13, not of the first


def _learning_rates(root: str, load: LoadConfig) -> list[float]:
    """Of the optimizer, and of the schedule, which must have been loaded after it."""
    trainer = make_trainer(root, NEVER)
    trainer.checkpoints.load(config=load)
    trainer.checkpoints.close()
    return [trainer.optimizer.param_groups[0]["lr"], *trainer.schedule.get_last_lr()]


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"max_shard_size": "10KB"}),
    ],
    ids=["float32", "bfloat16", "sharded"],
)
def test_a_hugging_face_model_says_the_same_once_it_is_loaded(
    root: str, tmp_path: Path, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    folder = tmp_path / "hf"
    expected = hf_base(folder, dtype=dtype, **how)
    assert len(list(folder.glob("*.safetensors"))) > 1 or not how
    for outcome in _start(root, weights(folder, format="hf")):
        model = decoder_of(outcome.loaded)
        assert {value.dtype for value in outcome.loaded.values()} == {torch.float32}
        assert torch.equal(model.tok_embeddings.weight, expected.model.embed_tokens.weight.float())
        assert same_logits(model, expected)
        assert outcome.report.sources == (f"base from {folder}",)


def test_a_hugging_face_folder_without_a_config_is_read_by_the_runs_own(
    root: str, tmp_path: Path
) -> None:
    expected = hf_base(tmp_path / "hf")
    (tmp_path / "hf/config.json").unlink()
    manager, model = open_manager(root)
    manager.load(config=weights(tmp_path / "hf", format="hf"))
    manager.close()
    assert same_logits(model, expected)


def test_a_folder_that_torch_saved_itself_is_read(root: str, tmp_path: Path) -> None:
    values = foreign_dcp(tmp_path / "theirs")
    for outcome in _start(root, weights(tmp_path / "theirs")):
        assert same_tensors(outcome.loaded, values)


def test_a_relative_path_is_one_of_this_folder(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    values = foreign_dcp(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    manager, model = open_manager(root)
    manager.load(config=weights("theirs"))
    manager.close()
    assert same_tensors(dict(model.state_dict()), values)


def test_weights_elsewhere_are_not_looked_at_by_a_run_that_has_steps(
    saved_run: SavedRun, root: str
) -> None:
    saved_run.copy(Path(root))
    for rank, outcome in enumerate(_start(root, weights("/nowhere", format="hf"), steps=12)):
        assert outcome.report.step == 12
        assert same_tensors(outcome.loaded, saved_run.ranks[rank].state)


# ---- a base and an adapter ----


def test_a_base_and_a_peft_adapter_say_what_peft_says_and_a_restart_goes_on(
    root: str, tmp_path: Path
) -> None:
    expected = peft_adapter(tmp_path / "adapter", hf_base(tmp_path / "base"))
    load = with_adapter(tmp_path / "base", tmp_path / "adapter")
    first = _start(root, load, steps=2, converters=LORA)
    for outcome in first:
        assert same_logits(decoder_of(outcome.loaded, LORA), expected)
        assert outcome.report.sources == (
            f"base from {tmp_path}/base",
            f"lora from {tmp_path}/adapter",
        )
    shutil.rmtree(tmp_path / "base")  # a step that holds everything needs it no more
    for before, outcome in zip(first, _start(root, load, steps=2, converters=LORA), strict=True):
        assert outcome.report.step == 2
        assert same_tensors(outcome.loaded, before.state)
        assert not same_logits(decoder_of(outcome.loaded, LORA), expected)


def test_a_converter_without_a_source_starts_as_it_is_made(root: str, tmp_path: Path) -> None:
    expected = hf_base(tmp_path / "base")
    load = weights(tmp_path / "base", format="hf")
    converters = {**LORA, "ema": {"decay": 0.9}}
    for outcome in _start(root, load, converters=converters):
        assert outcome.report.as_initialised[:2] == ("ema", "lora")
        model = decoder_of(outcome.loaded, converters)
        assert same_logits(model, expected)
        # averages of the weights that were loaded, not of those the model was made with
        for name, value in model.state_dict().items():
            if name.startswith("ema.layers"):
                assert torch.equal(value, outcome.loaded[name.removeprefix("ema.")])


# ---- a seed ----


def _save_seed(root: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(42)
    trainer = make_trainer(root, NEVER)
    trainer.checkpoints.save_seed()
    trainer.checkpoints.close()
    return {key: value.full_tensor() for key, value in trainer.model.state_dict().items()}


def test_runs_of_another_size_start_from_one_seed_and_are_the_same(
    root: str, tmp_path: Path
) -> None:
    [seeded] = run(_save_seed, root, num_ranks=1)
    manifest = open_catalog(root).manifest(0)
    assert (manifest.holds, manifest.world_size) == ("model", 1)
    assert {tensor.name for tensor in manifest.tensors} == set(seeded)
    shutil.copytree(root, tmp_path / "twin")
    runs = [
        _start(r, LoadConfig(), steps=3, seed=s) for r, s in ((root, 1), (tmp_path / "twin", 2))
    ]
    for outcome in (outcome for ranks in runs for outcome in ranks):
        assert (outcome.report.step, outcome.report.reason) == (0, "seed checkpoint")
        assert same_tensors(outcome.loaded, seeded)
        assert set(outcome.report.as_initialised) == PARTS
        assert sorted(outcome.losses) == [1, 2, 3]
    assert runs[0][0].losses == runs[1][0].losses
    assert _start(root, LoadConfig(), steps=3)[0].report.step == 3  # a run's own step comes first


def test_the_adapters_format_on_disk_is_what_peft_calls_it(tmp_path: Path) -> None:
    """Else the tests above would have compared nothing of PEFT's."""
    peft_adapter(tmp_path / "adapter", hf_base(tmp_path / "base"))
    names = set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert len(names) == 2 * 4 * SIZES.num_layers
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
