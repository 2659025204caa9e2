"""A saved step becomes a folder that `from_pretrained` loads, with the very same weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.corpus import EOS_ID, VOCAB_SIZE
from jobs.decoder import Decoder, hf_config
from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    ConfigError,
    IntegrityError,
    ObjectExistsError,
    RayCkptError,
    StateDictError,
    UsageError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.load_into import read_tensors
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.step_tensors import step_tensors
from ray_ckpt.tensors.transforms import TORCH_DTYPES, cast_floating
from tests.tensors.conftest import SavedRun
from tests.tensors.tiny import SIZES, files_in

FP32 = ExportSpec(name="hf-fp32", dtype="float32")
SPECS = {spec.name: spec for spec in (FP32, ExportSpec(name="hf-bf16", dtype="bfloat16"))}


@pytest.fixture(scope="module")
def root(saved_run: SavedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with every export of SPECS made from its last step."""
    root = saved_run.copy(tmp_path_factory.mktemp("exports") / "run")
    catalog = open_catalog(str(root))
    for spec in SPECS.values():
        export_step(catalog, catalog.manifest(12), spec)
    return root


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "exports/hf-fp32/step-12"


def _native(root: Path) -> dict[str, Tensor]:
    catalog = open_catalog(str(root))
    manifest = catalog.manifest(12)
    assert manifest.model is not None
    return read_tensors(catalog, manifest, manifest.model.keys)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_from_pretrained_loads_the_very_weights_that_were_trained(
    root: Path, spec: ExportSpec, saved_run: SavedRun
) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "exports" / spec.name / "step-12")
    assert model.dtype == TORCH_DTYPES[spec.dtype]
    config = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID)
    trained = {k: v for k, v in saved_run.ranks[0].state.items() if ":" not in k}
    expected = make_adapter("llama", config).to_hf(cast_floating(trained, model.dtype))
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_the_export_computes_what_the_trained_model_does(root: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    native = Decoder(SIZES, VOCAB_SIZE)
    native.load_state_dict(_native(root))
    ids = torch.randint(0, VOCAB_SIZE, (2, SIZES.max_seq_len))
    with torch.no_grad():
        torch.testing.assert_close(native(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_the_tokenizer_comes_along_and_keeps_any_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("def f(x):\n    return  x\n", "Grüße, 世界 🙂\t", ""):
        ids = tokenizer(text)["input_ids"]
        assert list(ids) == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == EOS_ID


def test_several_shards_hold_every_tensor_once_and_the_plan_says_where(
    root: Path, tmp_path: Path
) -> None:
    catalog = open_catalog(str(root))
    manifest = catalog.manifest(12)
    limit = 20_000
    plan = plan_export(catalog, manifest, replace(FP32, max_shard_bytes=limit))
    assert len(plan.shards) > 2
    written: dict[str, str] = {}
    tensors_of_step = step_tensors(catalog, manifest)
    for shard in plan.shards:
        write_shard(new_file(tmp_path / shard.file), plan, shard, tensors_of_step)
        with safe_open(tmp_path / shard.file, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert set(tensors) == set(shard.outputs)
        assert not set(tensors) & set(written)
        assert sum(t.nbytes for t in tensors.values()) == shard.size_bytes
        assert shard.size_bytes <= limit
        written |= dict.fromkeys(tensors, shard.file)
    weights = AutoModelForCausalLM.from_pretrained(root / "exports/hf-fp32/step-12").state_dict()
    assert written.keys() == weights.keys()
    assert plan.total_bytes == sum(t.nbytes for t in weights.values())
    assert len({shard.file for shard in plan.shards}) == len(plan.shards)


def test_the_index_agrees_with_the_files(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes: dict[str, int] = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                assert index["weight_map"][key] == name
                sizes[key] = file.get_tensor(key).nbytes
    assert sizes.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_a_second_run_returns_the_same_and_writes_nothing(root: Path) -> None:
    catalog = open_catalog(str(root))
    before = files_in(root)
    again = export_step(catalog, catalog.manifest(12), FP32)
    assert again == catalog.export("hf-fp32", 12).manifest
    assert files_in(root) == before


@pytest.mark.parametrize(
    "other",
    [
        lambda catalog: (catalog.manifest(12), ExportSpec(name="hf-fp32", dtype="float16")),
        lambda catalog: (
            replace(catalog.manifest(12), files=catalog.manifest(12).files[1:]),
            FP32,
        ),
    ],
    ids=["another dtype", "another save of the step"],
)
def test_another_export_of_the_same_name_is_refused(
    root: Path, other: Callable[[Catalog], tuple[Manifest, ExportSpec]]
) -> None:
    """Scenario 48: two exports of one step in different types do not meet."""
    catalog = open_catalog(str(root))
    before = files_in(root)
    with pytest.raises(ObjectExistsError, match="hf-fp32"):
        export_step(catalog, *other(catalog))
    assert files_in(root) == before


def _damage_asset(root: Path, manifest: Manifest) -> Manifest:
    (root / "step-12/hf_assets/tokenizer.json").write_text("{}")
    return manifest


def _damage_index(root: Path, manifest: Manifest) -> Manifest:
    (root / "step-12" / names.INDEX).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return manifest


def _lose_shard(root: Path, manifest: Manifest) -> Manifest:
    (root / "step-12/__1_0.distcp").unlink()
    return manifest


def _forget_model(_: Path, manifest: Manifest) -> Manifest:
    return replace(manifest, model=None)


def _forget_config(_: Path, manifest: Manifest) -> Manifest:
    files = tuple(entry for entry in manifest.files if not entry.path.endswith("config.json"))
    return replace(manifest, files=files)


def _other_family(_: Path, manifest: Manifest) -> Manifest:
    assert manifest.model is not None
    return replace(manifest, model=replace(manifest.model, family="mamba"))


def _other_key(_: Path, manifest: Manifest) -> Manifest:
    assert manifest.model is not None
    keys = (*manifest.model.keys, "layers.0.lora")
    return replace(manifest, model=replace(manifest.model, keys=keys))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_forget_model, UsageError),
        (_forget_config, UsageError),
        (_other_family, ConfigError),
        (_other_key, StateDictError),
        (_damage_asset, IntegrityError),
        (_damage_index, IntegrityError),
        (_lose_shard, RayCkptError),
    ],
)
def test_an_export_that_cannot_be_made_is_refused_and_leaves_nothing(
    saved_root: Path,
    spoil: Callable[[Path, Manifest], Manifest],
    expected: type[RayCkptError],
) -> None:
    catalog = open_catalog(str(saved_root))
    manifest = spoil(saved_root, catalog.manifest(12))
    before = files_in(saved_root)
    with pytest.raises(expected):
        export_step(catalog, manifest, FP32)
    assert files_in(saved_root) == before
    assert list((saved_root / ".ray_ckpt/staging").iterdir()) == []


def test_the_manifest_of_an_export_lists_every_file_with_its_sha256(
    root: Path, folder: Path
) -> None:
    export = open_catalog(str(root)).export("hf-fp32", 12).manifest
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del found["ray_ckpt.manifest.json"]
    assert {entry.path: entry.digest for entry in export.files} == {
        name: digest_of(path.read_bytes(), "sha256") for name, path in found.items()
    }


def test_an_export_says_what_it_was_made_from(root: Path) -> None:
    catalog = open_catalog(str(root))
    source, export = catalog.manifest(12), catalog.export("hf-fp32", 12).manifest
    assert export.lineage.source_id == source.content_id
    assert export.lineage.recipe == {"name": "hf-fp32", "dtype": "float32", "family": "llama"}
    assert (export.step, export.metrics, export.is_last_step) == (12, source.metrics, True)


def test_no_file_of_an_export_names_a_path_of_the_machine(root: Path) -> None:
    for path in (root / "exports").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(root.parent).encode() not in data, path
            assert str(Path.home()).encode() + b"/" not in data, path


def test_the_model_card_opens_with_the_front_matter_the_hub_reads(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert card.startswith("---\n")
    assert "library_name: transformers" in front.splitlines()
    assert "step 12" in text
    assert "float32" in text
    assert "| loss |" in text


def test_every_byte_of_a_tensor_that_is_written_is_told_of(saved_root: Path) -> None:
    catalog, progress = open_catalog(str(saved_root)), Progress()
    manifest = catalog.manifest(9)
    made = export_step(catalog, manifest, FP32, progress=progress)
    doing, done, total = progress.seen()
    assert doing == "exports hf-fp32"
    assert made.total_bytes > 0
    assert done == total == plan_export(catalog, manifest, FP32).total_bytes
