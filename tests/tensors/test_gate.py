"""Exporters with one fault each: each is stopped, with the tensor's name, and shows nothing."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, init_weights
from ray_ckpt import CheckpointManager, ModelWrapper, TrainingState
from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.export import Export, alone, export_step
from ray_ckpt.tensors.gate import expect_sound_files
from ray_ckpt.tensors.hf_shapes import expected_shape
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.run import HfAssets
from ray_ckpt.tensors.transforms import StateDictTransforms
from tests.roots import TINY, make_root
from tests.tensors.test_adapters import CASES, Case

Tensors = dict[str, Tensor]
Fault = Callable[[Tensors, Tensors], Tensors]
"""From what the right exporter makes, and the checkpoint's tensors, what a wrong one does."""
HF = ExportSpec(name="hf", dtype="bfloat16", max_shard_bytes=16_000)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIRST, SECOND = "model.layers.0.self_attn.", "model.layers.1.self_attn."
SQUARE, WIDE = FIRST + "o_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def catalog(root: str) -> Catalog:
    make_root(root, (10,))
    return open_catalog(root)


def _swapped(made: Tensors, _: Tensors) -> Tensors:
    one, other = FIRST + "q_proj.weight", SECOND + "q_proj.weight"
    return {**made, one: made[other], other: made[one]}


def _without(name: str) -> Fault:
    return lambda made, _: {key: value for key, value in made.items() if key != name}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    return lambda made, _: {**made, name: change(made[name])}


def _renamed(made: Tensors, _: Tensors) -> Tensors:
    return {key.replace("layers.1.", "layers.2."): value for key, value in made.items()}


def _left_interleaved(made: Tensors, native: Tensors) -> Tensors:
    return {**made, FIRST + "q_proj.weight": native["layers.0.attention.wq.weight"].bfloat16()}


FAULTS: dict[str, tuple[Fault, str]] = {
    "a missing tensor": (_without(SECOND + "k_proj.weight"), SECOND + "k_proj.weight"),
    "swapped tensors": (_swapped, FIRST + "q_proj.weight is made of layers.1.attention.wq.weight"),
    "a transposed tensor": (_changed(WIDE, Tensor.t), WIDE + " has shape"),
    "a transposed square": (_changed(SQUARE, Tensor.t), f"the elements of {SQUARE}"),
    "rows left as they were": (
        _left_interleaved,
        f"the elements of {FIRST}q_proj.weight are not in the order",
    ),
    "a wrong type": (_changed(WIDE, Tensor.float), WIDE + " is float32, asked for was bfloat16"),
    "a random embedding": (_changed(EMBEDDING, torch.rand_like), "torch.rand_like"),
    "a new embedding": (_changed(EMBEDDING, lambda t: torch.ones(t.shape).bfloat16()), EMBEDDING),
    "NaN": (_changed(WIDE, lambda t: t / t.sub(t)), WIDE + " holds NaN or Inf"),
    "an overflow": (_changed(WIDE, lambda t: t.mul(1e38).mul(1e38)), WIDE + " holds NaN or Inf"),
    "zeros": (_changed(WIDE, lambda t: t.mul(0.0)), WIDE + " is nothing but zeros"),
    "a layer too far": (_renamed, "model.layers.2."),
    "a part of a tensor": (_changed(EMBEDDING, lambda t: t[:-1]), EMBEDDING + " has shape"),
}


def _inject(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    right = StateDictTransforms.whole_to_hf

    def wrong(self: StateDictTransforms, state_dict: Mapping[str, Tensor]) -> Tensors:
        return fault(right(self, state_dict), dict(state_dict))

    monkeypatch.setattr(StateDictTransforms, "whole_to_hf", wrong)


def _expect_refused(catalog: Catalog, says: str, spec: ExportSpec = HF, **how: Any) -> None:
    with pytest.raises(RayCkptError) as caught:
        export_step(catalog, catalog.manifest(10), spec, **how)
    assert says in caught.value.what
    assert caught.value.safe
    assert catalog.observe().exports == ()
    assert list(catalog.store.list_objects(names.PARTS)) == []
    assert [i.key for i in catalog.store.list_objects("exports")] == []


@pytest.mark.parametrize(("fault", "says"), FAULTS.values(), ids=FAULTS)
def test_an_exporter_with_a_fault_is_stopped(
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    says: str,
) -> None:
    """Scenario 46."""
    _inject(monkeypatch, fault)
    _expect_refused(catalog, says)


def test_one_without_a_fault_is_not_stopped(catalog: Catalog) -> None:
    assert export_step(catalog, catalog.manifest(10), HF).files


def _save(root: str, model: nn.Module, *, converters: Sequence[LoRA] = (), **files: bytes) -> None:
    """Step 10 holds this model alone, with these files in place of the usual ones."""
    usual = make_assets(TINY)
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(model, converters=list(converters))),
        config=SaveConfig(mode="sync"),
        assets=HfAssets(family="llama", files={**usual.files, **files}),
    )
    manager.save(10, last_step=True)
    manager.close()


def _model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(TINY, VOCAB_SIZE)
    init_weights(model)
    return model


def test_what_is_too_large_for_a_type_is_stopped(root: str) -> None:
    model = _model()
    with torch.no_grad():
        model.tok_embeddings.weight[3, 3] = 1e6
    _save(root, model)
    catalog = open_catalog(root)
    half = replace(HF, dtype="float16")
    _expect_refused(catalog, f"{EMBEDDING} holds NaN or Inf once it is float16", half)
    assert export_step(catalog, catalog.manifest(10), HF).files, "bfloat16 is wide enough"


def _rewritten(change: Callable[[Tensors], Tensors]) -> Callable[..., None]:
    """A crew whose files are changed once they are finished and noted."""

    def crew(export: Export, shards: Sequence[OutputShard], progress: Progress) -> None:
        alone(export, shards, progress)
        for file, part in export.parts.finished().items():
            path = Path(export.catalog.uri, part.key)
            tensors = load_file(path)
            path.unlink()
            save_file(change(tensors), path)
            note = Path(export.catalog.uri, names.part_note(export.parts.export_id, file))
            document = json.loads(note.read_text())
            document["version"] = export.catalog.store.stat(part.key).version  # pyright: ignore
            note.write_text(json.dumps(document))

    return crew


def test_files_that_do_not_hold_what_the_index_says_are_no_export(catalog: Catalog) -> None:
    """Scenario 46."""
    lost = _rewritten(lambda made: {k: v for k, v in made.items() if k != WIDE})
    _expect_refused(catalog, f"{WIDE} is not in model-", crew=lost)
    cast = _rewritten(lambda made: {k: v.half() if k == WIDE else v for k, v in made.items()})
    _expect_refused(catalog, f"{WIDE} in model-0000", crew=cast)


def test_a_tensor_in_two_files_is_in_one_too_many() -> None:
    spec = TensorSpec(shape=(2, 3), dtype=torch.float32)
    expected = {"one": {"a": spec}, "two": {"b": spec}}
    expect_sound_files(expected, expected)
    with pytest.raises(IntegrityError, match="a is in 2 files; a is in two for no reason"):
        expect_sound_files({"one": {"a": spec}, "two": {"a": spec, "b": spec}}, expected)


def test_an_adapter_that_was_not_merged_is_stopped(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, model = LoRA(rank=2, alpha=4, targets=("layers.*.attention.w[qkvo]",)), _model()
    lora.convert(model)
    _save(root, model, converters=[lora])

    def forget(self: LoRA, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if not self.key_filter(key)}

    with monkeypatch.context() as patched:
        patched.setattr(LoRA, "state_dict_transform", forget)
        _expect_refused(
            open_catalog(root), "attention.wk.lora_a.weight of lora has no part in any tensor"
        )
    assert export_step(open_catalog(root), open_catalog(root).manifest(10), HF).files


def test_a_head_that_is_not_tied_is_stopped(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    model.output.weight = model.tok_embeddings.weight
    config = {**json.loads(make_assets(TINY).files["config.json"]), "tie_word_embeddings": True}
    _save(root, model, **{"config.json": json.dumps(config).encode()})
    catalog = open_catalog(root)
    with monkeypatch.context() as patched:
        _inject(patched, lambda made, _: {**made, HEAD: made[EMBEDDING].clone()})
        _expect_refused(catalog, HEAD)
    assert export_step(catalog, catalog.manifest(10), HF).files


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is no JSON"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json is no tokenizer"),
        ("generation_config.json", b"eos: 3", "generation_config.json is no JSON"),
    ],
)
def test_a_tokenizer_or_config_that_cannot_be_used_is_told_before_anything_is_written(
    root: str, name: str, data: bytes, says: str
) -> None:
    """Scenario 46."""
    _save(root, _model(), **{name: data})
    _expect_refused(open_catalog(root), says)


def test_a_token_that_the_model_lacks_is_told_of(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = json.dumps({"model": {"vocab": {"a": 0, "b": VOCAB_SIZE}}}).encode()
    _save(root, _model(), **{"tokenizer.json": tokenizer})
    catalog = open_catalog(root)
    with caplog.at_level(logging.WARNING, "ray_ckpt"):
        assert export_step(catalog, catalog.manifest(10), HF).files
    assert f"has token {VOCAB_SIZE}, the model ends with {VOCAB_SIZE - 1}" in caplog.text


def test_zeros_that_somebody_wants_are_exported(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    _inject(monkeypatch, FAULTS["zeros"][0])
    wanted: Manifest = export_step(catalog, catalog.manifest(10), replace(HF, allow_zeros=True))
    assert wanted.files


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_table_of_shapes_is_what_transformers_writes(case: Case, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**case.config())
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    for file in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert expected_shape(name, document) == tuple(tensor.shape), name


def test_of_what_it_does_not_know_the_table_says_nothing() -> None:
    assert expected_shape("visual.patch_embed.weight", {"hidden_size": 4}) is None
    assert expected_shape(EMBEDDING, {"hidden_size": 4}) is None


def test_a_transform_that_asks_for_random_numbers_is_refused() -> None:
    spec = TensorSpec(shape=(2,), dtype=torch.float32)
    with pytest.raises(StateDictError, match="another tensor each time"):
        record(lambda sd: {"a": torch.dropout(sd["a"], 0.5, True)}, {"a": spec})
