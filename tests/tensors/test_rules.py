"""A table of rules speaks for every tensor, in both directions, or names the one it does not."""

import logging

import pytest
import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.rule_adapter import RuleAdapter
from ray_ckpt.tensors.rules import (
    experts,
    in_layers,
    left_out,
    rename,
    rotary,
    split,
    split_alternating,
    split_qkv,
    transpose,
)

HF = "model.blocks.{n}."
ADAPTER = RuleAdapter(
    "toy",
    [
        rename("embed", "model.embed"),
        rename("layers.{n}.w", HF + "weight"),
        rotary("layers.{n}.q", HF + "q_proj", num_heads=2),
        transpose("layers.{n}.t", HF + "t"),
        split("layers.{n}.rows", [HF + "top", HF + "bottom"], rows=[3, 1]),
        split_alternating("layers.{n}.gate_up", [HF + "gate", HF + "up"], dim=1),
        split_qkv("layers.{n}.qkv", [HF + "q", HF + "k", HF + "v"], num_heads=4, num_kv_heads=2),
        *in_layers([1, 2], [experts("layers.{n}.moe", HF + "experts.{e}.w", num_experts=3)]),
        left_out("*.inv_freq"),
    ],
    num_layers=3,
)
LAYER = {
    "w": (4, 4),
    "q": (8, 4),
    "t": (2, 3, 5),
    "rows": (4, 2),
    "gate_up": (2, 6, 3),
    "qkv": (2 * (2 + 2) * 6, 5),
}


def _native() -> dict[str, Tensor]:
    return {
        "embed": torch.randn(5, 4),
        **{f"layers.{n}.{name}": torch.randn(LAYER[name]) for n in range(3) for name in LAYER},
        **{f"layers.{n}.moe": torch.randn(3, 2, 5) for n in (1, 2)},
    }


def test_names_are_exchanged_and_layer_and_expert_numbers_kept() -> None:
    per_layer = ["weight", "q_proj", "t", "top", "bottom", "gate", "up", "q", "k", "v"]
    assert set(ADAPTER.to_hf(_native())) == {
        "model.embed",
        *(f"model.blocks.{n}.{name}" for n in range(3) for name in per_layer),
        *(f"model.blocks.{n}.experts.{e}.w" for n in (1, 2) for e in range(3)),
    }


def test_there_and_back_is_the_same_bit_for_bit() -> None:
    native = _native()
    hf = ADAPTER.to_hf(native)
    back = ADAPTER.from_hf(hf)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[key], native[key]) for key in native)
    again = ADAPTER.to_hf(back)
    assert all(torch.equal(again[key], hf[key]) for key in hf)


@pytest.mark.parametrize("there", [True, False], ids=["to_hf", "from_hf"])
def test_what_comes_out_may_be_written_to_without_changing_what_went_in(there: bool) -> None:
    given = _native() if there else ADAPTER.to_hf(_native())
    before = {key: tensor.clone() for key, tensor in given.items()}
    made = ADAPTER.to_hf(given) if there else ADAPTER.from_hf(given)
    renamed = {id(tensor) for tensor in given.values()}
    for tensor in made.values():
        if id(tensor) not in renamed:
            tensor.zero_()
    assert all(torch.equal(given[key], before[key]) for key in before)


def test_a_head_of_two_rows_is_copied_too() -> None:
    adapter = RuleAdapter("two", [rotary("q", "q_proj", num_heads=4)])
    weight = torch.ones(8, 3)
    adapter.to_hf({"q": weight})["q_proj"].zero_()
    assert torch.equal(weight, torch.ones(8, 3))


def test_values_are_where_the_layouts_say() -> None:
    native = _native()
    hf = ADAPTER.to_hf(native)
    qkv = native["layers.1.qkv"].reshape(2, 4, 6, 5)
    assert torch.equal(hf["model.blocks.1.q"], qkv[:, :2].reshape(24, 5))
    assert torch.equal(hf["model.blocks.1.k"], qkv[:, 2].reshape(12, 5))
    assert torch.equal(hf["model.blocks.1.v"], qkv[:, 3].reshape(12, 5))
    assert torch.equal(hf["model.blocks.0.up"], native["layers.0.gate_up"][:, 1::2])
    assert torch.equal(hf["model.blocks.0.bottom"], native["layers.0.rows"][3:])
    assert torch.equal(hf["model.blocks.2.t"], native["layers.2.t"].mT)
    assert torch.equal(hf["model.blocks.2.experts.1.w"], native["layers.2.moe"][1])


@pytest.mark.parametrize("direction", [ADAPTER.to_hf, ADAPTER.from_hf])
def test_every_tensor_without_a_rule_is_named(direction) -> None:
    state_dict = {"layers.0.lora": torch.zeros(1), "stranger": torch.zeros(1)}
    with pytest.raises(StateDictError, match=r"toy.*layers\.0\.lora, stranger"):
        direction(state_dict)


@pytest.mark.parametrize(
    "name",
    ["layers.0.w.scale", "my.layers.0.w", "layers.x.w", "layers.0xw", "layers.00.w", "layers.3.w"],
)
def test_a_name_must_match_as_a_whole_and_its_layer_exist(name: str) -> None:
    with pytest.raises(StateDictError, match=name):
        ADAPTER.to_hf({name: torch.zeros(1)})


def test_a_part_made_of_whole_rules_will_do() -> None:
    native = _native()
    assert ADAPTER.to_hf({"layers.1.moe": native["layers.1.moe"]}).keys() == {
        f"model.blocks.1.experts.{e}.w" for e in range(3)
    }
    assert ADAPTER.to_hf({}) == {}


def test_a_rule_of_which_some_tensors_are_lacking_names_them() -> None:
    hf = ADAPTER.to_hf(_native())
    del hf["model.blocks.2.experts.1.w"], hf["model.blocks.0.k"]
    names = r"2 Hugging Face tensors.*: model\.blocks\.0\.k, model\.blocks\.2\.experts\.1\.w"
    for check in (ADAPTER.from_hf, ADAPTER.expect_whole_hf):
        with pytest.raises(StateDictError, match=names):
            check(hf)


def test_a_number_of_experts_that_is_not_the_configs_is_refused() -> None:
    with pytest.raises(StateDictError, match=r"layers\.1\.moe holds 2 tensors.*expects 3"):
        ADAPTER.to_hf({"layers.1.moe": torch.zeros(2, 2, 5)})


def test_a_whole_model_is_accepted_and_a_part_of_one_is_not() -> None:
    native = _native()
    ADAPTER.expect_whole(native)
    ADAPTER.expect_whole_hf(ADAPTER.to_hf(native))
    with pytest.raises(StateDictError, match=r"layers\.1\.w\n"):
        ADAPTER.expect_whole(set(native) - {"layers.1.w"})
    with pytest.raises(StateDictError, match="stranger"):
        ADAPTER.expect_whole([*native, "stranger"])


def test_a_rule_that_matches_nothing_is_named_for_a_whole_model() -> None:
    keys = [key for key in _native() if not key.endswith(".q")]
    with pytest.raises(StateDictError, match=r"toy.*: layers\.\{n\}\.q\n") as caught:
        ADAPTER.expect_whole(keys)
    assert "3 native tensors" in caught.value.what


def test_a_layer_that_is_lacking_is_named_once() -> None:
    keys = [key for key in _native() if not key.startswith("layers.2.")]
    with pytest.raises(StateDictError, match=r": all of layer 2\n"):
        ADAPTER.expect_whole(keys)


def test_what_is_no_part_of_the_model_is_left_out_and_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    native = _native()
    hf = {**ADAPTER.to_hf(native), "model.blocks.0.inv_freq": torch.zeros(2)}
    ADAPTER.expect_whole_hf(hf)
    with caplog.at_level(logging.WARNING):
        assert ADAPTER.from_hf(hf).keys() == native.keys()
    assert "num_tensors=1 names=model.blocks.0.inv_freq" in caplog.text


def test_many_names_are_counted_and_the_first_ones_told() -> None:
    strangers = {f"stranger.{n:03d}": torch.zeros(1) for n in range(50)}
    with pytest.raises(StateDictError, match=r"stranger\.019 and 30 more") as caught:
        ADAPTER.to_hf(strangers)
    assert "stranger.020" not in caught.value.what
