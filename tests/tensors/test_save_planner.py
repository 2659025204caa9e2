"""Values that are no tensors are saved as `torch.save` would, and come back as what they were."""

import io
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ray_ckpt.tensors import save_planner
from ray_ckpt.tensors.save_planner import ValueSavePlanner

ITEM = WriteItem(MetadataIndex("value"), WriteItemType.BYTE_IO)


def load(stream: io.BytesIO) -> Any:
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "values", [(1, 1.0, True, 1 + 0j, "1", b"1"), ((0.9, 0.999), [0.9, 0.999]), (None, "None")]
)
def test_what_is_alike_stays_apart(values: tuple[Any, ...]) -> None:
    planner = ValueSavePlanner()
    for _ in range(2):
        found = [load(planner.transform_object(ITEM, value)) for value in values]
        assert [(type(f), f) for f in found] == [(type(v), v) for v in values]


def test_equal_values_are_pickled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    pickled = save_planner.pickled
    monkeypatch.setattr(save_planner, "pickled", lambda value: made.append(value) or pickled(value))
    planner = ValueSavePlanner()
    streams = [planner.transform_object(ITEM, 0.1) for _ in range(3)]
    assert made == [0.1]
    assert [load(stream) for stream in streams] == [0.1, 0.1, 0.1]


def test_others_are_pickled_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, value = ValueSavePlanner(), {"a": 1}
    first = planner.transform_object(ITEM, value)
    value["a"] = 2
    assert load(first) == {"a": 1}
    assert load(planner.transform_object(ITEM, value)) == {"a": 2}
