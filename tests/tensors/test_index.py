"""A `.metadata` that is not ours is read without running anything it may hold."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import TensorEntry
from ray_ckpt.tensors.index import model_keys, read_foreign_metadata
from ray_ckpt.tensors.step_index import StepIndex

STATE = {"weight": torch.randn(4, 2), "half": torch.zeros(3, dtype=torch.bfloat16), "step": 5}


class Call:
    """Pickles as a call that unpickling would run."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


@pytest.fixture
def metadata(tmp_path: Path) -> bytes:
    """Of a checkpoint that plain torch wrote."""
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save(dict(STATE), checkpoint_id=tmp_path / "dcp")
    return (tmp_path / "dcp/.metadata").read_bytes()


def test_what_torch_writes_is_read(metadata: bytes) -> None:
    index = StepIndex.of(read_foreign_metadata(metadata, "x"))
    assert index.entries() == (
        TensorEntry(name="half", dtype="bfloat16", shape=(3,)),
        TensorEntry(name="weight", dtype="float32", shape=(4, 2)),
    )
    assert index.values() == ["step"]
    assert all(index.lengths > 0)


def test_model_keys_are_tensors_outside_the_reserved_names(metadata: bytes) -> None:
    read = read_foreign_metadata(metadata, "x")
    assert model_keys(read, frozenset()) == ("half", "weight")
    assert model_keys(read, frozenset({"half", "step"})) == ("weight",)


@pytest.mark.parametrize(
    "call",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(exec, f"open({mark!r}, 'w').close()"),
        lambda mark: Call(eval, f"open({mark!r}, 'w').close()"),
        lambda mark: Call(open, mark, "w"),
        lambda mark: Call(getattr, Path(mark), "touch"),
        lambda mark: Call(torch.save, 1, mark),
        lambda mark: Call(torch.load, mark),
    ],
    ids=["os.system", "exec", "eval", "open", "getattr", "torch.save", "torch.load"],
)
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: OrderedDict(a=c)], ids=["bare", "inside"])
def test_a_hostile_index_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, call: Callable[[str], Call], wrap: Callable[[Any], Any]
) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps(wrap(call(str(mark))))
    with pytest.raises(IntegrityError, match="asks for") as caught:
        read_foreign_metadata(data, "step-5/.metadata")
    assert caught.value.where == "step-5/.metadata"
    assert "nothing of it was run" in caught.value.safe
    assert not mark.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for module, name in [("pathlib", "os.system"), ("collections", "_sys.exit"), ("torch", "save")]:
        data = _global(module, name) + pickle.dumps(str(mark))[2:-1] + b"\x85R."
        with pytest.raises(IntegrityError, match=f"asks for {module}.{name}"):
            read_foreign_metadata(data, "x")
    assert not mark.exists()


def _global(module: str, name: str) -> bytes:
    """Protocol 4 opcodes that push `module.name`."""
    parts = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    return b"\x80\x04" + b"".join(parts) + b"\x93"


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_index_is_refused(metadata: bytes, cut: int) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_foreign_metadata(metadata[:cut], "x")


def test_garbage_is_refused() -> None:
    with pytest.raises(IntegrityError):
        read_foreign_metadata(b"\x00garbage" * 10, "x")


@pytest.mark.parametrize("other", [{}, [1], "text", OrderedDict(a=1), torch.Size([2])])
def test_another_type_is_refused_by_name(other: object) -> None:
    with pytest.raises(IntegrityError, match=type(other).__name__):
        read_foreign_metadata(pickle.dumps(other), "x")
