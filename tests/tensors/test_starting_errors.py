"""What a run cannot begin from: told by name before a tensor is read, and nothing changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder
from ray_ckpt.core.errors import (
    ConfigError,
    IntegrityError,
    RayCkptError,
    StateDictError,
)
from ray_ckpt.core.loading import FromSources, LoadConfig, Source
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.bases import (
    LORA,
    foreign_dcp,
    open_manager,
    refused,
    save_with_torch,
    weights,
)
from tests.tensors.conftest import SavedRun
from tests.tensors.kept import save, values_of
from tests.tensors.ranks import run
from tests.tensors.test_exactness import NEVER
from tests.tensors.tiny import SIZES, error_of, full_state, make_trainer, same_tensors


def _dcp(folder: Path, values: dict[str, Tensor]) -> Path:
    """A foreign folder with these tensors, of which the index alone is left."""
    save_with_torch(values, folder)
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    return folder


def _weights() -> dict[str, Tensor]:
    return {key: torch.randn_like(v) for key, v in Decoder(SIZES, VOCAB_SIZE).state_dict().items()}


# ---- keys and shapes, from the index alone ----


def test_every_key_that_is_lacking_or_brought_in_vain_is_named(root: str, tmp_path: Path) -> None:
    """Scenario 24: the model's code has changed."""
    values = _weights()
    values["layers.0.attention.w_q.weight"] = values.pop("layers.0.attention.wq.weight")
    values["layers.7.ffn_norm.weight"] = values.pop("layers.1.ffn_norm.weight")
    error = refused(root, weights(_dcp(tmp_path / "a", values)))
    assert isinstance(error, StateDictError)
    lacks, _, brings = error.what.partition(" and brings ")
    assert "layers.0.attention.wq.weight, layers.1.ffn_norm.weight" in lacks
    assert "layers.0.attention.w_q.weight, layers.7.ffn_norm.weight" in brings
    assert error.where == str(tmp_path / "a")


def test_a_shape_that_differs_is_told_from_both_sides(root: str, tmp_path: Path) -> None:
    values = _weights()
    values["norm.weight"] = torch.ones(17)
    values["layers.0.attention.wo.weight"] = torch.ones(16, 12)
    error = refused(root, weights(_dcp(tmp_path / "a", values)))
    assert isinstance(error, StateDictError)
    assert "norm.weight is [16] here and [17] there" in error.what
    assert "layers.0.attention.wo.weight is [16, 16] here and [16, 12] there" in error.what


def test_a_second_source_that_does_not_fit_leaves_the_first_unread(
    root: str, tmp_path: Path
) -> None:
    foreign_dcp(tmp_path / "base")
    manager, _ = open_manager(tmp_path / "lora", converters=LORA)
    manager.save_seed()
    manager.close()
    step = str(tmp_path / "lora/step-0")
    sources = (Source(path=str(tmp_path / "base")), Source(path=step, owners=("lora",)))
    error = refused(root, LoadConfig(start=FromSources(sources=sources)), converters=LORA)
    assert error.where == step
    assert "does not fit the lora of the model" in error.what
    assert "brings 21 unexpected ones" in error.what
    wider = {"lora": {**LORA["lora"], "rank": 3}}
    small = _dcp(
        tmp_path / "small",
        {
            f"layers.{n}.attention.{w}.lora_{half}.weight": torch.ones(shape)
            for n in range(2)
            for w, rows in (("wq", 16), ("wk", 8), ("wv", 8), ("wo", 16))
            for half, shape in (("a", (2, 16)), ("b", (rows, 2)))
        },
    )
    sources = (Source(path=str(tmp_path / "base")), Source(path=str(small), owners=("lora",)))
    error = refused(root, LoadConfig(start=FromSources(sources=sources)), converters=wider)
    assert "layers.0.attention.wk.lora_b.weight is [8, 3] here and [8, 2] there" in error.what


def test_parts_that_a_source_does_not_hold_arerefused(root: str, tmp_path: Path) -> None:
    error = refused(root, weights(_dcp(tmp_path / "a", _weights()), parts=("optimizer",)))
    assert isinstance(error, StateDictError)
    assert error.what == "the source holds nothing of optimizer"
    assert error.do.endswith("take optimizer out of the parts in load.start")


def test_more_than_one_converter_and_a_step_that_has_only_one(tmp_path: Path) -> None:
    manager, _ = open_manager(tmp_path / "a", converters=LORA)
    manager.save(1)
    manager.close()
    averaged = {**LORA, "ema": {"decay": 0.9}}
    error = refused(tmp_path / "a", LoadConfig(), converters=averaged)
    assert isinstance(error, StateDictError)
    assert "ema.num_updates" in error.what
    assert "the converters it was saved from" in error.do
    assert f"FromWeights(path='{tmp_path}/a/step-1')" in error.do
    error = refused(tmp_path / "a", LoadConfig())  # and one that the model does not have
    assert "unexpected ones (layers.0.attention.wk.lora_a.weight" in error.what


def test_what_else_the_folder_holds_can_be_asked_for(root: str, tmp_path: Path) -> None:
    manager, model = open_manager(tmp_path / "a", converters=LORA)
    manager.save_seed()
    manager.close()
    step = f"{tmp_path}/a/step-0"
    error = refused(root, weights(step), converters=LORA)
    assert "owners=('base', 'lora')" in error.do
    manager, other = open_manager(root, converters=LORA)
    source = Source(path=step, owners=("base", "lora"))
    manager.load(config=LoadConfig(start=FromSources(sources=(source,))))
    manager.close()
    assert same_tensors(dict(other.state_dict()), dict(model.state_dict()))


# ---- who supplies what ----


@pytest.mark.parametrize(
    ("owners", "words"),
    [
        ([("base",), ("lora", "base")], "more than one source supplies base"),
        ([("lora",)], "no source supplies the base's weights"),
        ([("base",), ("laura",)], "laura, and no converter is called so"),
    ],
)
def test_owners_are_supplied_once_each(
    root: str, tmp_path: Path, owners: list[tuple[str, ...]], words: str
) -> None:
    path = str(_dcp(tmp_path / "a", _weights()))
    sources = tuple(Source(path=path, owners=own) for own in owners)
    if "more than one" in words:
        with pytest.raises(ConfigError, match=words):
            FromSources(sources=sources)
        return
    error = refused(root, LoadConfig(start=FromSources(sources=sources)), converters=LORA)
    assert isinstance(error, ConfigError)
    assert words in error.what


@pytest.mark.parametrize(
    ("load", "field"),
    [
        (LoadConfig(exclude=("data_loader",)), "load.exclude"),
        (weights("/a", parts=("optimiser",)), "load.start"),
    ],
)
def test_a_part_that_does_not_exist_isrefused(root: str, load: LoadConfig, field: str) -> None:
    error = refused(root, load)
    assert isinstance(error, ConfigError)
    assert error.where == field
    assert {"optimizer", "rng", "train_state"} <= set(error.do.partition(": ")[2].split(", "))


def test_a_step_is_loaded_without_the_parts_that_a_run_does_not_have(tmp_path: Path) -> None:
    """What the refusal says to type is what helps."""
    model = nn.Linear(2, 2)
    save(tmp_path, model)
    for extra, config in enumerate((None, LoadConfig(exclude=("optimizer", "lr_scheduler")))):
        other = nn.Linear(2, 2)
        manager = CheckpointManager(str(tmp_path), TrainingState(model=ModelWrapper(other)))
        if not extra:
            with pytest.raises(StateDictError, match="holds optimizer") as caught:
                manager.load()
            assert "LoadConfig(exclude=('optimizer', 'lr_scheduler'))" in caught.value.do
        else:
            assert manager.load(config=config).as_initialised == ()
            assert same_tensors(values_of(other), values_of(model))
        manager.close()


# ---- on all ranks ----


def _refused_on_a_rank(root: str, load: LoadConfig) -> tuple[RayCkptError | None, bool]:
    trainer = make_trainer(root, NEVER)
    before = full_state(trainer)
    error = error_of(lambda: trainer.checkpoints.load(config=load))
    is_unchanged = same_tensors(full_state(trainer), before) and not trainer.optimizer.state
    trainer.checkpoints.close()
    return error, is_unchanged


def test_every_rank_hears_the_same_and_no_optimizer_was_touched(
    saved_run: SavedRun, root: str, tmp_path: Path
) -> None:
    values = _weights()
    values["stranger"] = values.pop("norm.weight")
    outcomes = run(_refused_on_a_rank, root, weights(_dcp(tmp_path / "a", values)))
    assert len({str(error) for error, _ in outcomes}) == 1
    parts = weights(saved_run.root / "step-12", parts=("optimizer", "lr_scheduler", "rng"))
    source = saved_run.copy(tmp_path / "theirs")
    (source / "step-12/__1_0.distcp").unlink()
    damaged = weights(source / "step-12", parts=parts.start.sources[0].parts)
    outcomes += run(_refused_on_a_rank, root, damaged)
    for error, is_unchanged in outcomes:
        assert isinstance(error, StateDictError | IntegrityError)
        assert is_unchanged
