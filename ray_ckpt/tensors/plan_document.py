"""An export's plan as plain data: every file, every tensor, the bytes it is made of and how.

model-00001-of-00002.safetensors
model.embed_tokens.weight   bfloat16 [256, 32]   tok_embeddings.weight, cast to bfloat16
__0_0.distcp from byte 64, 33000 bytes; __1_0.distcp from byte 64, 33000 bytes
"""

from collections.abc import Sequence
from typing import Any

from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.recording import Output
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.views import View

AS_IT_IS = "as it is"


def plan_document(plan: ExportPlan, step: int, index: StepIndex) -> dict[str, Any]:
    """JSON values: `files`, each with its `tensors`; sizes in bytes.

    `index` says where the tensors of the step lie.
    """
    return {
        "step": step,
        "dtype": plan.dtype,
        "bytes": plan.total_bytes,
        "memory_bytes": plan.memory_bytes,
        "files": [_file(plan, shard, index) for shard in plan.shards],
    }


def _file(plan: ExportPlan, shard: OutputShard, index: StepIndex) -> dict[str, Any]:
    return {
        "file": shard.file,
        "bytes": shard.size_bytes,
        "reads_bytes": sum(at["length"] for key in shard.sources for at in _places(index, key)),
        "tensors": [_tensor(plan, name, index) for name in shard.outputs],
    }


def _tensor(plan: ExportPlan, name: str, index: StepIndex) -> dict[str, Any]:
    output = plan.recording.outputs[name]
    return {
        "name": name,
        "dtype": str(output.spec.dtype).removeprefix("torch."),
        "shape": list(output.spec.shape),
        "bytes": output.spec.size_bytes,
        "how": _how(plan, name, output),
        "sources": [{"name": key, "bytes_at": _places(index, key)} for key in output.sources],
    }


def _how(plan: ExportPlan, name: str, output: Output) -> Sequence[str]:
    """In which order what is done."""
    if output.view is None:
        return plan.recording.calls(name)
    return _seen(output.view) or [AS_IT_IS]


def _seen(view: View) -> list[str]:
    order = [] if view.is_contiguous else ["in another order"]
    return [*order, *(f"cast to {str(dtype).removeprefix('torch.')}" for dtype in view.casts)]


def _places(index: StepIndex, key: str) -> list[dict[str, Any]]:
    places = map(index.place, index.pieces(index.numbers[key]))
    return [{"file": file, "offset": begin, "length": length} for file, begin, length in places]
