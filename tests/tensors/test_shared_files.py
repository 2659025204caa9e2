"""Files that ranks fill together: every element once, whatever each of them holds."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.tensors.converters import WHOLE_MODEL
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.recording import TensorSpec, record
from ray_ckpt.tensors.shared_files import runs, write_together
from ray_ckpt.tensors.views import View
from tests.tensors.ranks import run

SHAPES = {"a": (10, 6), "b": (7, 64), "c": (5,), "d": (3, 4, 8), "e": (1, 9), "none": (0, 4)}


@st.composite
def views(draw: st.DrawFn) -> tuple[View, int]:
    """A view of a source with so many elements, its dimensions in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    whole = torch.arange(int(torch.tensor(sizes).prod()) if sizes else 1).reshape(sizes)
    order = draw(st.permutations(range(len(sizes))))
    seen = whole.permute(order) if sizes else whole
    return View(
        source="x", offset=0, sizes=tuple(seen.shape), strides=tuple(seen.stride())
    ), whole.numel()


@given(views(), st.lists(st.integers(0, 300), max_size=3))
def test_parts_of_a_source_make_every_element_of_a_view_once(
    case: tuple[View, int], cuts: list[int]
) -> None:
    view, num_elements = case
    source = torch.arange(num_elements) + 100
    expected = source.as_strided(view.sizes, view.strides, view.offset).reshape(-1)
    made = torch.full((view.num_elements,), -1)
    bounds = sorted({0, num_elements, *(cut for cut in cuts if cut < num_elements)})
    for begin, end in itertools.pairwise(bounds):
        for first, at, count in runs(view, begin, end):
            assert begin <= first
            assert first + count <= end
            assert (made[at : at + count] == -1).all(), "written twice"
            made[at : at + count] = source[first : first + count]
    assert torch.equal(made, expected)


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def _transform(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "as it is": state["a"],
        "cast": state["b"].bfloat16(),
        "reordered": state["b"].reshape(7, 2, 32).transpose(0, 1).reshape(14, 32).bfloat16(),
        "transposed": state["a"].t().contiguous(),
        "row": state["a"][3],
        "computed": state["a"] @ state["a"].t() + state["c"].sum(),
        "of one expert": state["d"][1],
        "thin": state["e"].half(),
        "none": state["none"],
    }


def _plan() -> ExportPlan:
    specs = {name: TensorSpec(shape=shape, dtype=torch.float32) for name, shape in SHAPES.items()}
    recording = record(_transform, specs)
    names = list(recording.outputs)
    cuts = {"one": names[:4], "two": names[4:]}
    return ExportPlan(
        recording=recording,
        dtype="float32",
        layout=WHOLE_MODEL,
        config={},
        shards=tuple(
            OutputShard(
                file=f"{file}.safetensors",
                sources=(),
                outputs=tuple(held),
                size_bytes=sum(recording.outputs[name].spec.size_bytes for name in held),
            )
            for file, held in cuts.items()
        ),
    )


def _distributed(how: str) -> dict[str, Tensor]:
    tensors = _tensors()
    size = dist.get_world_size()
    if how == "plain":
        return tensors
    if how == "replicas of shards":
        mesh = init_device_mesh("cpu", (2, size // 2))
        return {k: distribute_tensor(t, mesh, [Replicate(), Shard(0)]) for k, t in tensors.items()}
    placement = {"rows": Shard(0), "columns": Shard(-1), "copies": Replicate()}[how]
    mesh = init_device_mesh("cpu", (size,))
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dim = Shard(tensor.ndim - 1) if how == "columns" else placement
        made[name] = distribute_tensor(tensor, mesh, [dim])
    return made


def _write(folder: str, how: str) -> list[Any]:
    tensors = _distributed(how)
    assert how == "plain" or all(isinstance(tensor, DTensor) for tensor in tensors.values())
    return [e.path for e in write_together(_plan(), tensors, Ranks(), folder=Path(folder))]


@pytest.mark.parametrize(
    ("how", "num_ranks"),
    [
        ("rows", 1),
        ("rows", 2),
        ("rows", 4),
        ("columns", 2),
        ("copies", 2),
        ("plain", 2),
        ("replicas of shards", 4),
    ],
)
def test_whatever_each_rank_holds_the_files_are_the_same(
    tmp_path: Path, how: str, num_ranks: int
) -> None:
    told = run(_write, str(tmp_path), how, num_ranks=num_ranks)
    assert all(sorted(paths) == ["one.safetensors", "two.safetensors"] for paths in told)
    made = {k: t for path in tmp_path.iterdir() for k, t in load_file(path).items()}
    expected = _transform(_tensors())
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


def _write_nan(folder: str) -> str:
    tensors = _distributed("rows")
    if dist.get_rank() == 1:
        tensors["b"].to_local()[-1, -1] = torch.nan  # pyright: ignore
    try:
        write_together(_plan(), tensors, Ranks(), folder=Path(folder))
    except IntegrityError as error:
        return error.what
    return ""


def test_what_one_rank_finds_all_raise(tmp_path: Path) -> None:
    told = run(_write_nan, str(tmp_path))
    assert all("holds NaN or Inf once it is bfloat16" in what for what in told), told
