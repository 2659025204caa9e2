"""One file of weights of an export, written once, from its first byte to its last.

    an output that is its input          read straight into the block that is written
    a view: cast, cut out, rows moved    read and made block by block
    all others: merged, dequantized      made tensor by tensor

Memory holds some blocks, and what one tensor of the third kind is made of.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Blocks
from ray_ckpt.storage.digests import STRONG_ALGORITHM
from ray_ckpt.storage.disk.ordered_write import OrderedWrite
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.tensors.chunks import BLOCK_BYTES, bytes_of
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.frames import FRAMES, Frame
from ray_ckpt.tensors.gate import Values
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.read_ahead import ahead
from ray_ckpt.tensors.recording import Output
from ray_ckpt.tensors.views import View


class Tensors(Protocol):
    """What a file is made of: tensors by name, any piece of them."""

    @property
    def reads_at_once(self) -> int:
        """So many reads side by side are faster than one after the other."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor's elements."""
        ...

    def read(self, key: str, begin: int, into: Tensor) -> None:
        """As many elements as `into` has, which is flat, from number `begin` on."""
        ...

    def whole(self, key: str) -> Tensor:
        """One tensor, contiguous and on the CPU; it is not changed."""
        ...


def write_shard(
    blocks: Blocks,
    plan: ExportPlan,
    shard: OutputShard,
    tensors: Tensors,
    *,
    progress: Progress = UNTOLD,
) -> FileEntry:
    """The outputs of one shard are written to a new file; returns its manifest entry.

    Raises:
        IntegrityError: a source cannot be read.
        StorageError: it cannot be written; nothing is left of it.
    """
    outputs = {name: plan.recording.outputs[name] for name in shard.outputs}
    specs = {name: output.spec for name, output in outputs.items()}
    frame = FRAMES[plan.format](specs, plan.file_metadata)
    file = OrderedWrite(blocks, name=shard.file, algorithm=STRONG_ALGORITHM)
    try:
        _Shard(file, frame, tensors, plan, progress=progress).write(outputs)
        return file.close()
    except BaseException:
        file.discard()
        raise


class _Shard:
    """The tensors of one file, and what stands around them."""

    def __init__(
        self,
        file: OrderedWrite,
        frame: Frame,
        tensors: Tensors,
        plan: ExportPlan,
        *,
        progress: Progress,
    ) -> None:
        self._file = file
        self._frame = frame
        self._tensors = tensors
        self._progress = progress
        self._plan = plan
        self._num_threads = torch.get_num_threads()
        """For what is computed. Blocks have a core each already: reading, digesting, writing."""
        self._reads_straight = tensors.reads_at_once == 1

    def write(self, outputs: Mapping[str, Output]) -> None:
        """One after the other, in the order of the frame."""
        outputs = {name: outputs[name] for name in self._frame.specs}
        others = [name for name, output in outputs.items() if output.view is None]
        computed = self._plan.recording.each(others, self._tensors.whole, device=self._plan.device)
        blocks = self._blocks(output.view for output in outputs.values() if output.view)
        self._file.write(memoryview(self._frame.front))
        with ThreadPoolExecutor(self._tensors.reads_at_once) as threads, _torch_threads(1):
            read = ahead(threads, self._read, blocks, count=self._tensors.reads_at_once)
            for name, output in outputs.items():
                values = self._values(name, output)
                if output.view is None:
                    with _torch_threads(self._num_threads):
                        _, tensor = next(computed)
                    self._write(tensor, values)
                elif self._is_straight(output.view):
                    self._pass_on(output.view, values)
                else:
                    for view in self._blocks([output.view]):
                        self._write(view.taken(next(read)), values)
                values.end()
                self._file.write(memoryview(self._frame.behind(name)))

    def _values(self, name: str, output: Output) -> Values:
        return Values(
            name,
            output.spec,
            allow_non_finite=self._plan.allow_non_finite,
            allow_zeros=self._plan.allow_zeros,
        )

    def _blocks(self, views: Iterable[View]) -> Iterator[View]:
        """Of all that is not read straight into place."""
        for view in views:
            if not self._is_straight(view):
                item_bytes = self._tensors.dtype(view.source).itemsize
                yield from view.blocks(BLOCK_BYTES // item_bytes)

    def _is_straight(self, view: View) -> bool:
        return self._reads_straight and view.is_contiguous and not view.casts

    def _read(self, view: View) -> Tensor:
        elements = torch.empty(view.span, dtype=self._tensors.dtype(view.source))
        self._tensors.read(view.source, view.offset, elements)
        return elements

    def _pass_on(self, view: View, values: Values) -> None:
        dtype = self._tensors.dtype(view.source)
        done = 0
        while done < view.num_elements:
            room = self._file.room()
            count = min(len(room) // dtype.itemsize, view.num_elements - done)
            into = torch.frombuffer(room, dtype=dtype, count=count)
            self._tensors.read(view.source, view.offset + done, into)
            values.look(into)
            self._frame.look(bytes_of(into))
            self._file.filled(count * dtype.itemsize)
            self._progress.advance(count * dtype.itemsize)
            done += count

    def _write(self, tensor: Tensor, values: Values) -> None:
        if tensor.numel():
            tensor = tensor.contiguous()
            values.look(tensor)
            self._frame.look(bytes_of(tensor))
            self._file.write(bytes_of(tensor))
            self._progress.advance(tensor.nbytes)


@contextlib.contextmanager
def _torch_threads(count: int) -> Generator[None]:
    """Torch's operations use so many inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
