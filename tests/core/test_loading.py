"""How a run may be told to begin, and what is refused before anything is opened."""

import dataclasses

import pytest

from ray_ckpt.core.config import build
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import FromScratch, FromSources, FromWeights, LoadConfig, Source


def test_a_run_starts_from_scratch_unless_it_is_told_otherwise() -> None:
    assert LoadConfig().start == FromScratch()


def test_weights_are_one_source_for_the_base() -> None:
    start = FromWeights(path="/a/step-5", parts=("optimizer",))
    assert start.sources == (
        Source(path="/a/step-5", format="dcp", owners=("base",), parts=("optimizer",)),
    )


@pytest.mark.parametrize(
    "start",
    [
        FromScratch(),
        FromWeights(path="/a", format="hf"),
        FromSources(
            sources=(
                Source(path="/base", format="hf"),
                Source(path="/adapter", format="peft", owners=("lora",)),
            )
        ),
    ],
)
def test_a_config_survives_being_written_as_plain_values(
    start: FromScratch | FromWeights | FromSources,
) -> None:
    config = LoadConfig(start=start, exclude=("dataloader",))
    assert build(LoadConfig, dataclasses.asdict(config), where="worker") == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"exclude": ["model"]}, "the model cannot be excluded from loading"),
        ({"exclude": ["optimizer"]}, "lr_scheduler must be excluded when optimizer is"),
        (
            {"start": {"kind": "weights", "path": "/a", "parts": ["lr_scheduler"]}},
            "lr_scheduler cannot be taken without optimizer",
        ),
        ({"start": {"kind": "weights"}}, "'path' is missing"),
        ({"start": {"kind": "nothing"}}, "'scratch', 'weights', 'sources'"),
        (
            {"start": {"kind": "weights", "path": "/a", "format": "hf", "parts": ["optimizer"]}},
            "a hf folder holds no optimizer",
        ),
        (
            {"start": {"kind": "sources", "sources": [{"path": "/a"}, {"path": "/b"}]}},
            "more than one source supplies base",
        ),
        (
            {"start": {"kind": "sources", "sources": [{"path": "/a", "owners": []}]}},
            "a source must supply somebody's keys",
        ),
        ({"on_damage": "ignore"}, "'ignore' is none of 'fall back', 'raise'"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_value(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(LoadConfig, values, where="job.toml")
    assert words in str(caught.value)
