"""Notes down every call of torch that a transform makes on meta tensors, as plain data.

Tensors are followed by identity, and what shares memory by storage: an operation that writes in
place must be replayed after all that was read from its storage before, and before all that is read
from it later.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.views import View, whole

_SAME_ORDER = frozenset(
    {"to", "type", "float", "half", "bfloat16", "double", "clone", "contiguous", "reshape"}
    | {"flatten", "unflatten", "view"}
)
"""Calls that keep elements in their order where they give a contiguous tensor of its own."""

_RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"}
    | {"bernoulli", "multinomial", "poisson", "dropout", "alpha_dropout", "feature_dropout"}
    | {"uniform_", "normal_", "random_", "exponential_", "bernoulli_", "geometric_", "cauchy_"}
)
"""Calls that make another tensor each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Where a tensor comes from."""

    holder: str | int | Tensor
    """The input of this name, what the operation of this number returned, or a constant."""
    path: tuple[int, ...] = ()
    """Position in what the operation returned: empty for a tensor, one number for a tuple's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of torch, the tensors of its arguments replaced by where they come from."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    values: tuple[Value, ...]
    """Every tensor among the arguments."""
    after: tuple[int, ...]
    """Operations that must have run before, because something is written in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An output: where it comes from, and the operations that write into it in place."""

    value: Value
    after: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Sees every call of torch while a transform runs, and notes it down."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._kept: list[Tensor] = list(inputs.values())
        """Tensors and storages are told apart by address: none may be freed while recording."""
        self._values = {id(meta): Value(holder=key) for key, meta in inputs.items()}
        self._input_of = {_storage(meta): key for key, meta in inputs.items()}
        self._readers: dict[int, list[int]] = {}
        self._writers: dict[int, list[int]] = {}
        self._elements = {
            _storage(meta): (whole(key, meta.shape), meta.dtype) for key, meta in inputs.items()
        }
        """By storage: what its elements are, one after the other, if they are an input's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `func` returns on meta tensors; noted down if it makes or changes a tensor."""
        _refuse_random(func)
        given = (tuple(args), dict(kwargs or {}))
        tensors = _tensors_in(given)
        on_meta, metas = _on_meta(given, tensors)
        versions = [tensor._version for tensor in metas]
        returned = _called(func, *on_meta)
        written = [t for t, version in zip(metas, versions, strict=True) if t._version != version]
        made = [(path, t) for path, t in _paths_in(returned) if id(t) not in self._values]
        if made or written:
            self._refuse_changed_inputs(func, written)
            for path, tensor in made:
                self._know(tensor, Value(holder=len(self.operations), path=path))
                self._follow(func, metas, tensor)
            self._note(func, given, tensors=tensors, written=written)
        return returned

    def result(self, name: str, value: Any) -> Result:
        """Where an output of the transform comes from."""
        if not isinstance(value, Tensor):
            raise StateDictError(
                f"the transform makes {name}, which is a {type(value).__name__} and no tensor",
                safe="nothing was written",
                do="let it return tensors alone",
            )
        writers = self._writers.get(_storage(value), ()) if value.is_meta else ()
        return Result(value=self._value_of(value), after=tuple(writers))

    def view(self, tensor: Tensor) -> View | None:
        """The elements of one input that the tensor holds; None if it is more than a view."""
        if not tensor.is_meta or _storage(tensor) in self._writers:
            return None
        elements, dtype = self._elements.get(_storage(tensor), (None, None))
        if elements is None or tensor.dtype is not dtype or tensor.is_conj() or tensor.is_neg():
            return None
        return elements.of(tensor)

    def _follow(self, func: Callable[..., Any], metas: Sequence[Tensor], made: Tensor) -> None:
        """What the elements of a new tensor are, if they are those of the only one given."""
        if len(metas) != 1 or getattr(func, "__name__", "") not in _SAME_ORDER:
            return
        given = self.view(metas[0])
        if given is None or _storage(made) in self._elements or not made.is_contiguous():
            return
        view = given if made.dtype is metas[0].dtype else given.cast(made.dtype)
        self._elements[_storage(made)] = view, made.dtype

    def _note(
        self,
        func: Callable[..., Any],
        given: tuple[Any, Any],
        *,
        tensors: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        index = len(self.operations)
        storages = {_storage(tensor) for tensor in tensors if tensor.is_meta}
        changed = {_storage(tensor) for tensor in written}
        after = [w for storage in storages for w in self._writers.get(storage, ())]
        after += [r for storage in changed for r in self._readers.get(storage, ())]
        for storage in storages:
            self._readers.setdefault(storage, []).append(index)
        for storage in changed:
            self._writers.setdefault(storage, []).append(index)
        args, kwargs = replaced(given, self._referred)
        self.operations.append(
            Operation(
                function=_kept_function(func),
                args=args,
                kwargs=kwargs,
                values=tuple(self._value_of(tensor) for tensor in tensors),
                after=tuple(dict.fromkeys(after)),
            )
        )

    def _know(self, tensor: Tensor, value: Value) -> None:
        self._kept.append(tensor)
        self._values[id(tensor)] = value

    def _value_of(self, tensor: Tensor) -> Value:
        known = self._values.get(id(tensor))
        if known is None and tensor.is_meta:
            raise StateDictError(
                f"a tensor of shape {tuple(tensor.shape)} was made in a way that is not seen",
                safe="nothing was written",
                do="make it with functions of torch alone",
            )
        return known or Value(holder=tensor)

    def _referred(self, value: Any) -> Any:
        """An argument as it is kept: no tensor but constants, and no meta device."""
        return self._value_of(value) if isinstance(value, Tensor) else torch.device("cpu")

    def _refuse_changed_inputs(self, func: Callable[..., Any], written: Sequence[Tensor]) -> None:
        for tensor in written:
            key = self._input_of.get(_storage(tensor))
            is_own = id(tensor) in self._values
            if key is not None or not is_own:
                raise StateDictError(
                    f"the transform changes its input: {_name(func)} writes into "
                    f"{key or 'a tensor that it holds'}",
                    safe="nothing was written",
                    do="work on a clone, or use the form of the operation that is not in place",
                )


def _refuse_random(func: Callable[..., Any]) -> None:
    if getattr(func, "__name__", "") in _RANDOM:
        raise StateDictError(
            f"the transform calls {_name(func)}: what it makes would be another tensor each time",
            safe="nothing was written",
            do="make outputs of the checkpoint's tensors alone",
        )


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` returns for these arguments.

    Raises:
        StateDictError: it cannot be known without values, or the shapes do not fit.
    """
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise StateDictError(
            f"the transform calls {_name(func)}, which cannot be done without values, or does not "
            f"fit the tensors: {error}",
            safe="nothing was written",
            do="decide from names, shapes and dtypes alone, never from what a tensor holds",
        ) from error


def _on_meta(given: tuple[Any, Any], tensors: list[Tensor]) -> tuple[tuple[Any, Any], list[Tensor]]:
    """The arguments and their tensors, constants among them replaced by ones without values."""
    if all(tensor.is_meta for tensor in tensors):
        return given, tensors
    on_meta = replaced(given, _without_values)
    return on_meta, _tensors_in(on_meta)


def _without_values(value: Any) -> Any:
    is_constant = isinstance(value, Tensor) and not value.is_meta
    return torch.empty_like(value, device="meta") if is_constant else value


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every tensor, value and device in it changed."""
    if isinstance(value, Tensor | Value | torch.device):
        return change(value)
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return slice(*(replaced(part, change) for part in parts))
    if isinstance(value, dict):
        return {key: replaced(part, change) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(replaced(part, change) for part in value)
    return value


def _tensors_in(value: Any) -> list[Tensor]:
    """Tensors of nested arguments, each as often as it stands there."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors_in(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors_in(part)]
    if isinstance(value, slice):
        return _tensors_in((value.start, value.stop, value.step))
    return []


def _paths_in(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Tensors that a call returned, and where in it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for position, part in enumerate(value):
            yield from _paths_in(part, (*path, position))


def _kept_function(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`; the getter of a property like `.T`, which does not pickle, in a form that does."""
    if getattr(func, "__name__", "") != "__get__":
        return func
    name: str | None = getattr(getattr(func, "__self__", None), "__name__", None)
    return operator.attrgetter(name) if name else func


def _storage(tensor: Tensor) -> int:
    """Equal for tensors that share memory."""
    return tensor.untyped_storage()._cdata


def _name(func: Callable[..., Any]) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))
