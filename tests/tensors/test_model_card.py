"""The card of an export says what is known, in a form that the Hub takes, and nothing made up."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ray_ckpt.cli.main import cli
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.names import export_dir
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.model_card import license_of
from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.storage.copies.test_publish import PUBLISH

LLAMA = b"""---
license: other
license_name: llama3.1
license_link: LICENSE
base_model: elsewhere/secret
tags: [theirs]
---
# Their model
"""
UNUSUAL = ExportSpec(
    name="small",
    dtype="float32",
    max_shard_bytes=16_000,
    format="torch",
    license="apache-2.0",
    allow_zeros=True,
)


def export(
    root: str, spec: ExportSpec, files: Mapping[str, bytes] | None = None
) -> tuple[Path, ModelCard]:
    """Its folder and its card, as the Hub's library reads it."""
    make_root(root, (10,), files=files)
    catalog = open_catalog(root)
    export_step(catalog, catalog.manifest(10), spec)
    folder = Path(root, export_dir(spec.name, 10))
    return folder, ModelCard.load(folder / "README.md")


def test_a_license_that_nobody_has_named_is_left_out(root: str) -> None:
    _, card = export(root, ExportSpec(name="hf"))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ray_ckpt"],
    }


def test_the_bases_license_stays_and_nothing_else_of_its_card(root: str) -> None:
    files = {"README.md": LLAMA, "LICENSE": b"the whole text"}
    folder, card = export(root, ExportSpec(name="hf"), files)
    told = card.data.to_dict()
    assert {key: told[key] for key in told if "license" in key} == {
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
    }
    assert told["tags"] == ["ray_ckpt"]
    assert "base_model" not in told
    assert "Their model" not in card.text
    assert (folder / "LICENSE").read_bytes() == b"the whole text"


def test_the_license_that_is_asked_for_wins() -> None:
    spec = ExportSpec(name="hf", license="mit")
    assert license_of({"README.md": LLAMA}, spec) == {"license": "mit"}
    assert ExportSpec.of_recipe(spec.recipe) == spec


@pytest.mark.parametrize("card", [b"", b"# no front matter", b"---\n- a list\n---\n", b"\xff---"])
def test_a_base_without_a_license_gives_none(card: bytes) -> None:
    assert license_of({"README.md": card}, None) == {}


def test_a_card_that_cannot_be_read_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert license_of({"README.md": b"---\na: [\n---\n"}, None) == {}
    assert "its license is left out" in caplog.text


def test_the_card_names_the_checkpoint_and_its_metrics(root: str) -> None:
    _, card = export(root, ExportSpec(name="hf"))
    source = open_catalog(root).manifest(10)
    assert f"| checkpoint content | `{source.content_id}` |" in card.text
    assert f"| run | `{source.lineage.run_id}` |" in card.text
    assert "| loss | 0.1 |" in card.text


@pytest.mark.parametrize("spec", [ExportSpec(name="hf"), UNUSUAL], ids=["usual", "unusual"])
def test_the_command_in_the_card_makes_the_same_export(
    root: str, spec: ExportSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, card = export(root, spec)
    made = open_catalog(root).export(spec.name, 10).manifest
    (line,) = (line for line in card.text.splitlines() if line.startswith("    ray-ckpt export"))
    folder.rename(tmp_path / "aside")
    program, *words = shlex.split(line)
    assert program == "ray-ckpt"
    cli([root if word == "ROOT" else word for word in words], standalone_mode=False)
    again = open_catalog(root).export(spec.name, 10).manifest
    assert (again.files, again.lineage) == (made.files, made.lineage)


# ---- the Hub ----

VALIDATE = """
import sys
from huggingface_hub import ModelCard
ModelCard.load(sys.argv[1]).validate()
"""


@pytest.fixture
def hub(hub: HubDouble) -> HubDouble:
    """With a repository."""
    hub.api().create_repo("ray/model")
    return hub


def publish(root: str, hub: HubDouble, name: str) -> str:
    code = PUBLISH.replace('"hf"', repr(name))
    arguments = ("-c", code, root, "hf://ray/model", "10")
    return run_python(*arguments, environment=hub.environment()).stdout


def test_the_hub_takes_the_card(root: str, hub: HubDouble) -> None:
    folder, _ = export(root, UNUSUAL, {"README.md": LLAMA})
    run_python("-c", VALIDATE, str(folder / "README.md"), environment=hub.environment())
    assert publish(root, hub, "small").startswith("done")
    assert hub.requests.count("POST /api/validate-yaml") == 2
    content = (folder / "README.md").read_bytes()
    cached = hub.api().hf_hub_download("ray/model", "README.md", cache_dir=folder / "cache")
    assert Path(cached).read_bytes() == content


def test_a_license_that_the_hub_does_not_know_is_told_with_the_way_out(
    root: str, hub: HubDouble
) -> None:
    export(root, ExportSpec(name="hf", license="mine"))
    said = publish(root, hub, "hf")
    assert said.startswith("failed StorageError the Hub refused the model card")
    assert '"license" must be one of' in said
    assert "with a --license that the Hub knows" in said
    assert said.endswith("class invalid None\n")
    assert hub.api().list_repo_files("ray/model") == [".gitattributes"]
