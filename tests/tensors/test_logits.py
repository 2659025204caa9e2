"""What training recorded of a prompt is what an export answers, or it is no export."""

import json
from pathlib import Path

import pytest
import torch

from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder
from ray_ckpt.core.errors import IntegrityError, OutOfMemoryError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors import exporting
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.logits import Reference
from tests.roots import make_root

IDS = torch.arange(12).reshape(2, 6) % VOCAB_SIZE
EXACT = ExportSpec(name="hf", dtype="float32", max_shard_bytes=16_000, logits_within=1e-5)
ROUNDED = ExportSpec(name="hf-bf16", logits_within=0.05)
SCALED = 1.3
"""More than rounding to bfloat16 does to the logits of this model."""


def answers(model: Decoder) -> Reference:
    """What the model makes of the prompt."""
    with torch.no_grad():
        return Reference(input_ids=IDS, logits=model(IDS))


def answers_another(model: Decoder) -> Reference:
    """What it does not: one row is another's."""
    logits = answers(model).logits.clone()
    logits[1, 2] *= SCALED
    return Reference(input_ids=IDS, logits=logits)


@pytest.mark.parametrize("spec", [EXACT, ROUNDED], ids=["fp32", "bf16"])
def test_an_export_that_answers_as_trained_is_made(root: str, spec: ExportSpec) -> None:
    make_root(root, (10,), reference=answers)
    catalog = open_catalog(root)
    made = export_step(catalog, catalog.manifest(10), spec)
    assert made.lineage.recipe["logits_within"] == str(spec.logits_within)
    assert ExportSpec.of_recipe(made.lineage.recipe) == spec
    assert not any("reference" in entry.path for entry in made.files)


@pytest.mark.s3
def test_on_an_object_store_as_well(s3_root: str) -> None:
    make_root(s3_root, (10,), reference=answers)
    catalog = open_catalog(s3_root)
    export_step(catalog, catalog.manifest(10), EXACT)
    assert catalog.export("hf", 10).step == 10


def test_one_that_answers_in_another_way_is_refused_with_position_and_difference(
    root: str,
) -> None:
    make_root(root, (10,), reference=answers_another)
    catalog = open_catalog(root)
    with pytest.raises(IntegrityError, match=r"position 2 of row 1 its logits differ by 0\.23"):
        export_step(catalog, catalog.manifest(10), ROUNDED)
    assert catalog.observe().exports == ()
    assert not Path(root, ".ray_ckpt/parts").exists() or not any(
        path.is_file() for path in Path(root, ".ray_ckpt/parts").rglob("*")
    )


def test_one_whose_config_says_another_thing_than_training_did_is_refused(root: str) -> None:
    """Every tensor is right, and so are the names: only the numbers tell."""
    make_root(root, (10,), reference=answers)
    catalog = open_catalog(root)
    config = json.loads(catalog.store.read("step-10/hf_assets/config.json"))
    config["rope_theta"] = 100.0
    config.pop("rope_parameters", None)
    make_root(
        f"{root}-other",
        (10,),
        files={"config.json": json.dumps(config).encode()},
        reference=answers,
    )
    other = open_catalog(f"{root}-other")
    with pytest.raises(IntegrityError, match="answers the recorded prompt in another way"):
        export_step(other, other.manifest(10), EXACT)


def test_a_step_without_recorded_logits_cannot_be_compared(root: str) -> None:
    make_root(root, (10,))
    catalog = open_catalog(root)
    with pytest.raises(UsageError, match="step-10 was saved without the logits of a prompt"):
        export_step(catalog, catalog.manifest(10), EXACT)
    assert catalog.observe().exports == ()


def test_too_little_memory_is_told_before_a_byte_is_written(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_root(root, (10,), reference=answers)
    catalog = open_catalog(root)
    monkeypatch.setattr(exporting, "free_memory_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match=r"the logits of hf are compared in 0\.00 GB"):
        export_step(catalog, catalog.manifest(10), EXACT)


def test_logits_that_do_not_fit_the_prompt_are_refused_when_the_step_is_saved(root: str) -> None:
    def wrong(model: Decoder) -> Reference:
        return Reference(input_ids=IDS, logits=answers(model).logits[:, :3])

    with pytest.raises(UsageError, match=r"logits are \[2, 3, \d+\] and its input_ids \[2, 6\]"):
        make_root(root, (10,), reference=wrong)
    assert open_catalog(root).observe().checkpoints == ()


def test_a_gpu_that_is_not_there_is_told_of_before_a_byte_is_written(root: str) -> None:
    make_root(root, (10,))
    catalog = open_catalog(root)
    if torch.cuda.is_available():
        pytest.skip("has one")
    with pytest.raises(UsageError, match="hf is to be made on a GPU, and torch sees none"):
        export_step(catalog, catalog.manifest(10), ExportSpec(name="hf", device="cuda"))
