"""What may be written down as a policy, and what is refused with the field and the cure."""

from dataclasses import asdict
from pathlib import Path

import pytest

from ray_ckpt.core.config import build
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.policy import (
    ExportPolicy,
    KeepConfig,
    LifecyclePolicy,
    PublishPolicy,
    VerifyPolicy,
    policy_of_toml,
)
from ray_ckpt.core.retention import KeepBest, KeepEvery, KeepLatest, KeepRecent, KeepSteps

EVERYTHING = """
[keep]
latest = 3
every_steps = 1000
best = 2
best_metric = "acc"
best_order = "max"
max_age_s = 86400
steps = [100, 200]
max_bytes = 2_000_000_000_000

[verify]
scrub_every_s = 604800

[[export]]
name = "hf"
last_step = false
best = 1
metric = "acc"
order = "max"
steps = [5]

[[publish]]
export = "hf"
to = "s3://bucket/models"
keep.latest = 5
when_behind = "newest"
promote = "best"
promote_by = "best"
metric = "acc"
order = "max"
"""


def test_every_field_is_read_and_survives_being_written_as_json() -> None:
    policy = policy_of_toml(EVERYTHING, where="policy.toml")
    assert policy == LifecyclePolicy(
        keep=KeepConfig(
            latest=3,
            every_steps=1000,
            best=2,
            best_metric="acc",
            best_order="max",
            max_age_s=86400.0,
            steps=(100, 200),
            max_bytes=2_000_000_000_000,
        ),
        verify=VerifyPolicy(scrub_every_s=604800.0),
        export=(
            ExportPolicy(name="hf", last_step=False, best=1, metric="acc", order="max", steps=(5,)),
        ),
        publish=(
            PublishPolicy(
                export="hf",
                to="s3://bucket/models",
                keep=KeepCopies(latest=5),
                when_behind="newest",
                promote="best",
                promote_by="best",
                metric="acc",
                order="max",
            ),
        ),
    )
    assert build(LifecyclePolicy, asdict(policy), where="run.json") == policy


def test_a_jobs_file_holds_its_policy_in_the_lifecycle_section() -> None:
    text = "root = '/runs/a'\n[save]\nevery_steps = 5\n[lifecycle.keep]\nlatest = 3\n"
    assert policy_of_toml(text, where="job.toml").keep == KeepConfig(latest=3)


def test_the_policy_in_the_readme_is_one() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    policy = policy_of_toml(text.partition("```toml\n")[2].partition("```")[0], where="README.md")
    assert policy.publish[0].keep == KeepCopies(latest=5)
    assert len(policy.keep.policies(now=0.0)) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep = 3", "keep|expected KeepConfig, got int 3"),
        ("lifecycle = 3", "job.toml: lifecycle|expected a section"),
        ("[lifecycle.keep]\nlates = 3", "job.toml: lifecycle: keep|did you mean 'latest'?"),
        ("[keep", "job.toml|not valid TOML"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy_of_toml(text, where="job.toml")
    for words in expected.split("|"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config_type", "values", "field", "expected"),
    [
        (KeepConfig, {"latest": 1}, "latest", "at least 2, got 1"),
        (KeepConfig, {"every_steps": 0}, "every_steps", "at least 1, got 0"),
        (KeepConfig, {"best": 0}, "best", "at least 1, got 0"),
        (KeepConfig, {"max_age_s": 0}, "max_age_s", "at least 1, got 0"),
        (KeepConfig, {"max_bytes": 0}, "max_bytes", "at least 1, got 0"),
        (KeepConfig, {"trash_grace_s": -1}, "trash_grace_s", "at least 0, got -1"),
        (KeepConfig, {"steps": [5, -1]}, "keep.steps", "at least 0, got -1"),
        (KeepConfig, {"best_metric": "acc"}, "keep.best_metric", "best does not say how many"),
        (KeepConfig, {"best_order": "max"}, "keep.best_order", "best does not say how many"),
        (KeepCopies, {}, "publish.keep", "no copy is named"),
        (KeepCopies, {"latest": 0}, "latest", "at least 1, got 0"),
        (VerifyPolicy, {"scrub_every_s": 0.5}, "scrub_every_s", "at least 1, got 0.5"),
        (ExportPolicy, {"name": "a", "every_steps": 0}, "every_steps", "at least 1"),
        (ExportPolicy, {"name": "a", "best": 0}, "best", "at least 1"),
        (ExportPolicy, {"name": "a", "metric": "acc"}, "export.metric", "how many to take"),
        (ExportPolicy, {"name": "a", "order": "max"}, "export.order", "how many to take"),
        (ExportPolicy, {"name": "a", "steps": [-5]}, "export.steps", "at least 0, got -5"),
        (ExportPolicy, {"name": "a", "last_step": False}, "export.last_step", "names no step"),
        (ExportPolicy, {"name": "step-5"}, "export.name", "cannot be part of a folder name"),
        (
            PublishPolicy,
            {"export": "a", "to": "hf://org/repo", "keep": {"latest": 3}},
            "publish.keep",
            "a tag on the Hub is history",
        ),
        (
            PublishPolicy,
            {"export": "a", "to": "/c", "promote": "step-5"},
            "publish.promote",
            "cannot be part of a folder name",
        ),
        (
            PublishPolicy,
            {"export": "a", "to": "/c", "promote_by": "best"},
            "publish.promote_by",
            "promote names none",
        ),
        (
            PublishPolicy,
            {"export": "a", "to": "/c", "promote": "latest", "metric": "acc"},
            "publish.metric",
            "metric ranks copies, but newest ones are promoted",
        ),
        (
            PublishPolicy,
            {"export": "a", "to": "/c", "order": "max"},
            "publish.order",
            "order ranks copies",
        ),
        (PublishPolicy, {"export": "a", "to": "/c", "when_behind": "new"}, None, "none of 'all'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_field(
    config_type: type, values: dict[str, object], field: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build(config_type, values, where="here")
    assert caught.value.where == (field or "here: when_behind")


def test_publishing_an_export_that_nobody_makes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no .* makes: hf-32") as caught:
        LifecyclePolicy(
            export=(ExportPolicy(name="hf-bf16"),),
            publish=(PublishPolicy(export="hf-32", to="/copies"),),
        )
    assert caught.value.do == "use one of: hf-bf16"


def test_two_exports_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="same name"):
        LifecyclePolicy(export=(ExportPolicy(name="a"), ExportPolicy(name="a", dtype="float32")))


def test_two_copies_of_one_export_to_one_place_are_refused() -> None:
    copy = PublishPolicy(export="a", to="/copies")
    with pytest.raises(ConfigError, match="to one place"):
        LifecyclePolicy(export=(ExportPolicy(name="a"),), publish=(copy, copy))


def test_two_exports_that_move_one_tag_are_refused() -> None:
    exports = (ExportPolicy(name="a"), ExportPolicy(name="b"))

    def policy(first: str, second: str) -> LifecyclePolicy:
        copies = [
            PublishPolicy(export=name, to=to, promote="latest")
            for name, to in (("a", first), ("b", second))
        ]
        return LifecyclePolicy(export=exports, publish=tuple(copies))

    with pytest.raises(ConfigError, match="same tag"):
        policy("hf://org/repo", "hf://org/repo@branch")
    assert policy("/copies", "/copies").publish[0].promote == "latest"
    assert policy("hf://org/repo", "hf://org/other")


def test_what_is_kept_becomes_policies() -> None:
    assert KeepConfig().policies(now=0.0) == []
    assert KeepConfig(max_bytes=5).policies(now=0.0) == []
    keep = KeepConfig(
        latest=3,
        every_steps=1000,
        best=2,
        best_metric="acc",
        best_order="max",
        max_age_s=60,
        steps=(7,),
    )
    assert keep.policies(now=9.0) == [
        KeepLatest(3),
        KeepEvery(1000),
        KeepBest(2, "acc", "max"),
        KeepRecent(60, 9.0),
        KeepSteps((7,)),
    ]
    assert KeepCopies(latest=1, every_steps=5).policies() == [KeepLatest(1), KeepEvery(5)]
