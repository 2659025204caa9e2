"""From a manifest's words to converters and back."""

import json

import pytest

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.manifest import ConverterEntry
from ray_ckpt.tensors.converters import CONVERTERS, entries_of, make_converters
from ray_ckpt.tensors.converters.order import ORDER
from tests.tensors.converters.examples import EXAMPLES

LORA = ConverterEntry(name="lora", options={"rank": 2, "alpha": 4, "targets": ["*.wq"]})
EMA = ConverterEntry(name="ema", options={"decay": 0.9})


def test_the_table_lists_converters_in_the_order_they_may_be_applied() -> None:
    assert tuple(CONVERTERS) == ORDER


def test_every_converter_has_an_example() -> None:
    assert {name for entries in EXAMPLES.values() for name in entries} == set(CONVERTERS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_options_survive_json_and_make_equal_converters(example: str) -> None:
    entries = [ConverterEntry(name=n, options=o) for n, o in EXAMPLES[example].items()]
    converters = make_converters(entries, {})
    text = json.dumps([{"name": e.name, "options": e.options} for e in entries_of(converters)])
    again = make_converters([ConverterEntry(**entry) for entry in json.loads(text)], {})
    assert again == converters
    assert [converter.name for converter in again] == list(EXAMPLES[example])


def test_every_option_can_be_given_and_is_told() -> None:
    (lora,) = make_converters([LORA], {"lora": "peft"})
    assert lora.options() == {
        "rank": 2,
        "alpha": 4,
        "targets": ["*.wq"],
        "saves": "everything",
        "base_model": None,
    }
    assert getattr(lora, "flavor", None) == "peft"


def test_an_unknown_converter_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'loro'[\s\S]*lora, ema"):
        make_converters([ConverterEntry(name="loro")], {})


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    entry = ConverterEntry(name="ema", options={"decay": 0.9, "warmup": 3})
    with pytest.raises(ConfigError, match=r"warmup[\s\S]*decay, dtype$"):
        make_converters([entry], {})


def test_an_option_that_is_lacking_is_named() -> None:
    with pytest.raises(ConfigError, match="decay"):
        make_converters([ConverterEntry(name="ema")], {})


def test_an_unknown_flavor_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"ema\.flavor[\s\S]*averaged, raw"):
        make_converters([EMA], {"ema": "mean"})


def test_a_flavor_for_a_converter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora, which did not change[\s\S]*its converters: ema"):
        make_converters([EMA], {"lora": "peft"})
