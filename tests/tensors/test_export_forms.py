"""One step, exported in every form it has: converters undone, adapters alone, experts apart."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.corpus import EOS_ID, VOCAB_SIZE
from jobs.decoder import Decoder, hf_config
from ray_ckpt.core.errors import ConfigError, IntegrityError, StateDictError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import ConverterEntry, Manifest, ModelEntry, NeededSource
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.adopt import adopt_step
from ray_ckpt.tensors.converters import CONVERTERS, WHOLE_MODEL, ExportLayout
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.step_tensors import step_tensors
from tests.tensors.tiny import SIZES

FP32 = ExportSpec(name="hf", dtype="float32")
PEFT = ExportSpec(name="peft", dtype="float32", flavors={"lora": "peft"})
CONFIG = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID)
LORA = LoRA(rank=2, alpha=4.0, targets=("layers.*.attention.w[qkv]", "layers.*.feed_forward.w1"))
BASE = NeededSource(name="Llama-3-8B", format="hf", owners=("base",), digest="sha256:00")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A committed step and what is in it."""

    catalog: Catalog
    manifest: Manifest
    tensors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return Path(self.catalog.uri.removeprefix("file://")) / "exports"

    def export(self, spec: ExportSpec) -> Path:
        """The folder of the finished export."""
        export_step(self.catalog, self.manifest, spec)
        return self.folder / spec.name / "step-1"


def _step(root: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], **model: Any) -> Step:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of one process
        dcp.save(dict(tensors), checkpoint_id=root / "step-1", no_dist=True)
    (root / "step-1/hf_assets").mkdir()
    (root / "step-1/hf_assets/config.json").write_text(json.dumps(config))
    catalog = open_catalog(str(root))
    manifest = adopt_step(catalog, 1)
    entry = ModelEntry(keys=tuple(sorted(tensors)), **{"family": "llama", **model})
    return Step(catalog=catalog, manifest=replace(manifest, model=entry), tensors=dict(tensors))


def _entries(*converters: Any) -> tuple[ConverterEntry, ...]:
    return tuple(ConverterEntry(name=c.name, options=c.options()) for c in converters)


def _ids() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, SIZES.max_seq_len))


@pytest.fixture
def lora_model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SIZES, VOCAB_SIZE)
    LORA.convert(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def lora_step(lora_model: Decoder, tmp_path: Path) -> Step:
    return _step(tmp_path, lora_model.state_dict(), CONFIG, converters=_entries(LORA))


def test_lora_is_merged_into_a_plain_model(lora_model: Decoder, lora_step: Step) -> None:
    model = AutoModelForCausalLM.from_pretrained(lora_step.export(FP32))
    ids = _ids()
    with torch.no_grad():
        torch.testing.assert_close(lora_model(ids), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_adapter_alone_is_what_peft_loads(lora_model: Decoder, lora_step: Step) -> None:
    folder = lora_step.export(PEFT)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    plain = {k: v for k, v in lora_step.tensors.items() if not LORA.key_filter(k)}
    base.load_state_dict(make_adapter("llama", CONFIG).to_hf(plain))
    model = PeftModel.from_pretrained(base, folder)
    ids = _ids()
    with torch.no_grad():
        torch.testing.assert_close(lora_model(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_an_adapter_is_one_file_without_an_index_and_without_the_models_config(
    lora_step: Step, tmp_path: Path
) -> None:
    plan = plan_export(lora_step.catalog, lora_step.manifest, replace(PEFT, max_shard_bytes=1))
    assert [shard.file for shard in plan.shards] == ["adapter_model.safetensors"]
    folder = lora_step.export(PEFT)
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json"),
        *("README.md", "ray_ckpt.manifest.json"),
    }
    assert "library_name: peft" in (folder / "README.md").read_text().splitlines()


def test_the_recipe_says_in_which_form_an_export_was_made(lora_step: Step) -> None:
    export = export_step(lora_step.catalog, lora_step.manifest, PEFT)
    assert export.lineage.recipe == {
        **{"name": "peft", "dtype": "float32", "family": "llama"},
        "flavor.lora": "peft",
    }
    assert export_step(lora_step.catalog, lora_step.manifest, PEFT) == export


def test_a_flavor_for_a_converter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    step = _step(tmp_path, Decoder(SIZES, VOCAB_SIZE).state_dict(), CONFIG)
    with pytest.raises(ConfigError, match="lora"):
        step.export(PEFT)


def test_an_adapter_that_was_saved_alone_is_exported_alone_or_its_base_is_named(
    lora_model: Decoder, tmp_path: Path
) -> None:
    own = {k: v for k, v in lora_model.state_dict().items() if LORA.key_filter(k)}
    step = _step(tmp_path, own, CONFIG, converters=_entries(LORA))
    step = replace(step, manifest=replace(step.manifest, needs=(BASE,)))
    with pytest.raises(UsageError, match="Llama-3-8B") as caught:
        step.export(FP32)
    assert "--as lora=peft" in caught.value.do
    assert not step.folder.exists()
    assert len(load_file(step.export(PEFT) / "adapter_model.safetensors")) == len(own)


def test_a_step_with_nan_is_exported_only_on_demand(tmp_path: Path) -> None:
    tensors = Decoder(SIZES, VOCAB_SIZE).state_dict()
    tensors["norm.weight"][0] = math.nan
    step = _step(tmp_path, tensors, CONFIG)
    step = replace(step, manifest=replace(step.manifest, non_finite=("norm.weight",)))
    with pytest.raises(IntegrityError, match=r"norm\.weight") as caught:
        step.export(FP32)
    assert "step itself is untouched" in caught.value.safe
    assert "--allow-non-finite" in caught.value.do
    assert step.export(replace(FP32, allow_non_finite=True)).is_dir()


def test_how_the_base_was_quantized_is_not_said_of_plain_weights(tmp_path: Path) -> None:
    quantized = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    step = _step(tmp_path, Decoder(SIZES, VOCAB_SIZE).state_dict(), quantized)
    folder = step.export(FP32)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_were_saved_alone_are_exported_like_any(tmp_path: Path) -> None:
    step = _step(tmp_path, Decoder(SIZES, VOCAB_SIZE).state_dict(), CONFIG)
    step = replace(step, manifest=replace(step.manifest, holds="model"))
    AutoModelForCausalLM.from_pretrained(step.export(FP32))


def test_a_model_of_no_family_is_refused(tmp_path: Path) -> None:
    step = _step(tmp_path, Decoder(SIZES, VOCAB_SIZE).state_dict(), CONFIG, family=None)
    with pytest.raises(UsageError, match="what model") as caught:
        step.export(FP32)
    assert "HfAssets" in caught.value.do


def test_a_model_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    tensors = Decoder(SIZES, VOCAB_SIZE).state_dict()
    kept = {key: value for key, value in tensors.items() if not key.startswith("layers.1.")}
    with pytest.raises(StateDictError, match="all of layer 1"):
        _step(tmp_path, kept, CONFIG).export(FP32)


def _mixtral(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB_SIZE,
        "num_local_experts": 4,
    }
    return AutoConfig.for_model("mixtral", **sizes, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stacked_experts_become_a_model_that_from_pretrained_loads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(_mixtral()).to(dtype)
    original.save_pretrained(tmp_path / "original")
    saved = load_file(tmp_path / "original/model.safetensors")
    config = json.loads((tmp_path / "original/config.json").read_text())
    native = make_adapter("mixtral", config).from_hf(saved)
    step = _step(tmp_path / "run", native, config, family="mixtral")
    spec = replace(FP32, dtype=str(dtype).removeprefix("torch."))  # cast or byte copy
    loaded = AutoModelForCausalLM.from_pretrained(step.export(spec)).state_dict()
    expected = original.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_stack_may_lie_across_several_shards(tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_config(_mixtral())
    original.save_pretrained(tmp_path / "original")
    saved = load_file(tmp_path / "original/model.safetensors")
    native = make_adapter("mixtral", _mixtral().to_dict()).from_hf(saved)
    step = _step(tmp_path / "run", native, _mixtral().to_dict(), family="mixtral")
    plan = plan_export(step.catalog, step.manifest, replace(FP32, max_shard_bytes=2000))
    written: dict[str, Tensor] = {}
    tensors = step_tensors(step.catalog, step.manifest)
    for shard in plan.shards:
        write_shard(new_file(tmp_path / shard.file), plan, shard, tensors)
        written |= load_file(tmp_path / shard.file)
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[key], saved[key]) for key in saved)


def test_a_transformers_model_with_tied_weights_is_exported_as_it_is(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config)
    tensors = original.state_dict()
    del tensors["lm_head.weight"]
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    step = _step(tmp_path, tensors, config.to_dict(), family="identity", tied=tied)
    loaded = AutoModelForCausalLM.from_pretrained(step.export(FP32)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in original.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class Doubled:
    """A converter that saves halves, and says so in the config."""

    name: ClassVar[str] = "doubled"

    def options(self) -> dict[str, Any]:
        return {}

    def key_filter(self, fqn: str) -> bool:
        return False

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value * 2 for key, value in state_dict.items()}

    def state_dict_adapter(self, base: Any) -> None:
        return None

    def layout(self, outputs: Mapping[str, Any]) -> ExportLayout:
        assert all(spec.dtype == torch.float32 for spec in outputs.values())
        return ExportLayout(
            config={"quantization_config": {"quant_method": "doubled"}}, metadata={"twice": "yes"}
        )


@dataclass(frozen=True, kw_only=True)
class Plain(Doubled):
    """The same, without a word in the config."""

    name: ClassVar[str] = "plain"

    def layout(self, outputs: Mapping[str, Any]) -> ExportLayout:
        return WHOLE_MODEL


def test_a_converter_adds_to_the_config_and_to_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONVERTERS, "doubled", Doubled)
    monkeypatch.setitem(CONVERTERS, "plain", Plain)
    tensors = Decoder(SIZES, VOCAB_SIZE).state_dict()
    step = _step(tmp_path, tensors, CONFIG, converters=_entries(Doubled(), Plain()))
    folder = step.export(FP32)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "doubled"}
    assert config["hidden_size"] == SIZES.dim
    with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "twice": "yes"}
        assert torch.equal(file.get_tensor("model.norm.weight"), tensors["norm.weight"] * 4)


def test_two_converters_that_write_their_own_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONVERTERS, "doubled", Doubled)
    tensors = Decoder(SIZES, VOCAB_SIZE).state_dict()
    step = _step(tmp_path, tensors, CONFIG, converters=_entries(Doubled(), Doubled()))
    other = replace(step.manifest.model, converters=_entries(Doubled(), _Tripled()))
    monkeypatch.setitem(CONVERTERS, "tripled", _Tripled)
    with pytest.raises(UsageError, match="doubled and tripled"):
        replace(step, manifest=replace(step.manifest, model=other)).export(FP32)


class _Tripled(Doubled):
    name: ClassVar[str] = "tripled"
