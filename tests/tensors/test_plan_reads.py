"""What a plan says that an export will read is counted by hand, and is what is read."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.corpus import EOS_ID, VOCAB_SIZE
from jobs.decoder import Decoder, hf_config, init_weights
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.converters import WHOLE_MODEL
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.export_plan import ExportPlan, plan_model
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.plan_reads import node_read_bytes, read_bytes
from ray_ckpt.tensors.recording import TensorSpec, Transform, record
from ray_ckpt.tensors.shard_writer import write_shard
from ray_ckpt.tensors.transforms import StateDictTransforms
from tests.tensors.tiny import SIZES

INPUTS = {
    "w": TensorSpec(shape=(4, 6), dtype=torch.float32),
    "v": TensorSpec(shape=(10,), dtype=torch.bfloat16),
    "long": TensorSpec(shape=(4_000_000, 2), dtype=torch.float32),
}


def _plan(transform: Transform, *files: tuple[str, ...]) -> ExportPlan:
    """Each file holds the outputs of these names."""
    recording = record(transform, INPUTS)
    shards = tuple(
        OutputShard(file=str(number), sources=(), outputs=outputs, size_bytes=0)
        for number, outputs in enumerate(files)
    )
    return ExportPlan(
        recording=recording, dtype="bfloat16", layout=WHOLE_MODEL, config={}, shards=shards
    )


CASES: dict[str, tuple[Transform, int]] = {
    "as it is": (lambda sd: {"a": sd["w"]}, 24 * 4),
    "cast: what is read, not what is written": (lambda sd: {"a": sd["w"].bfloat16()}, 24 * 4),
    "two of four rows": (lambda sd: {"a": sd["w"][1:3]}, 12 * 4),
    "two columns, and what lies between": (lambda sd: {"a": sd["w"][:, :2]}, (3 * 6 + 2) * 4),
    "transposed": (lambda sd: {"a": sd["w"].t()}, 24 * 4),
    "one column in four blocks, without the gap behind each": (
        lambda sd: {"a": sd["long"][:, 0]},
        (2 * 4_000_000 - 4) * 4,
    ),
    "computed from a part: all of it": (lambda sd: {"a": sd["w"][:1] + 1}, 24 * 4),
    "computed from two": (lambda sd: {"a": sd["w"][0, 0] * sd["v"]}, 24 * 4 + 10 * 2),
    "twice from the same, which is held": (lambda sd: {"a": sd["w"] + 1, "b": sd["w"] + 2}, 24 * 4),
    "two views, each by itself": (lambda sd: {"a": sd["w"], "b": sd["w"][:1]}, (24 + 6) * 4),
    "as it is and computed": (lambda sd: {"a": sd["w"], "b": sd["w"] + 1}, 2 * 24 * 4),
    "made of nothing": (lambda sd: {"a": torch.ones(2)}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_that_one_shard_reads(case: str) -> None:
    transform, expected = CASES[case]
    plan = _plan(transform, tuple(record(transform, INPUTS).outputs))
    assert read_bytes(plan, plan.shards[0]) == expected


def test_shards_are_dealt_out_to_nodes_in_turn_and_read_by_themselves() -> None:
    plan = _plan(
        lambda sd: {"a": sd["w"] + 1, "b": sd["w"] + 2, "c": sd["v"]}, ("a",), ("b",), ("c",)
    )
    assert node_read_bytes(plan, 1) == [96 + 96 + 20]
    assert node_read_bytes(plan, 2) == [96 + 20, 96]
    assert node_read_bytes(plan, 4) == [96, 96, 20, 0]


class Counted:
    """Tensors in memory that count what is read of them."""

    reads_at_once = 1

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.read_bytes = 0

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str, begin: int, into: Tensor) -> None:
        self.read_bytes += into.nbytes
        into.copy_(self._tensors[key].reshape(-1)[begin : begin + into.numel()])

    def whole(self, key: str) -> Tensor:
        self.read_bytes += self._tensors[key].nbytes
        return self._tensors[key]


def test_an_export_reads_what_its_plan_says(tmp_path: Path) -> None:
    config = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID)
    lora = LoRA(rank=2, alpha=4.0, targets=("layers.*.attention.w[qv]",))
    model = Decoder(SIZES, VOCAB_SIZE)
    lora.convert(model)
    init_weights(model)
    tensors = model.state_dict()
    transforms = StateDictTransforms(adapter=make_adapter("llama", config), converters=(lora,))
    specs = {k: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for k, t in tensors.items()}
    plan = plan_model(transforms, specs, config, max_shard_bytes=2_000)
    assert len(plan.shards) > 4
    for shard in plan.shards:
        counted = Counted(tensors)
        write_shard(new_file(tmp_path / shard.file), plan, shard, counted)
        assert counted.read_bytes == read_bytes(plan, shard)
