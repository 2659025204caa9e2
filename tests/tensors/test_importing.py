"""A Hugging Face folder becomes a checkpoint, and an export of that is the folder, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ray_ckpt import CheckpointManager, FromWeights, LoadConfig, ModelWrapper, TrainingState
from ray_ckpt.core.errors import (
    ConfigError,
    IntegrityError,
    LeaseHeldError,
    RayCkptError,
    StateDictError,
    StepExistsError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import TRAINER, Lease
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.importing import import_folder
from tests.tensors.test_adapters import CASES, Case
from tests.tensors.tiny import same_tensors, weights_in


def _hf_folder(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config()))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return _hf_folder(CASES["llama"], tmp_path / "base")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_way_there_and_back_changes_no_bit(case: Case, root: str, tmp_path: Path) -> None:
    base = _hf_folder(case, tmp_path / "base")
    catalog = open_catalog(root)
    manifest = import_folder(catalog, str(base), family=case.family)
    assert (manifest.step, manifest.holds, manifest.model.family) == (0, "model", case.family)
    assert catalog.damage(0) == []
    export_step(catalog, manifest, ExportSpec(name="back", dtype="float32"))
    assert same_tensors(weights_in(Path(root, "exports/back/step-0")), weights_in(base))


def test_the_family_is_what_the_config_says_and_files_come_along(llama: Path, root: str) -> None:
    (llama / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    (llama / "modeling_llama.py").write_text("raise SystemExit")
    manifest = import_folder(open_catalog(root), str(llama))
    assert manifest.model is not None
    assert manifest.model.family == "llama"
    assets = {path.name for path in Path(root, "step-0/hf_assets").iterdir()}
    assert {"config.json", "tokenizer_config.json"} <= assets
    assert not any(name.endswith((".py", ".safetensors")) for name in assets)


def test_weights_in_16_bits_stay_in_16_bits(root: str, tmp_path: Path) -> None:
    base = _hf_folder(CASES["qwen3"], tmp_path / "base", torch.bfloat16)
    manifest = import_folder(open_catalog(root), str(base))
    assert {entry.dtype for entry in manifest.tensors} == {"bfloat16"}


@pytest.mark.s3
def test_from_s3_to_s3(llama: Path, s3_root: str) -> None:
    store = open_catalog(f"{s3_root}-hub").store
    for path in llama.iterdir():
        store.upload(path, f"base/{path.name}")
    catalog = open_catalog(s3_root)
    import_folder(catalog, f"{s3_root}-hub/base")
    assert catalog.damage(0) == []


def test_another_run_starts_from_it(llama: Path, root: str, tmp_path: Path) -> None:
    import_folder(open_catalog(root), str(llama))
    model = torch.nn.Module()
    for name, tensor in _native(root).items():
        owner = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))
    manager = CheckpointManager(
        str(tmp_path / "other"),
        TrainingState(model=ModelWrapper(model)),
        config=SaveConfig(mode="sync"),
    )
    manager.load(config=LoadConfig(start=FromWeights(path=f"{root}/step-0")))
    manager.close()
    assert same_tensors(dict(model.state_dict()), _native(root))


def _native(root: str) -> dict[str, torch.Tensor]:
    from ray_ckpt.tensors.load_into import read_tensors

    catalog = open_catalog(root)
    manifest = catalog.manifest(0)
    assert manifest.model is not None
    return read_tensors(catalog, manifest, manifest.model.keys)


def _refused(root: str, folder: Path | str, **how: str) -> RayCkptError:
    with pytest.raises(RayCkptError) as caught:
        import_folder(open_catalog(root), str(folder), **how)
    views = open_catalog(root).observe().checkpoints
    assert [view.step for view in views if view.state is not CheckpointState.FOREIGN] == []
    return caught.value


def test_what_cannot_be_imported_is_named_and_leaves_nothing(llama: Path, root: str) -> None:
    unknown = _refused(root, llama, family="lama")
    assert isinstance(unknown, ConfigError)
    assert "known families: deepseek_v3, gpt_oss" in unknown.do
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 13}))
    lacking = _refused(root, llama)
    assert isinstance(lacking, StateDictError)
    assert "all of layer 12" in lacking.what
    shard = llama / "model.safetensors"
    (llama / "config.json").write_text(json.dumps(config))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert isinstance(_refused(root, llama), IntegrityError)
    (llama / "config.json").unlink()
    assert "holds no config.json" in _refused(root, llama).what
    shutil.rmtree(llama)
    assert isinstance(_refused(root, llama), ConfigError)


def test_a_step_or_a_trainer_that_is_there_is_not_touched(llama: Path, root: str) -> None:
    catalog = open_catalog(root)
    first = import_folder(catalog, str(llama))
    with pytest.raises(StepExistsError):
        import_folder(catalog, str(llama))
    assert catalog.manifest(0) == first
    other = f"{root}-2"
    lease = Lease(open_catalog(other).store, TRAINER, owner="training")
    lease.acquire()
    with pytest.raises(LeaseHeldError):
        import_folder(open_catalog(other), str(llama))
    lease.release()
