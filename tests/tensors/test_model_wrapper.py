"""One flat state dict under canonical names, whoever has wrapped or split the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from ray_ckpt.core.errors import StateDictError, UsageError
from ray_ckpt.tensors.fqn import canonical_fqn
from ray_ckpt.tensors.model_wrapper import ModelWrapper


class Offset:
    """A converter in the manner of LoRA: it adds a tensor to each layer and can merge it again."""

    def __init__(self, name: str = "offset") -> None:
        self.name = name

    def convert(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                module.register_parameter(self.name, nn.Parameter(torch.ones(1)))

    def key_filter(self, fqn: str) -> bool:
        return fqn.endswith(f".{self.name}")

    def state_dict_transform(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Every weight plus the offset of its layer."""
        merged = {key: value for key, value in state_dict.items() if not self.key_filter(key)}
        for key in merged:
            offset = state_dict.get(key.replace("weight", self.name))
            if key.endswith("weight") and offset is not None:
                merged[key] = merged[key] + offset
        return merged

    def state_dict_adapter(self) -> None:
        return None


class Doubling(Offset):
    """Owns no key; its export is twice the weight."""

    def key_filter(self, fqn: str) -> bool:
        return False

    def state_dict_transform(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: value * 2 for key, value in state_dict.items()}


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))


BASE_KEYS = {"0.weight", "0.bias", "2.weight"}


def test_the_three_modes_differ_in_what_belongs_to_converters() -> None:
    model, converter = _model(), Offset()
    converter.convert(model)
    wrapper = ModelWrapper(model, converters=[converter])
    assert set(wrapper.state_dict()) == {*BASE_KEYS, "0.offset", "2.offset"}
    assert set(wrapper.state_dict("base")) == BASE_KEYS
    exported = wrapper.state_dict("export")
    assert set(exported) == BASE_KEYS
    assert torch.equal(exported["0.weight"], model[0].weight.detach() + 1)
    assert torch.equal(wrapper.state_dict("base")["0.weight"], model[0].weight.detach())


def test_converters_are_undone_in_reverse_order() -> None:
    model, first, second = _model(), Offset(), Doubling()
    first.convert(model)
    exported = ModelWrapper(model, converters=[first, second]).state_dict("export")
    weight = model[0].weight.detach()
    assert torch.equal(exported["0.weight"], weight * 2 + 2)  # doubled, then the doubled offset


def test_a_key_that_two_converters_claim_is_named_with_both() -> None:
    model, converters = _model(), [Offset(), Offset()]
    converters[0].convert(model)
    converters[1].name = "fset"  # a careless filter: it matches the other one's keys too
    converters[1].key_filter = lambda fqn: fqn.endswith("fset")  # type: ignore[method-assign]
    with pytest.raises(StateDictError, match=r"0\.offset \(offset, fset\)"):
        ModelWrapper(model, converters=converters).state_dict()


def test_an_unknown_mode_is_answered_with_the_three_there_are() -> None:
    with pytest.raises(StateDictError, match="full, base, export"):
        ModelWrapper(_model()).state_dict("ful")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_wrappers_leave_no_trace_in_names_and_load_again(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = _model()
    model[0] = wrap(model[0])
    values = {key: torch.randn_like(value) for key, value in _model().state_dict().items()}
    wrapper = ModelWrapper(model)
    assert set(wrapper.state_dict()) == BASE_KEYS
    wrapper.load_state_dict(values)
    assert all(torch.equal(value, values[key]) for key, value in wrapper.state_dict().items())


def test_flat_parameters_are_refused_and_the_way_out_is_named() -> None:
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor wants a GPU
    nn.Module.__init__(flat)
    with pytest.raises(UsageError, match="FullyShardedDataParallel") as raised:
        ModelWrapper(nn.Sequential(flat))
    assert "fully_shard" in raised.value.do


def test_all_wrapper_segments_are_stripped_wherever_they_are() -> None:
    name = "_orig_mod.layers.0._checkpoint_wrapped_module._orig_mod.w.weight"
    assert canonical_fqn(name) == "layers.0.w.weight"


def test_parts_are_one_model_and_each_gets_its_own_back() -> None:
    first, second = nn.Module(), nn.Module()
    first.front, second.back = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapper = ModelWrapper([first, second])
    values = {key: torch.randn_like(value) for key, value in wrapper.state_dict().items()}
    assert set(values) == {"front.weight", "front.bias", "back.weight", "back.bias"}
    wrapper.load_state_dict(values)
    assert torch.equal(first.front.weight, values["front.weight"])
    assert torch.equal(second.back.bias, values["back.bias"])


def test_two_parts_with_the_same_key_are_refused() -> None:
    with pytest.raises(StateDictError, match=r"two parts.*weight"):
        ModelWrapper([nn.Linear(2, 2), nn.Linear(2, 2)]).state_dict()


def test_missing_and_unexpected_keys_are_named_and_nothing_is_loaded() -> None:
    model = _model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = {key: torch.zeros_like(value) for key, value in before.items()}
    values["stranger"] = values.pop("2.weight")
    with pytest.raises(StateDictError, match=r"missing \['2.weight'\], unexpected \['stranger'\]"):
        ModelWrapper(model).load_state_dict(values)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["full", "base"])
def test_tensors_share_storage_with_the_parameters_call_after_call(mode: str) -> None:
    model = _model()
    wrapper = ModelWrapper(model)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for _ in range(2):
        assert {key: value.data_ptr() for key, value in wrapper.state_dict(mode).items()} == own
        wrapper.load_state_dict(
            {key: torch.randn_like(value) for key, value in model.state_dict().items()}
        )
