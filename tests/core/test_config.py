"""A configuration is built whole, or refused with the field and the cure."""

from dataclasses import dataclass, field

import pytest

from ray_ckpt.core.config import build, load_toml
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.saving import SaveConfig

TEXT = """
[save]
every_steps = 200

[lifecycle.keep]
latest = 3
best = 2

[[lifecycle.export]]
name = "hf-bf16"
every_steps = 1000

[[lifecycle.export]]
name = "hf-f32"
dtype = "float32"

[[lifecycle.publish]]
export = "hf-bf16"
to = "hf://org/repo"
required = false
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    save: SaveConfig = field(default_factory=SaveConfig)
    lifecycle: LifecyclePolicy = field(default_factory=LifecyclePolicy)
    name: str = "job"


def job(*overrides: str, text: str = TEXT) -> Job:
    return load_toml(Job, text, where="job.toml", overrides=overrides)


def test_sections_and_arrays_of_tables_become_nested_records() -> None:
    assert job() == Job(
        save=SaveConfig(every_steps=200),
        lifecycle=LifecyclePolicy(
            export=(
                ExportPolicy(name="hf-bf16", every_steps=1000),
                ExportPolicy(name="hf-f32", dtype="float32"),
            ),
            publish=(PublishPolicy(export="hf-bf16", to="hf://org/repo", required=False),),
            keep=KeepConfig(latest=3, best=2),
        ),
    )


def test_an_empty_text_gives_the_defaults() -> None:
    assert job(text="") == Job()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[save]\nevery_step = 5", ["unknown key 'every_step'", "did you mean 'every_steps'?"]),
        ("[save]\nzzz = 5", ["unknown key 'zzz'", "known: every_steps, every_s, first_step"]),
        ("[sav]\n", ["unknown key 'sav'", "did you mean 'save'?"]),
        ("[[lifecycle.export]]\nname='a'\ndtpye='x'", ["lifecycle: export[0]", "'dtype'"]),
        ("[[lifecycle.export]]\ndtype='float32'", ["'name' is missing", "add name = ..."]),
        ("[save", ["not valid TOML", "job.toml"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_cure(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        job(text=text)
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[save]\nevery_steps = '5'", "save: every_steps|expected int, got str '5'"),
        ("[save]\nevery_steps = 5.0", "save: every_steps|expected int, got float 5.0"),
        ("[save]\nevery_steps = true", "save: every_steps|expected int, got bool True"),
        ("[save]\ntimeout_s = true", "save: timeout_s|expected float, got bool True"),
        ("[save]\nfirst_step = 1", "save: first_step|expected bool, got int 1"),
        ("[save]\nmode = 'fast'", "save: mode|'fast' is none of 'sync', 'async'"),
        ("save = 5", "save|expected SaveConfig, got int 5"),
        ("[lifecycle.export]\nname = 'a'", "lifecycle: export|expected tuple, got dict"),
        ("[lifecycle]\nexport = ['a']", "export[0]|expected ExportPolicy, got str 'a'"),
        ("[lifecycle.keep]\nlatest = 'all'", "keep: latest|expected int, got str 'all'"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(text=text)
    for words in expected.split("|"):
        assert words in str(caught.value)


def test_a_whole_number_will_do_for_a_float() -> None:
    timeout_s = job(text="[save]\ntimeout_s = 5").save.timeout_s
    assert (timeout_s, type(timeout_s)) == (5.0, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("save.every_steps=7", Job(save=SaveConfig(every_steps=7))),
        ("save.mode=sync", Job(save=SaveConfig(mode="sync"))),
        ('save.mode="sync"', Job(save=SaveConfig(mode="sync"))),
        ("save.first_step=true", Job(save=SaveConfig(first_step=True))),
        ("name=llama-8b", Job(name="llama-8b")),
        ("name=a=b", Job(name="a=b")),
        ("name=", Job(name="")),
        ("lifecycle.keep.latest=4", Job(lifecycle=LifecyclePolicy(keep=KeepConfig(latest=4)))),
        (
            'lifecycle.export=[{name="hf"}]',
            Job(lifecycle=LifecyclePolicy(export=(ExportPolicy(name="hf"),))),
        ),
    ],
)
def test_an_override_needs_no_quotes_for_plain_words(override: str, expected: Job) -> None:
    assert job(override, text="") == expected


def test_the_last_override_wins_over_the_file_and_the_ones_before() -> None:
    assert job("save.every_steps=1", "save.every_steps=2").save.every_steps == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("save.every_steps", "is no override"),
        ("=5", "is no override"),
        ("save.every_steps.x=5", "'every_steps' is a value, not a section"),
        ("lifecycle.export.name=x", "'export' is a value, not a section"),
        ("save.every_stpes=5", "did you mean 'every_steps'?"),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(override)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("config_type", "values", "expected"),
    [
        (KeepConfig, {"latest": 1}, "latest must be at least 2, got 1"),
        (SaveConfig, {"every_steps": 0}, "every_steps must be at least 1, got 0"),
        (ExportPolicy, {"name": "../x"}, "cannot be part of a folder name"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    config_type: type, values: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(config_type, values, where="here")
