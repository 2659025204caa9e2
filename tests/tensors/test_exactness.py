"""A run that was stopped and resumed is the run that was not: every bit, every sample."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jobs.assets import make_assets
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.conftest import SavedRun
from tests.tensors.ranks import run
from tests.tensors.tiny import (
    BATCH_SIZE,
    PLAIN,
    SIZES,
    Outcome,
    Setup,
    make_trainer,
    same_tensors,
    train,
)

STOP, END = 50, 100
CONVERTERS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "lora": {"lora": {"rank": 2, "alpha": 4, "targets": ["layers.*.attention.w[qkvo]"]}},
    "ema": {"ema": {"decay": 0.9}},
    "float8": {"float8": {"targets": ["layers.*"], "emulate": True}},
    "qat": {"qat": {"weights": "int4", "group_size": 8, "targets": ["layers.*"]}},
}
NEVER = SaveConfig(every_steps=None)


def _setup(converters: str) -> Setup:
    return Setup(dropout=0.1, converters=CONVERTERS[converters])


@functools.cache
def _straight(converters: str) -> list[Outcome]:
    """Both ranks of a run that nobody stopped."""
    with tempfile.TemporaryDirectory() as root:
        return run(train, f"{root}/run", END, NEVER, 0, SIZES, _setup(converters))


def _modes_and_converters() -> list[Any]:
    """Every mode without converters; converters where their tensors are copied or travel."""
    quick = [("process", "none"), ("async", "lora")]
    slow = [
        ("sync", "none"),
        ("async", "none"),
        ("process", "lora"),
        ("sync", "ema"),
        ("process", "ema"),
        ("async", "float8"),
        ("process", "float8"),
        ("process", "qat"),
    ]
    return [*quick, *(pytest.param(*one, marks=pytest.mark.slow) for one in slow)]


@pytest.mark.parametrize(("mode", "converters"), _modes_and_converters())
def test_a_run_that_was_stopped_is_bit_identical_to_one_that_was_not(
    root: str, mode: Mode, converters: str
) -> None:
    save, setup = SaveConfig(every_steps=STOP, mode=mode, when_busy="wait"), _setup(converters)
    first = run(train, root, STOP, save, 0, SIZES, setup)
    second = run(train, root, END, save, 1, SIZES, setup)  # the other seed must not matter
    for straight, before, after in zip(_straight(converters), first, second, strict=True):
        assert after.report.step == STOP
        assert {**before.losses, **after.losses} == straight.losses
        assert {**before.draws, **after.draws} == straight.draws
        assert {**before.samples, **after.samples} == straight.samples
        assert same_tensors(after.loaded, before.state)
        assert same_tensors(after.state, straight.state)


def test_dropout_converters_and_seed_make_a_difference(root: str) -> None:
    """Else the comparison above would prove nothing."""
    first, second = _straight("none")
    plain = run(train, root, 2, NEVER)[0]
    other_seed = run(train, f"{root} 1", 2, NEVER, 1, SIZES, _setup("none"))[0]
    later = {first.losses[2], _straight("lora")[0].losses[2], plain.losses[2], other_seed.losses[2]}
    assert len(later) == 4
    assert first.draws != second.draws  # each rank has generators of its own


@pytest.mark.slow
def test_a_run_goes_on_with_every_sample_once_on_any_number_of_ranks(root: str) -> None:
    """Scenario 23: another world size at each resume; what cannot be resharded is told."""
    save = SaveConfig(every_steps=5, mode="sync")
    setup = _setup("ema")
    before: Outcome | None = None
    for stage, num_ranks in enumerate((2, 1, 2, 4)):
        steps = range(5 * stage + 1, 5 * stage + 6)
        ranks = run(train, root, steps[-1], save, stage, SIZES, setup, num_ranks=num_ranks)
        for rank, outcome in enumerate(ranks):
            assert outcome.report.step == steps[0] - 1
            if before is not None:
                assert same_tensors(outcome.loaded, before.state)
            for step in steps:
                end = step * BATCH_SIZE
                assert outcome.samples[step] == list(range(end - 4 + rank, end, num_ranks))
        given = sorted(s for o in ranks for samples in o.samples.values() for s in samples)
        assert given == list(range(BATCH_SIZE * (steps[0] - 1), BATCH_SIZE * steps[-1]))
        newcomers = [o for o in ranks if any("start afresh" in line for line in o.log)]
        assert len(newcomers) == {0: 0, 1: 0, 2: 1, 3: 2}[stage]
        before = ranks[0]


def test_training_on_another_number_of_ranks_goes_on_as_it_would_have(
    saved_run: SavedRun, saved_root: Path
) -> None:
    """Scenario 23: another world size."""
    outcome = run(train, str(saved_root), 15, NEVER, num_ranks=1)[0]
    both = run(train, str(saved_run.copy(saved_root.parent / "two")), 15, NEVER)[0]
    assert outcome.report.step == 12
    assert outcome.losses == pytest.approx(both.losses, rel=1e-5)


def _save_elsewhere(root: str, other: str, mode: Mode) -> None:
    """The newest step of `root`, loaded and saved in another root."""
    trainer = make_trainer(root, NEVER, setup=PLAIN)
    step = trainer.checkpoints.load().step
    state = TrainingState(
        model=ModelWrapper(trainer.model),
        optimizer=trainer.optimizer,
        lr_scheduler=trainer.schedule,
        extra={"dataloader": trainer.windows},
    )
    config = SaveConfig(mode=mode, when_busy="wait")
    copies = CheckpointManager(other, state, config=config, assets=make_assets(SIZES))
    copies.save(step, last_step=True)
    copies.close()
    trainer.checkpoints.close()


@pytest.mark.parametrize("mode", ["sync", "async", "process"])
def test_what_was_loaded_is_saved_again_as_the_very_same_files(
    saved_run: SavedRun, saved_root: Path, tmp_path: Path, mode: Mode
) -> None:
    run(_save_elsewhere, str(saved_root), str(tmp_path / "copy"), mode)
    original = saved_run.catalog.manifest(12)
    copy = open_catalog(str(tmp_path / "copy")).manifest(12)
    assert {e.path: e.digest for e in copy.files} == {e.path: e.digest for e in original.files}
    assert copy.content_id == original.content_id
