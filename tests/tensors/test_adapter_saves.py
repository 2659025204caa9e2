"""Steps that hold an adapter alone: small, exact, and never loaded over another base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ray_ckpt.core.errors import ConfigError, IntegrityError
from ray_ckpt.core.loading import FromSources, LoadConfig, Source
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from tests.tensors.bases import (
    ADAPTER_SAVES,
    decoder_of,
    hf_base,
    peft_adapter,
    same_logits,
    weights,
    with_adapter,
)
from tests.tensors.ranks import run
from tests.tensors.tiny import (
    SIZES,
    Outcome,
    Setup,
    error_of,
    full_state,
    make_trainer,
    same_tensors,
    train,
)

SAVE = SaveConfig(every_steps=3, mode="async", when_busy="wait")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Hugging Face base model."""
    hf_base(tmp_path / "Tiny-Base")
    return tmp_path / "Tiny-Base"


def _train(root: str, last_step: int, load: LoadConfig, seed: int = 0) -> list[Outcome]:
    setup = Setup(dropout=0.1, converters=ADAPTER_SAVES, load=load)
    return run(train, root, last_step, SAVE, seed, SIZES, setup)


def _manifest(root: str, step: int) -> Manifest:
    return open_catalog(root).manifest(step)


def test_a_step_holds_the_adapter_alone_and_names_its_base(root: str, base: Path) -> None:
    outcome = _train(root, 3, weights(base, format="hf"))[0]
    manifest = _manifest(root, 3)
    assert manifest.model is not None
    adapter = {key for key in outcome.state if ".lora_" in key and ":" not in key}
    assert set(manifest.model.keys) == adapter
    own = {t.name for t in manifest.tensors if not t.name.startswith(("optimizer.", "rng."))}
    assert own == adapter
    [needed] = manifest.needs
    assert (needed.name, needed.format, needed.owners) == ("Tiny-Base", "hf", ("base",))
    assert str(base.parent) not in manifest.to_json().decode()


def test_a_restart_over_the_same_base_is_bit_identical(
    root: str, base: Path, tmp_path: Path
) -> None:
    load = weights(base, format="hf")
    straight = _train(f"{root} straight", 6, load)
    first = _train(root, 3, load)
    shutil.copytree(base, tmp_path / "moved" / "elsewhere")
    second = _train(root, 6, weights(tmp_path / "moved/elsewhere", format="hf"), seed=1)
    for whole, before, after in zip(straight, first, second, strict=True):
        assert after.report.step == 3
        assert same_tensors(after.loaded, before.state)
        assert {**before.losses, **after.losses} == whole.losses
        assert same_tensors(after.state, whole.state)
    assert _manifest(root, 6).needs[0].digest == _manifest(root, 3).needs[0].digest


def test_a_restart_goes_on_with_the_trained_adapter_not_with_the_one_it_began_with(
    root: str, base: Path, tmp_path: Path
) -> None:
    expected = peft_adapter(tmp_path / "adapter", hf_base(tmp_path / "again"))
    load = with_adapter(base, tmp_path / "adapter")
    first = _train(root, 3, load)
    assert same_logits(decoder_of(first[0].loaded, ADAPTER_SAVES), expected)
    assert [needed.owners for needed in _manifest(root, 3).needs] == [("base",)]
    shutil.rmtree(tmp_path / "adapter")
    second = _train(root, 6, load, seed=1)
    for before, after in zip(first, second, strict=True):
        assert after.report.step == 3
        assert same_tensors(after.loaded, before.state)


def test_a_trained_adapter_begins_another_run(root: str, base: Path, tmp_path: Path) -> None:
    first = _train(root, 3, weights(base, format="hf"))
    load = with_adapter(base, f"{root}/step-3", "dcp")
    for before, after in zip(first, _train(str(tmp_path / "two"), 3, load), strict=True):
        assert after.report.step == 0
        model = {key: value for key, value in before.state.items() if ":" not in key}
        assert same_tensors(after.loaded, model)


def test_a_base_in_native_format_is_named_too(root: str, base: Path, tmp_path: Path) -> None:
    """One folder with base and adapter: a restart takes the base from it, not the adapter."""
    plain = Setup(converters={"lora": {**ADAPTER_SAVES["lora"], "saves": "everything"}})
    run(train, str(tmp_path / "whole"), 3, SAVE, 0, SIZES, plain)
    source = Source(path=f"{tmp_path}/whole/step-3", owners=("base", "lora"))
    load = LoadConfig(start=FromSources(sources=(source,)))
    first = _train(root, 3, load)
    assert [(n.name, n.format, n.owners) for n in _manifest(root, 3).needs] == [
        ("step-3", "dcp", ("base",))
    ]
    for before, after in zip(first, _train(root, 3, load, seed=1), strict=True):
        assert after.report.step == 3
        assert same_tensors(after.loaded, before.state)


def _refused(root: str, load: LoadConfig, converters: Any) -> tuple[Any, bool]:
    trainer = make_trainer(root, SAVE, setup=Setup(converters=converters))
    before = full_state(trainer)
    error = error_of(lambda: trainer.checkpoints.load(config=load))
    trainer.checkpoints.close()
    return error, same_tensors(full_state(trainer), before)


def test_no_base_or_another_one_is_refused_and_nothing_changes(
    root: str, base: Path, tmp_path: Path
) -> None:
    _train(root, 3, weights(base, format="hf"))
    for error, is_unchanged in run(_refused, root, LoadConfig(), ADAPTER_SAVES):
        assert isinstance(error, ConfigError)
        assert "Tiny-Base (hf)" in error.what
        assert "FromWeights(path='.../Tiny-Base', format='hf')" in error.do
        assert is_unchanged
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3  # of the same shapes: a fine-tuned base
    other = shutil.copytree(base, tmp_path / "Other-Base")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for error, is_unchanged in run(_refused, root, weights(other, format="hf"), ADAPTER_SAVES):
        assert isinstance(error, IntegrityError)
        assert "this is not the Tiny-Base (base, hf) that the step was trained on" in error.what
        assert error.where == str(other)
        assert is_unchanged


def test_saves_that_nobody_could_load_are_refused_before_training(root: str) -> None:
    for error, is_unchanged in run(_refused, root, LoadConfig(), ADAPTER_SAVES, num_ranks=1):
        assert isinstance(error, ConfigError)
        assert "the base comes from no folder of its own" in error.what
        assert is_unchanged
