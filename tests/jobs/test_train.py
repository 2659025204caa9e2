"""What can be said about a training run in a file and on the command line."""

from dataclasses import asdict
from typing import Any

import pytest

from jobs.train import TrainConfig
from ray_ckpt.core.config import build, load_toml
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import FromScratch, FromSources, FromWeights, LoadConfig, Source
from ray_ckpt.core.saving import ModelOnly

FILE = """
root = "/runs/a"

[load]
exclude = ["dataloader"]
"""


def config(*overrides: str, text: str = FILE) -> TrainConfig:
    return load_toml(TrainConfig, text, where="test", overrides=overrides)


def test_a_run_starts_from_scratch_if_nothing_is_said() -> None:
    assert config().load == LoadConfig(start=FromScratch(), exclude=("dataloader",))


def test_a_run_starts_from_a_hugging_face_folder_by_three_words() -> None:
    words = ("load.start.kind=weights", "load.start.path=/models/base", "load.start.format=hf")
    expected = FromWeights(path="/models/base", format="hf")
    assert config(*words).load == LoadConfig(start=expected, exclude=("dataloader",))


def test_a_run_starts_from_several_folders() -> None:
    sources = """
    [load.start]
    kind = "sources"
    sources = [
        {path = "/models/base", format = "hf"},
        {path = "/models/adapter", format = "peft", owners = ["lora"]},
    ]
    """
    base, adapter = (
        Source(path="/models/base", format="hf"),
        Source(path="/models/adapter", format="peft", owners=("lora",)),
    )
    assert config(text=FILE + sources).load.start == FromSources(sources=(base, adapter))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("load.start.kind=wheights",), "kind is 'wheights'"),
        (("load.start.kind=weights",), "'path' is missing"),
        (("load.start.kind=weights", "load.start.path=/x", "load.start.format=gguf"), "gguf"),
        (("load.on_damage=ignore",), "'fall back'"),
        (("min_workers=3", "num_workers=2"), "more than num_workers"),
        (("min_workers=0",), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(*words)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_workers": 1, "worker_resources": {"CPU": 2, "special": 0.5}},
        {"load": {"start": {"kind": "weights", "path": "/x", "format": "hf"}}},
        {"save": {"last": {"kind": "model", "dtype": "bfloat16"}, "every_s": 600.0}},
    ],
)
def test_workers_get_the_very_config_of_the_driver(changes: dict[str, Any]) -> None:
    sent = build(TrainConfig, {"root": "/runs/a", **changes}, where="test")
    assert build(TrainConfig, asdict(sent), where="worker") == sent


def test_the_last_save_may_hold_the_model_alone() -> None:
    words = ("save.last.kind=model", "save.last.dtype=bfloat16")
    assert config(*words).save.last == ModelOnly(dtype="bfloat16")
