"""A transform that was recorded once gives, piece by piece, the bits that it gives as a whole."""

import gc
import pickle
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.recording import Recording, TensorSpec, record

StateDict = Mapping[str, Tensor]
OFFSETS = torch.arange(6.0)


def _state_dict() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(4, 6),
        "b": torch.randn(4, 6).bfloat16(),
        "square": torch.randn(4, 4),
        "low": torch.randn(2, 6),
        "high": torch.randn(4, 2),
        "stack": torch.randn(3, 2, 5),
        "count": torch.tensor([3, 1, 2]),
        "unused": torch.randn(7),
    }


def _recorded(transform: Callable[[StateDict], Mapping[str, Tensor]]) -> Recording:
    specs = {
        key: TensorSpec(shape=tuple(value.shape), dtype=value.dtype)
        for key, value in _state_dict().items()
    }
    return record(transform, specs)


def _views(sd: StateDict) -> dict[str, Tensor]:
    top, bottom = sd["a"].split([1, 3])
    return {
        "top": top,
        "bottom": bottom.reshape(2, 9),
        "turned": sd["a"].T,
        "columns": sd["a"][:, 1:5:2],
        "picked": sd["a"][torch.tensor([2, 0])],
        "flat": sd["stack"].permute(2, 0, 1).flatten(),
    }


def _several_outputs(sd: StateDict) -> dict[str, Tensor]:
    experts = {f"expert.{n}": expert.clone() for n, expert in enumerate(sd["stack"].unbind())}
    values, where = sd["a"].max(dim=1)
    first, *_ = sd["a"]
    return {**experts, "values": values, "where": where, "first": first}


def _merge(sd: StateDict) -> dict[str, Tensor]:
    merged = sd["a"] + 0.5 * (sd["high"] @ sd["low"])
    return {
        "merged": merged.to(torch.bfloat16),
        "cast": sd["b"].float(),
        "linear": torch.nn.functional.linear(sd["a"], sd["low"]),
        "einsum": torch.einsum("ij,kj->ik", sd["a"], sd["low"]),
        "glued": torch.cat([sd["a"], sd["low"]]),
        "shifted": sd["a"] + OFFSETS,
        "table": torch.tensor([1.0, 2.0, 4.0, 8.0])[sd["count"]],
        "eye": torch.eye(4, device=sd["a"].device) @ sd["square"],
    }


def _in_place(sd: StateDict) -> dict[str, Tensor]:
    woven = torch.zeros(4, 6)
    untouched = woven + 1
    woven[::2] = sd["a"][:2]
    early = woven.clone()
    woven[1::2].copy_(sd["a"][2:])
    added = sd["square"].clone()
    row = added[0]
    added.add_(1).mul_(2)
    out = torch.empty(4, 4)
    torch.matmul(sd["square"], sd["square"], out=out)
    return {"early": early, "woven": woven, "row": row, "untouched": untouched, "out": out}


def _renames(sd: StateDict) -> dict[str, Tensor]:
    return {
        "same": sd["a"],
        "as it was": sd["b"].to(torch.bfloat16).contiguous(),
        "again": sd["a"],
        "constant": OFFSETS,
    }


TRANSFORMS = [_views, _several_outputs, _merge, _in_place, _renames]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_at_once_and_one_by_one_it_is_bit_for_bit_what_the_transform_makes(
    transform: Callable[[StateDict], Mapping[str, Tensor]],
) -> None:
    recording, state_dict = _recorded(transform), _state_dict()
    expected = transform(state_dict)
    together = recording.run(expected, state_dict.__getitem__)
    assert list(recording.outputs) == list(together) == list(expected)
    for name, tensor in expected.items():
        alone = recording.run([name], state_dict.__getitem__)[name]
        spec = recording.outputs[name].spec
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert alone.dtype == together[name].dtype == tensor.dtype, name
        assert torch.equal(alone, tensor), name
        assert torch.equal(together[name], tensor), name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_recording_pickles(transform: Callable[[StateDict], Mapping[str, Tensor]]) -> None:
    state_dict = _state_dict()
    recording = pickle.loads(pickle.dumps(_recorded(transform)))
    made = recording.run(recording.outputs, state_dict.__getitem__)
    assert all(torch.equal(made[name], value) for name, value in transform(state_dict).items())


def test_outputs_name_their_sources_and_nothing_else() -> None:
    outputs = _recorded(_merge).outputs
    assert set(outputs["merged"].sources) == {"a", "high", "low"}
    assert outputs["cast"].sources == ("b",)
    assert outputs["glued"].sources == ("a", "low")
    assert outputs["table"].sources == ("count",)
    assert _recorded(_in_place).outputs["woven"].sources == ("a",)
    assert _recorded(_in_place).outputs["row"].sources == ("square",)


def test_only_outputs_without_an_operation_are_copies_of_bytes() -> None:
    outputs = _recorded(_renames).outputs
    copies = {"same": True, "as it was": True, "again": True, "constant": False}
    found = {name: output.view is not None for name, output in outputs.items()}
    assert found == copies


def test_each_source_is_read_once_and_only_if_it_is_needed() -> None:
    state_dict = _state_dict()
    reads: list[str] = []

    def read(key: str) -> Tensor:
        reads.append(key)
        return state_dict[key]

    _recorded(_merge).run(["merged", "glued", "linear"], read)
    assert sorted(reads) == ["a", "high", "low"]


def test_a_source_is_let_go_once_nothing_needs_it_any_more() -> None:
    alive: dict[str, weakref.ref[Tensor]] = {}

    def read(key: str) -> Tensor:
        gc.collect()
        assert [name for name, ref in alive.items() if ref() is not None] == []
        tensor = torch.zeros(8)
        alive[key] = weakref.ref(tensor)
        return tensor

    keys = [f"k{n}" for n in range(5)]
    specs = dict.fromkeys(keys, TensorSpec(shape=(8,), dtype=torch.float32))
    recording = record(lambda sd: {key: sd[key].bfloat16() + 1 for key in keys}, specs)
    recording.run(keys, read)
    assert list(alive) == keys


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (lambda sd: {"x": sd["a"] if sd["a"].sum() > 0 else sd["b"]}, "__bool__"),
        (lambda sd: {"x": sd["a"] * sd["a"].sum().item()}, "item"),
        (lambda sd: {"x": sd["a"] * float(sd["a"][0, 0])}, "__float__"),
        (lambda sd: {"x": sd["a"][: sd["count"][0]]}, "__index__|__getitem__"),
        (lambda sd: {"x": sd["a"][sd["a"] > 0]}, "__getitem__"),
        (lambda sd: {"x": sd["a"] * len(sd["a"].tolist())}, "tolist"),
        (lambda sd: {"x": torch.nonzero(sd["a"])}, "nonzero"),
        (lambda sd: {"x": sd["a"] @ sd["a"]}, "matmul"),
    ],
)
def test_what_cannot_be_done_without_values_is_refused_by_its_name(transform, named: str) -> None:
    with pytest.raises(StateDictError, match=named):
        _recorded(transform)


@pytest.mark.parametrize(
    "transform",
    [
        lambda sd: {"x": sd["a"].mul_(2)},
        lambda sd: {"x": sd["a"][0].zero_()},
        lambda sd: {"x": sd["a"].T.data.zero_()},
        lambda sd: {"x": torch.add(sd["a"], 1, out=sd["a"])},
    ],
    ids=["in place", "through a view", "through .data", "out="],
)
def test_a_change_of_the_input_is_refused_and_the_tensor_named(transform) -> None:
    with pytest.raises(StateDictError, match=r"changes its input: .* writes into a\n"):
        _recorded(transform)


def test_a_change_of_a_tensor_that_the_transform_holds_is_refused() -> None:
    with pytest.raises(StateDictError, match="a tensor that it holds"):
        _recorded(lambda sd: {"x": sd["a"] + OFFSETS.add_(1)})
    assert torch.equal(OFFSETS, torch.arange(6.0))


def test_an_output_that_is_no_tensor_is_named() -> None:
    with pytest.raises(StateDictError, match="scale, which is a float"):
        _recorded(lambda sd: {"a": sd["a"], "scale": 0.5})


def test_a_tensor_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(StateDictError, match=r"shape \(4, 6\)"):
        _recorded(lambda sd: {"x": torch.nn.Parameter(sd["a"])})


def test_an_error_of_our_own_passes_as_it_is() -> None:
    def transform(sd: StateDict) -> dict[str, Tensor]:
        raise StateDictError("no rule speaks for a")

    with pytest.raises(StateDictError, match="no rule speaks for a"):
        _recorded(transform)


def test_no_value_is_read_however_large_the_tensors_are() -> None:
    specs = {"big": TensorSpec(shape=(1 << 20, 1 << 20), dtype=torch.float32)}
    recording = record(lambda sd: {"small": sd["big"][:2, :3].bfloat16()}, specs)
    assert recording.outputs["small"].spec.size_bytes == 12
