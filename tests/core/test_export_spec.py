"""What was asked for is what a finished export says of itself."""

import pytest

from ray_ckpt.core.actions import Action
from ray_ckpt.core.due import spec_of
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.policy import ExportPolicy

USUAL = ExportSpec(name="hf")
UNUSUAL = ExportSpec(
    name="all",
    dtype="float16",
    flavors={"lora": "peft"},
    format="torch",
    max_shard_bytes=7,
    device="cuda",
    logits_within=0.02,
)


@pytest.mark.parametrize("spec", [USUAL, UNUSUAL], ids=lambda spec: spec.name)
def test_a_recipe_says_all_that_was_asked_for(spec: ExportSpec) -> None:
    assert ExportSpec.of_recipe(spec.recipe) == spec


def test_a_recipe_holds_only_what_is_unusual() -> None:
    assert USUAL.recipe == {"name": "hf", "dtype": "bfloat16"}


def test_what_shapes_an_export_makes_another_action() -> None:
    specs = [USUAL, ExportSpec(name="hf", format="torch"), ExportSpec(name="hf", device="cuda")]
    actions = [Action(kind=ActionKind.EXPORT, step=1, source_id="a", export=s) for s in specs]
    assert len({action.key for action in actions}) == 3
    assert [Action.from_document(action.to_document()) for action in actions] == actions


def test_the_export_alone_takes_a_gpu_and_not_what_comes_after() -> None:
    kinds = (ActionKind.EXPORT, ActionKind.PUBLISH)
    actions = [Action(kind=kind, step=1, source_id="a", export=UNUSUAL) for kind in kinds]
    assert [action.num_gpus for action in actions] == [1, 0]


def test_a_policy_asks_for_all_of_it() -> None:
    policy = ExportPolicy(
        name="all",
        dtype="float16",
        flavors={"lora": "peft"},
        format="torch",
        max_shard_bytes=7,
        device="cuda",
        logits_within=0.02,
    )
    assert spec_of(policy) == UNUSUAL


def test_logits_cannot_be_closer_than_the_same() -> None:
    with pytest.raises(ConfigError, match="logits_within must be at least 0"):
        ExportPolicy(name="hf", logits_within=-0.1)
