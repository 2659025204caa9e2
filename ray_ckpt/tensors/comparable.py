"""A checkpoint or an export as tensors that are compared with another's: by name, piece by piece.

    step      `.metadata` and its files; of a foreign one no pickle is run
    export    a Hugging Face folder of safetensors files
    planned   a step as an export of it would be: its names and values, nothing written

Memory holds a few pieces. A merged or dequantized tensor of a planned one is made whole.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ray_ckpt.core import names
from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.listing import manifest_in, sizes_in
from ray_ckpt.storage.readers import reading
from ray_ckpt.tensors.chunks import BLOCK_BYTES
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.hf_reader import HfFolder
from ray_ckpt.tensors.reader import DcpReader, committed_reader
from ray_ckpt.tensors.recording import Recording
from ray_ckpt.tensors.sources import split
from ray_ckpt.tensors.step_tensors import StepTensors
from ray_ckpt.tensors.transforms import TORCH_DTYPES
from ray_ckpt.tensors.views import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements of a tensor that follow one upon the other in row-major order."""

    begin: int
    count: int
    read: Callable[[], Tensor]
    """Gives them, flat."""


class Step:
    """The folder of a DCP checkpoint."""

    def __init__(self, catalog: Catalog, folder: str, manifest: Manifest | None) -> None:
        reader = (
            DcpReader(catalog.store, folder, digests=None)
            if manifest is None
            else committed_reader(catalog.store, folder, manifest)
        )
        self.catalog = catalog
        self.folder = folder
        self.manifest = manifest
        self.tensors = StepTensors(catalog.store, reader)
        self.uri = self.tensors.uri
        self.specs = self.tensors.specs()
        self.others = {key: partial(self.tensors.pickled, key) for key in self.tensors.others()}
        self.reads_at_once = self.tensors.reads_at_once
        self._index = reader.index
        self._digests = {
            e.path: (e.digest, e.size_bytes) for e in (manifest.files if manifest else ())
        }

    def pieces(self, name: str) -> Iterator[Piece]:
        """Blocks."""
        return _blocks(self, name)

    def is_made_whole(self, name: str) -> bool:
        """Never."""
        return False

    def read(self, name: str, begin: int, count: int) -> Tensor:
        """From the chunks that hold them."""
        into = torch.empty(count, dtype=self.specs[name].dtype)
        self.tensors.read(name, begin, into)
        return into

    def places(self, name: str) -> Hashable:
        """Its chunks, each in a file of that digest."""
        if not self._digests:
            return None
        index, number = self._index, self._index.numbers[name]
        found: set[Hashable] = set()
        for piece in index.pieces(number):
            file, *at = index.place(piece)
            part = index.offsets_in(number, piece), index.sizes_in(number, piece)
            found.add((*part, self._digests[file], *at))
        return frozenset(found)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, no purge takes a step of ours."""
        step = names.parse_step(self.folder)
        if self.manifest is None or step is None:
            return contextlib.nullcontext()
        return reading(self.catalog.store, step, who="diff")


class HfExport:
    """A Hugging Face folder."""

    def __init__(self, catalog: Catalog, folder: str, manifest: Manifest | None) -> None:
        self.others: Mapping[str, Callable[[], bytes]] = {}
        self._folder = HfFolder(catalog.store, folder)
        self._manifest = manifest
        self.uri = self._folder.uri
        self.specs = self._folder.specs()
        self.reads_at_once = self._folder.reads_at_once
        self._digests = {e.path: e.digest for e in manifest.files} if manifest else {}

    def pieces(self, name: str) -> Iterator[Piece]:
        """Blocks."""
        return _blocks(self, name)

    def is_made_whole(self, name: str) -> bool:
        """Never."""
        return False

    def read(self, name: str, begin: int, count: int) -> Tensor:
        """From its file."""
        into = torch.empty(count, dtype=self.specs[name].dtype)
        self._folder.read_into(name, begin, into)
        return into

    def places(self, name: str) -> Hashable:
        """Its range of a file of that digest."""
        stored = self._folder.tensors[name]
        digest = self._digests.get(stored.key.rpartition("/")[2])
        return None if digest is None else (digest, stored.begin, stored.end)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: nobody asks readers of an export."""
        return contextlib.nullcontext()

    def made_like_this(self) -> ExportSpec:
        """How such an export is made, as its manifest says, or else the types of its tensors."""
        if self._manifest is not None and self._manifest.lineage.recipe:
            return ExportSpec.of_recipe(self._manifest.lineage.recipe)
        held = [spec.dtype for spec in self.specs.values()]
        dtype = max(TORCH_DTYPES, key=lambda d: held.count(TORCH_DTYPES[d]))
        return ExportSpec(name="compared", dtype=dtype)


class Planned:
    """A step as an export of it would be."""

    def __init__(self, step: Step, recording: Recording) -> None:
        self.uri = step.uri
        self.specs = {name: output.spec for name, output in recording.outputs.items()}
        self.others: Mapping[str, Callable[[], bytes]] = {}
        self.reads_at_once = step.reads_at_once
        self._step = step
        self._recording = recording

    def pieces(self, name: str) -> Iterator[Piece]:
        """Blocks of what is a view; all of what is computed."""
        view = self._recording.outputs[name].view
        if view is None:
            count = self.specs[name].size_bytes // self.specs[name].dtype.itemsize
            yield Piece(begin=0, count=count, read=partial(self._computed, name))
            return
        begin = 0
        item_bytes = self._step.specs[view.source].dtype.itemsize
        for block in view.blocks(BLOCK_BYTES // item_bytes):
            yield Piece(begin=begin, count=block.num_elements, read=partial(self._viewed, block))
            begin += block.num_elements

    def is_made_whole(self, name: str) -> bool:
        """Whether it is computed."""
        return self._recording.outputs[name].view is None

    def _viewed(self, view: View) -> Tensor:
        return view.taken(self._step.read(view.source, view.offset, view.span)).reshape(-1)

    def _computed(self, name: str) -> Tensor:
        made = self._recording.run([name], self._step.tensors.whole)[name]
        return made.contiguous().reshape(-1)


def open_folder_to_compare(path: str) -> Step | HfExport:
    """What lies at a path, `s3://` or `hf://`: a step or an export; reads its index alone.

    Raises:
        UsageError: it is neither.
        IntegrityError: its index is damaged, or would run code.
    """
    catalog, folder = split(path)
    sizes = sizes_in(catalog.store, folder)
    if names.METADATA in sizes:
        return Step(catalog, folder, manifest_in(catalog.store, folder))
    if any(name.endswith(".safetensors") and "/" not in name for name in sizes):
        return HfExport(catalog, folder, manifest_in(catalog.store, folder))
    raise UsageError(
        "neither a checkpoint nor an export of safetensors files is there",
        f"{catalog.uri}/{folder}",
        "nothing was changed",
        "name the folder itself: ROOT/step-500, or ROOT/exports/NAME/step-500",
    )


def as_exported(step: Step, export: HfExport) -> Planned:
    """The step under the names of the export, with the values that an export of its kind has.

    Raises:
        UsageError: the step does not say what model it holds, or cannot be exported so.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
    """
    if step.manifest is None:
        raise UsageError(f"{step.folder} has no manifest, which says what model it holds")
    spec = replace(export.made_like_this(), allow_non_finite=True)
    return Planned(step, plan_export(step.catalog, step.manifest, spec).recording)


def _blocks(side: Step | HfExport, name: str) -> Iterator[Piece]:
    spec = side.specs[name]
    size, step = spec.size_bytes // spec.dtype.itemsize, BLOCK_BYTES // spec.dtype.itemsize
    for begin in range(0, size, step):
        count = min(step, size - begin)
        yield Piece(begin=begin, count=count, read=partial(side.read, name, begin, count))


Comparable: TypeAlias = Step | HfExport | Planned
"""One side of a comparison."""
