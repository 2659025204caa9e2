"""A transform is written once as a function `sd -> sd`, and run piece by piece from its recording.

    record   runs it once on meta tensors: no value is read, however large the model is
    outputs  each output's shape, dtype, and the inputs that it is made of
    run      makes some of the outputs from real tensors, by the very same operations

Knows nothing of names, adapters or files. A transform may do what needs shapes alone; a branch on
values and a change of its input are refused. What it does in place to tensors of its own, also
through views, is replayed in the order it was done. A recording is plain data and pickles.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.tensors.recorder import Operation, Recorder, Result, Value, replaced
from ray_ckpt.tensors.views import View

Transform = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def on_meta(self) -> Tensor:
        """A tensor of this shape and dtype that holds nothing."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor that a transform makes."""

    spec: TensorSpec
    sources: tuple[str, ...]
    """Inputs that it is made of, each once, in order of use."""
    view: View | None
    """Which elements of its one source it holds; None if it is more than a view of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a transform does, as plain data."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, Output]
    operations: Sequence[Operation]
    results: Mapping[str, Result]

    def run(self, names: Iterable[str], read: Read) -> dict[str, Tensor]:
        """These outputs, bit for bit what the transform would make of the same tensors.

        Args:
            names: which; those made of the same sources should stand together.
            read: gives an input, contiguous and on the CPU. It is asked once for each source, when
                it is first needed; every tensor is dropped once nothing needs it any more.

        Returns:
            Tensors by name; one may share storage with its source or with another.
        """
        return dict(self.each(names, read))

    def calls(self, name: str) -> tuple[str, ...]:
        """What is called to make this output, in order: `reshape`, `transpose`, `to`."""
        steps = _needed(self.operations, self.results[name], set())
        functions = (self.operations[index].function for index in steps)
        return tuple(getattr(function, "__name__", str(function)) for function in functions)

    def each(
        self, names: Iterable[str], read: Read, *, device: str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Like `run`, one after the other, so that each can be let go before the next is made.

        What is computed on another device than the CPU may differ in its last bits; it comes back.
        """
        return _Replay(self, tuple(names), read, torch.device(device)).outputs()


def record(transform: Transform, inputs: Mapping[str, TensorSpec]) -> Recording:
    """What `transform` does with a state dict of these names, shapes and dtypes.

    Raises:
        StateDictError: it changes its input, asks for values, or does not fit the shapes; the
            operation is named.
    """
    metas = {key: spec.on_meta() for key, spec in inputs.items()}
    recorder = Recorder(metas)
    with torch.no_grad(), torch.device("meta"), recorder:
        made = dict(transform(dict(metas)))
    results = {name: recorder.result(name, value) for name, value in made.items()}
    sources = _sources(recorder.operations)
    return Recording(
        inputs=dict(inputs),
        outputs={
            name: Output(
                spec=TensorSpec(shape=tuple(made[name].shape), dtype=made[name].dtype),
                sources=_union([result.value.holder, *result.after], sources),
                view=recorder.view(made[name]),
            )
            for name, result in results.items()
        },
        operations=tuple(recorder.operations),
        results=results,
    )


class _Replay:
    """One run of a recording on real tensors."""

    def __init__(
        self, recording: Recording, names: Sequence[str], read: Read, device: torch.device
    ) -> None:
        self._device = device
        self._operations = recording.operations
        self._results = {name: recording.results[name] for name in names}
        self._read = read
        self._held: dict[str | int, Any] = {}
        """What was read or made and is still needed."""
        seen: set[int] = set()
        self._steps = {
            name: _needed(self._operations, result, seen) for name, result in self._results.items()
        }
        uses = [value for index in seen for value in self._operations[index].values]
        uses += [result.value for result in self._results.values()]
        self._uses = Counter(value.holder for value in uses if not isinstance(value.holder, Tensor))

    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """Output by output, so that little is held at once."""
        for name, result in self._results.items():
            with torch.no_grad(), self._device:
                for index in self._steps[name]:
                    self._perform(index)
            yield name, self._take(result.value).cpu()

    def _perform(self, index: int) -> None:
        operation = self._operations[index]
        args, kwargs = replaced((operation.args, operation.kwargs), self._take)
        returned = operation.function(*args, **kwargs)
        if self._uses[index]:
            self._held[index] = returned

    def _take(self, value: Any) -> Any:
        """The tensor a value stands for; it is let go with its last use."""
        if not isinstance(value, Value):
            return value
        holder = value.holder
        if isinstance(holder, Tensor):
            return holder.to(self._device)
        if isinstance(holder, str) and holder not in self._held:
            self._held[holder] = self._read(holder).to(self._device)
        found = self._held[holder]
        self._uses[holder] -= 1
        if not self._uses[holder]:
            del self._held[holder]
        for position in value.path:
            found = found[position]
        return found


def _needed(operations: Sequence[Operation], result: Result, seen: set[int]) -> list[int]:
    """Operations that an output needs and that were not seen before, in an order that works."""
    needed: list[int] = []
    waiting = [result.value.holder, *result.after]
    while waiting:
        index = waiting.pop()
        if isinstance(index, int) and index not in seen:
            seen.add(index)
            needed.append(index)
            waiting += [value.holder for value in operations[index].values]
            waiting += operations[index].after
    return sorted(needed)


def _sources(operations: Sequence[Operation]) -> list[tuple[str, ...]]:
    """For each operation the inputs that what it makes is made of."""
    found: list[tuple[str, ...]] = []
    for operation in operations:
        holders = [value.holder for value in operation.values]
        found.append(_union([*holders, *operation.after], found))
    return found


def _union(holders: Iterable[Any], sources: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    keys: dict[str, None] = {}
    for holder in holders:
        if isinstance(holder, str):
            keys[holder] = None
        elif isinstance(holder, int):
            keys.update(dict.fromkeys(sources[holder]))
    return tuple(keys)
