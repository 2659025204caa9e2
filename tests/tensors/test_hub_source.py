"""A run begins with weights that lie on the Hub, and an import makes a checkpoint of them."""

import json
from pathlib import Path

import pytest

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.loading import FromWeights
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.load_into import read_tensors
from tests.processes import run_python
from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.tensors.tiny import same_tensors

REPOSITORY = "hf://ray/model"
PUBLISH = """
import sys
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.tensors.export import export_step
catalog = open_catalog(sys.argv[1])
export_step(catalog, catalog.manifest(10), ExportSpec(name="hf", dtype="float32"))
publish_export(catalog, catalog.export("hf", 10), sys.argv[2])
"""
START = """
import json, sys
import torch
import ray_ckpt as rc
from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder
from tests.roots import TINY

root, path, step = sys.argv[1:]
model = Decoder(TINY, VOCAB_SIZE)
manager = rc.CheckpointManager(
    root,
    rc.TrainingState(model=rc.ModelWrapper(model)),
    config=rc.SaveConfig(every_steps=1, mode="sync"),
    assets=make_assets(TINY),
)
report = manager.load(config=rc.LoadConfig(start=rc.FromWeights(path=path, format="hf")))
manager.save(int(step), last_step=True)
manager.close()
print("loaded", report.step)
"""


@pytest.fixture
def hub(hub: HubDouble) -> HubDouble:
    """With a repository."""
    hub.api().create_repo("ray/model")
    return hub


@pytest.fixture
def published(root: str, hub: HubDouble) -> str:
    """A root whose step 10 is on the Hub."""
    make_root(root, (10,))
    in_process(hub, PUBLISH, root, REPOSITORY)
    return root


def in_process(hub: HubDouble, code: str, *arguments: str) -> str:
    """All that it says, well or not."""
    done = run_python("-c", code, *arguments, environment=hub.environment(), check=False)
    return done.stdout + done.stderr


def same_model(one: str, one_step: int, other: str, other_step: int) -> bool:
    states = []
    for root, step in ((one, one_step), (other, other_step)):
        catalog = open_catalog(root)
        manifest = catalog.manifest(step)
        assert manifest.model is not None
        states.append(read_tensors(catalog, manifest, manifest.model.keys))
    return same_tensors(*states)


def test_a_run_starts_from_it_and_its_manifest_says_so(
    published: str, hub: HubDouble, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    said = in_process(hub, START, other, f"{REPOSITORY}@step-10", "1")
    assert "loaded 0" in said
    assert same_model(published, 10, other, 1)
    (started_from,) = open_catalog(other).manifest(1).lineage.started_from
    assert (started_from.name, started_from.format) == ("ray/model", "hf")
    catalog = open_catalog(other)
    export_step(catalog, catalog.manifest(1), ExportSpec(name="hf"))
    card = Path(other, "exports/hf/step-1/README.md").read_text()
    assert "\nbase_model: ray/model\n" in card
    assert "\n| started from | `ray/model` |\n" in card


def test_a_run_that_resumes_asks_the_hub_for_nothing(
    published: str, hub: HubDouble, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    in_process(hub, START, other, REPOSITORY, "1")
    asked = len(hub.requests)
    assert "loaded 1" in in_process(hub, START, other, REPOSITORY, "2")
    assert hub.requests[asked:] == []


def test_weights_that_are_not_what_the_hub_says_are_refused(
    published: str, hub: HubDouble, tmp_path: Path
) -> None:
    (blob,) = (hub.folder / "lfs").iterdir()
    blob.write_bytes(bytes(byte ^ 1 for byte in blob.read_bytes()))
    said = in_process(hub, START, str(tmp_path / "other"), REPOSITORY, "1")
    assert "what arrived is not what the Hub says: model-00001-of-00001.safetensors" in said
    assert open_catalog(str(tmp_path / "other")).observe().checkpoints == ()


def test_an_import_makes_a_checkpoint_of_it(published: str, hub: HubDouble, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    code = "import sys; from ray_ckpt.cli.main import main; main()"
    said = in_process(hub, code, "import", REPOSITORY, other, "--json")
    told = json.loads(said[said.index("{") : said.rindex("}") + 1])  # beside the library's bars
    assert told["family"] == "llama"
    assert same_model(published, 10, other, 0)


def test_a_repository_is_no_checkpoint() -> None:
    with pytest.raises(ConfigError, match="is a Hugging Face repository, and format dcp"):
        FromWeights(path=REPOSITORY)
