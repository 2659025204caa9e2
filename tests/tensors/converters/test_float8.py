"""Float8 against torchao and transformers: plain checkpoints, and an export in float8."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.tensors.converters.ema import EMA
from ray_ckpt.tensors.converters.float8 import Float8, quantize
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.transforms import StateDictTransforms
from tests.tensors.converters.models import (
    CONFIG,
    hf_logits,
    llama,
    make_model,
    native_logits,
    same_bits,
    shard,
    train,
    whole,
    write_hf,
)
from tests.tensors.ranks import run


def float8(**options: Any) -> Float8:
    return Float8(**{"targets": ["layers.*"], "emulate": True, **options})


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(shape=tuple(v.shape), dtype=v.dtype) for k, v in tensors.items()}


def trained(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = make_model([float8(**options)])
    train(model, range(3))
    return model, model.state_dict()


@pytest.mark.parametrize("recipe", Float8.recipes)
def test_every_recipe_trains_in_float8_and_keeps_names_and_plain_weights(recipe: str) -> None:
    model, state = trained(recipe=recipe)
    assert type(model.layers["0"].attention.wq).__name__ == "Float8Linear"
    assert type(model.output) is nn.Linear
    assert set(state) == set(make_model().state_dict())
    assert {type(value) for value in state.values()} == {Tensor}
    plain = make_model()
    plain.load_state_dict(state)
    assert not torch.equal(native_logits(plain), native_logits(model))
    torch.testing.assert_close(native_logits(plain), native_logits(model), atol=0.2, rtol=0.2)


def test_on_the_meta_device_layers_are_converted_too() -> None:
    with torch.device("meta"):
        model = make_model([float8()])
    assert type(model.layers["0"].attention.wq).__name__ == "Float8Linear"
    model.to_empty(device="cpu")
    model.load_state_dict(make_model().state_dict())
    assert native_logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_fp8_export(dtype: Any, tmp_path: Path) -> None:
    converter = float8(flavor="fp8")
    model, state = trained()
    tensors = StateDictTransforms(
        adapter=llama(), dtype=dtype, converters=(converter,)
    ).whole_to_hf(state)
    layout = converter.layout(specs(tensors))
    config = {**CONFIG, **layout.config, "torch_dtype": dtype, "dtype": dtype}
    hf = AutoModelForCausalLM.from_pretrained(
        write_hf(tmp_path / "hf", tensors, config, layout.metadata)
    )
    weight = hf.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Float8Tensor"
    assert weight.qdata.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(hf_logits(hf).float(), native_logits(model), atol=0.1, rtol=0.1)


def test_tensors_header_and_config_are_those_that_torchao_writes() -> None:
    converter, model = float8(flavor="fp8"), make_model()
    ours = converter.state_dict_transform({k: v.clone() for k, v in model.state_dict().items()})
    quantize_(model.layers, Float8WeightOnlyConfig())
    tensors, header = flatten_tensor_state_dict(model.state_dict())
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in tensors.items()}
    assert all(torch.equal(ours[k].float(), tensors[k].float()) for k in tensors)
    layout = converter.layout(specs(ours))
    assert {k: json.loads(v) for k, v in layout.metadata.items() if k != "tensor_names"} == {
        k: json.loads(v) for k, v in header.items() if k != "tensor_names"
    }
    quant_type = layout.config["quantization_config"]["quant_type"]["default"]
    assert quant_type == json.loads(json.dumps(config_to_dict(Float8WeightOnlyConfig())))


def test_a_row_of_zeros_stays_one() -> None:
    parts = quantize(torch.zeros(2, 4))
    assert not (parts["qdata"].float() * parts["scale"]).any()


def test_a_recorded_fp8_export_makes_the_same_bits() -> None:
    converter, (_, state) = float8(flavor="fp8"), trained()
    recording = record(converter.state_dict_transform, specs(state))
    replayed = recording.run(list(recording.outputs), lambda key: state[key])
    eager = converter.state_dict_transform(state)
    assert replayed.keys() == eager.keys()
    assert all(torch.equal(replayed[k].float(), eager[k].float()) for k in eager)


def test_weights_that_travel_in_float8_are_saved_plain_and_loaded_again(tmp_path: Path) -> None:
    for facts in run(_gathered_in_float8, str(tmp_path)):
        assert all(facts.values()), facts


def _gathered_in_float8(folder: str) -> dict[str, bool]:
    converters = [float8(all_gather="float8"), EMA(decay=0.9)]
    model = shard(make_model(converters))
    train(model, range(3), converters)
    wrapper = ModelWrapper(model, converters=converters)
    state = wrapper.state_dict()
    weight = model.layers["0"].attention.wq.weight
    saved = {key: whole(value) for key, value in state.items()}
    path = Path(folder) / f"{torch.distributed.get_rank()}.pt"
    torch.save(saved, path)
    own = state["layers.0.attention.wq.weight"]
    fresh = [float8(all_gather="float8"), EMA(decay=0.9)]
    again = shard(make_model(fresh, seed=1))
    ModelWrapper(again, converters=fresh).load_state_dict(state)
    return {
        "the parameter is of torchao's class": isinstance(weight, DTensor)
        and type(weight.to_local()).__name__ == "WeightWithDynamicFloat8CastTensor",
        "all pieces are plain": all(
            type(v.to_local() if isinstance(v, DTensor) else v) is Tensor for v in state.values()
        ),
        "on the parameter's own storage": own.to_local().data_ptr()
        == weight.to_local()._tensor.data_ptr(),
        "safe to unpickle": same_bits(torch.load(path, weights_only=True), saved),
        "the same after loading": same_bits(
            ModelWrapper(again, converters=fresh).state_dict(), state
        ),
        "and in training": train(model, range(3, 5), converters)
        == train(again, range(3, 5), fresh),
        "export is plain": all(
            type(v.to_local()) is Tensor for v in wrapper.state_dict("export").values()
        ),
    }


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray_ckpt\[torchao\]'"):
        float8().convert(make_model())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"recipe": "delayed"}, "recipe"),
        ({"recipe": "rowwise", "all_gather": "float8"}, "all_gather"),
        ({"flavor": "int4"}, "flavor"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"float8\.{field}"):
        float8(**options)
