"""How many bytes of a step an export will read, known from its plan alone.

Each shard is made by itself: what two of them are made of is read for both, wherever they are made.
Knows nothing of chunks: what frames them in the step's files is not counted.
"""

from ray_ckpt.tensors.chunks import BLOCK_BYTES
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.views import View


def node_read_bytes(plan: ExportPlan, num_nodes: int) -> list[int]:
    """Bytes that each of so many nodes reads, if the shards are dealt out in turn."""
    shards = [plan.shards[node::num_nodes] for node in range(num_nodes)]
    return [sum(read_bytes(plan, shard) for shard in dealt) for dealt in shards]


def read_bytes(plan: ExportPlan, shard: OutputShard) -> int:
    """Bytes that are read to make one shard; what is read twice counts twice.

    A view is read in blocks, with what lies between its elements. What is more than a view is made
    of whole tensors, each read once for the shard.
    """
    inputs = plan.recording.inputs
    outputs = [plan.recording.outputs[name] for name in shard.outputs]
    views = [output.view for output in outputs if output.view is not None]
    wholes = {key for output in outputs if output.view is None for key in output.sources}
    in_blocks = sum(_view_bytes(view, inputs[view.source].dtype.itemsize) for view in views)
    return in_blocks + sum(inputs[key].size_bytes for key in wholes)


def _view_bytes(view: View, item_bytes: int) -> int:
    return item_bytes * sum(block.span for block in view.blocks(BLOCK_BYTES // item_bytes))
