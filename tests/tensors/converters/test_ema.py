"""EMA: shadows that follow, are saved and loaded like the model's own tensors, and replace them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.converters import transform_for_export
from ray_ckpt.tensors.converters.ema import EMA
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.fqn import canonical_fqn
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from tests.tensors.converters.models import (
    make_model,
    native_logits,
    same_bits,
    shard,
    train,
    whole,
)
from tests.tensors.ranks import run


def averaged(*, steps: int = 4, **options: Any) -> tuple[nn.Module, EMA, dict[str, Tensor]]:
    """A trained model, its average, and the state dict of both."""
    ema = EMA(**{"decay": 0.9, **options})
    model = make_model([ema])
    train(model, range(steps), [ema])
    return model, ema, ModelWrapper(model, converters=[ema]).state_dict()


def test_every_trained_parameter_has_a_shadow() -> None:
    model, _, state = averaged()
    names = {name for name, _ in model.named_parameters()}
    assert set(state) == names | {f"ema.{name}" for name in names} | {"ema.num_updates"}
    assert not any("ema" in name for name in names)


def test_shadows_are_the_exponential_average_from_the_first_update_on() -> None:
    ema = EMA(decay=0.75)
    model = make_model([ema])
    expected: dict[str, Tensor] = {}
    for step in range(4):
        train(model, range(step, step + 1), [ema])
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = {n: 0.75 * expected[n] + 0.25 * now[n] for n in now} if step else now
    state = model.state_dict()
    assert state["ema.num_updates"] == 4
    for name, value in expected.items():
        torch.testing.assert_close(state[f"ema.{name}"], value)
        assert not torch.equal(state[f"ema.{name}"], state[name])


def test_whether_somebody_asked_for_the_state_earlier_makes_no_difference() -> None:
    ema = EMA(decay=0.9)
    model = make_model([ema])
    model.state_dict()
    train(model, range(4), [ema])
    assert same_bits(model.state_dict(), averaged()[2])


def test_until_the_first_update_shadows_follow_weights_that_are_loaded_later() -> None:
    ema = EMA(decay=0.9)
    model = make_model([ema])
    base = ModelWrapper(model, converters=[ema]).state_dict("base")
    for value in base.values():
        value.fill_(3)  # as a load in place does
    assert all((v == 3).all() for k, v in model.state_dict().items() if k != "ema.num_updates")


def test_a_loaded_state_is_kept_bit_for_bit_also_in_place() -> None:
    _, _, state = averaged()
    for in_place in (True, False):
        fresh = make_model([ema := EMA(decay=0.9)], seed=1)
        wrapper = ModelWrapper(fresh, converters=[ema])
        values = {key: value.clone() for key, value in state.items()}
        if in_place:
            own = wrapper.state_dict()
            for key, value in own.items():
                value.copy_(values[key])
            values = own
        wrapper.load_state_dict(values)
        assert same_bits(wrapper.state_dict(), state)


def test_shadows_keep_their_storages() -> None:
    ema = EMA(decay=0.9)
    model = make_model([ema])
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    train(model, range(2), [ema])
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    train(model, range(2), [ema])
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before


def test_a_strict_load_names_what_is_missing_and_what_is_too_much() -> None:
    model, _, state = averaged()
    wrong = {key: value for key, value in state.items() if key != "ema.norm.weight"}
    wrong["ema.stranger"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"ema\.norm\.weight[\s\S]*ema\.stranger"):
        model.load_state_dict(wrong)


def test_a_shadow_of_another_shape_is_refused() -> None:
    model, _, state = averaged()
    with pytest.raises(RuntimeError, match=r"ema\.norm\.weight has shape"):
        model.load_state_dict({**state, "ema.norm.weight": torch.zeros(1)})


def test_the_averaged_export_is_the_averaged_model_and_the_raw_one_the_trained_model() -> None:
    model, ema, state = averaged(steps=6)
    average = {n: state[f"ema.{n}"] for n, _ in model.named_parameters()}
    assert same_bits(ema.state_dict_transform(state), average)
    raw = EMA(decay=0.9, flavor="raw").state_dict_transform(state)
    plain = make_model()
    plain.load_state_dict(raw)
    assert torch.equal(native_logits(plain), native_logits(model))


@pytest.mark.parametrize(("dtype", "shadow"), [("float32", "float32"), ("parameter", "bfloat16")])
def test_shadows_of_bfloat16_parameters_and_their_export(dtype: Any, shadow: str) -> None:
    ema = EMA(decay=0.9, dtype=dtype)
    model = make_model([ema], dtype=torch.bfloat16)
    train(model, range(3), [ema])
    state = model.state_dict()
    assert state["ema.norm.weight"].dtype == getattr(torch, shadow)
    exported = ema.state_dict_transform(state)
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}


def test_with_lora_only_the_low_rank_layers_are_averaged_and_the_merge_takes_the_average() -> None:
    lora, ema = LoRA(rank=2, alpha=4, targets=["*w[qk]"]), EMA(decay=0.5)
    model = make_model([lora, ema])
    train(model, range(4), [ema])
    wrapper = ModelWrapper(model, converters=[lora, ema])
    state = wrapper.state_dict()
    owner_of = wrapper.owners(state)
    shadows = {key for key in state if key.startswith("ema.layers")}
    assert shadows == {f"ema.{key}" for key in state if owner_of[key] == "lora"}
    assert {owner_of[key] for key in shadows} == {"ema"}
    key = "layers.0.attention.wq"
    expected = state[f"{key}.weight"] + 2 * (
        state[f"ema.{key}.lora_b.weight"] @ state[f"ema.{key}.lora_a.weight"]
    )
    exported = transform_for_export(state, [lora, ema])
    torch.testing.assert_close(exported[f"{key}.weight"], expected)
    assert set(exported) == set(make_model().state_dict())


def test_an_average_of_a_tensor_that_is_not_there_is_refused_by_name() -> None:
    _, ema, state = averaged()
    del state["norm.weight"]
    with pytest.raises(StateDictError, match=r"norm\.weight"):
        ema.state_dict_transform(state)


def test_a_tied_tensor_has_one_shadow() -> None:
    ema = EMA(decay=0.9)
    model = make_model()
    model.output.weight = model.tok_embeddings.weight
    ema.convert(model)
    train(model, range(3), [ema])
    wrapper = ModelWrapper(model, converters=[ema])
    state = wrapper.state_dict()
    assert "ema.tok_embeddings.weight" in state
    assert "ema.output.weight" not in state
    assert same_bits(
        wrapper.state_dict("export"),
        {k: state[f"ema.{k}"] for k in state if not k.startswith("ema.")},
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on import
def test_a_compiled_model_has_shadows_under_the_same_names_and_loads_them() -> None:
    ema = EMA(decay=0.9)
    model = make_model([ema])
    compiled = torch.compile(model, backend="eager")
    train(compiled, range(3), [ema])
    wrapper = ModelWrapper(compiled, converters=[ema])
    state = {key: value.clone() for key, value in wrapper.state_dict().items()}
    assert same_bits(state, averaged(steps=3)[2])
    train(compiled, range(3, 5), [ema])
    wrapper.load_state_dict(state)
    assert same_bits(wrapper.state_dict(), state)


def test_parts_of_a_pipeline_share_one_converter_and_no_key() -> None:
    ema = EMA(decay=0.5)
    first, second = nn.Module(), nn.Module()
    first.front, second.back = nn.Linear(2, 2), nn.Linear(2, 2)
    for part in (first, second):
        ema.convert(part)
    wrapper = ModelWrapper([first, second], converters=[ema])
    for _ in range(2):
        with torch.no_grad():
            first.front.weight.add_(1)
            second.back.weight.add_(1)
        ema.update()
    state = {key: value.clone() for key, value in wrapper.state_dict().items()}
    assert state["ema.num_updates"] == 2
    for key in ("front.weight", "back.weight"):
        torch.testing.assert_close(state[f"ema.{key}"], state[key] - 0.5)
    with torch.no_grad():
        second.back.weight.zero_()
    ema.update()
    wrapper.load_state_dict(state)
    assert same_bits(wrapper.state_dict(), state)


def test_a_model_that_has_something_called_ema_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ema' already"):
        EMA(decay=0.9).convert(nn.ModuleDict({"ema": nn.Linear(2, 2)}))


@pytest.mark.parametrize(
    ("options", "field"),
    [({"decay": 1}, "decay"), ({"decay": 0.5, "dtype": "int8"}, "dtype"), ({"decay": -1}, "decay")],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"ema\.{field}"):
        EMA(**options)


def test_shadows_are_sharded_like_the_parameters_and_not_gathered_by_fsdp() -> None:
    for facts in run(_sharded):
        assert all(facts.values()), facts


def _sharded() -> dict[str, bool]:
    ema = EMA(decay=0.9)
    model = shard(make_model([ema]))
    seen: dict[str, bool] = {}

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        held = [*module.named_parameters(), *module.named_buffers()]
        seen["FSDP knows no shadow"] = not any("ema" in name for name, _ in held)

    model.layers["0"].register_forward_hook(look)
    train(model, range(4), [ema])
    model(torch.zeros(1, 4, dtype=torch.int64))  # leaves the root's own parameters gathered
    state = model.state_dict()
    pairs = [(p, state[f"ema.{canonical_fqn(n)}"]) for n, p in model.named_parameters()]
    alone = _on_one_rank()
    return {
        **seen,
        "a shadow is a DTensor": all(isinstance(s, DTensor) for _, s in pairs),
        "with the placements of its parameter": all(
            isinstance(p, DTensor) and s.placements == p.placements for p, s in pairs
        ),
        "and the values it would have on one rank": all(
            torch.allclose(whole(state[key]), alone[key], atol=1e-6) for key in alone
        ),
    }


def _on_one_rank() -> dict[str, Tensor]:
    """The same training with both ranks' batches on every rank, without FSDP."""
    ema = EMA(decay=0.9)
    model = make_model([ema])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(4):
        for rank in range(2):
            generator = torch.Generator().manual_seed(100 * step + rank)
            ids = torch.randint(0, 64, (4, 9), generator=generator)
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return model.state_dict()
