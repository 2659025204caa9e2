"""How two checkpoints or exports differ, tensor by tensor, in bounded memory.

    equal     every element has the same value; NaN is like NaN, 0 like -0
    values    elements differ by more than the tolerance
    dtype     another type, whatever the values; not looked at where a tolerance was given
    shape     another shape: no values were compared
    only a    b has none of this name
    only b    a has none of this name
    bytes     no tensor, and its bytes differ: nothing that is pickled is run

Bytes that two manifests say are the same are not read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor

from ray_ckpt.core.errors import UsageError
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.tensors.comparable import (
    Comparable,
    HfExport,
    Piece,
    Planned,
    Step,
    as_exported,
)
from ray_ckpt.tensors.read_ahead import ahead
from ray_ckpt.tensors.recording import TensorSpec

Side: TypeAlias = Step | HfExport
Chosen: TypeAlias = Callable[[str], bool]
"""Whether what has this name is compared."""


class Verdict(StrEnum):
    """How two tensors of one name are, the worst first."""

    ONLY_A = "only a"
    ONLY_B = "only b"
    SHAPE = "shape"
    VALUES = "values"
    DTYPE = "dtype"
    BYTES = "bytes"
    EQUAL = "equal"


_RANKS = {verdict: rank for rank, verdict in enumerate(Verdict)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What is known of one name."""

    name: str
    verdict: Verdict
    a: TensorSpec | None = None
    """None if there is no such tensor."""
    b: TensorSpec | None = None
    max_difference: float = 0.0
    """The largest one; infinite where one of both is NaN, or where one is infinite."""
    at: tuple[int, ...] | None = None
    """Where that is; None if nothing differs."""
    num_differing: int = 0
    """Elements that differ by more than the tolerance."""
    was_read: bool = False

    @property
    def severity(self) -> tuple[int, float, str]:
        """The worst is the smallest."""
        return _RANKS[self.verdict], -self.max_difference, self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two folders, compared; the worst first."""

    a: str
    b: str
    results: tuple[Compared, ...]
    note: str | None = None
    """What was compared, where it is not simply one with the other."""

    @property
    def are_equal(self) -> bool:
        """Whether nothing differs."""
        return all(result.verdict is Verdict.EQUAL for result in self.results)


def compare(
    a: Side,
    b: Side,
    *,
    tolerance: float | None = None,
    chosen: Chosen = lambda name: True,
    progress: Progress = UNTOLD,
) -> Comparison:
    """Everything whose name is chosen; a step meets an export as an export of it would be.

    Args:
        a: a folder; while it is read no purge takes it.
        b: the other one.
        tolerance: differences up to it do not count, nor do other types; None counts both.
        chosen: by name.
        progress: is told of the bytes that are read of each side.

    Raises:
        UsageError: no name is chosen.
        IntegrityError: something cannot be read.
    """
    with a.held(), b.held():
        left, right, note = _under_one_naming(a, b)
        names = [n for n in {*left.specs, *right.specs} if chosen(n)]
        others = [n for n in {*left.others, *right.others} if chosen(n)]
        if not names and not others:
            raise UsageError(
                "nothing of that name is in either of them",
                f"{a.uri} and {b.uri}",
                "nothing was changed",
                "look for names with ray-ckpt diff without --only, or ray-ckpt show ROOT STEP",
            )
        results = [
            *_tensors(left, right, names, tolerance, progress),
            *(_other(name, left, right) for name in others),
        ]
    results.sort(key=lambda result: result.severity)
    return Comparison(a=a.uri, b=b.uri, results=tuple(results), note=note)


def _under_one_naming(a: Side, b: Side) -> tuple[Comparable, Comparable, str | None]:
    """Both sides, and what was done to give them the same names."""
    if isinstance(a, Step) and isinstance(b, HfExport):
        side, note = _exported(a, b)
        return side, b, note
    if isinstance(a, HfExport) and isinstance(b, Step):
        side, note = _exported(b, a)
        return a, side, note
    return a, b, None


def _exported(step: Step, export: HfExport) -> tuple[Comparable, str]:
    try:
        side = as_exported(step, export)
    except UsageError as error:
        return step, f"names are compared as they are: {error.what}"
    return side, f"{step.folder} is compared as an export of it would be: its model alone, renamed"


def _tensors(
    a: Comparable, b: Comparable, names: Iterable[str], tolerance: float | None, progress: Progress
) -> Iterator[Compared]:
    pending: list[Compared] = []
    for name in names:
        result = _unread(name, a, b)
        if result.verdict is not Verdict.EQUAL or _is_known_equal(name, a, b):
            yield result
        else:
            pending.append(result)
    progress.begin("compares", sum(result.a.size_bytes for result in pending if result.a))
    tallies = {result.name: _Tally() for result in pending}
    for name, begin, one, other in _pairs(a, b, list(tallies)):
        tallies[name].count(begin, _apart(one, other), tolerance=tolerance or 0.0)
        progress.advance(one.nbytes)
    yield from (_read(result, tallies[result.name], tolerance) for result in pending)


def _unread(name: str, a: Comparable, b: Comparable) -> Compared:
    """What names and shapes say."""
    one, other = a.specs.get(name), b.specs.get(name)
    if one is None or other is None:
        verdict = Verdict.ONLY_A if other is None else Verdict.ONLY_B
    else:
        verdict = Verdict.EQUAL if one.shape == other.shape else Verdict.SHAPE
    return Compared(name=name, verdict=verdict, a=one, b=other)


def _is_known_equal(name: str, a: Comparable, b: Comparable) -> bool:
    if isinstance(a, Planned) or isinstance(b, Planned) or a.specs[name] != b.specs[name]:
        return False
    place = a.places(name)
    return place is not None and place == b.places(name)


def _pairs(
    a: Comparable, b: Comparable, names: Sequence[str]
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Every piece of these tensors on both sides, read ahead: name, first element, a's and b's.

    Pieces are cut by the side that is made, if one is: the other can be read anywhere. What is made
    whole is made one by one.
    """
    cutter, folder = (b, a) if isinstance(b, Planned) else (a, b)
    assert not isinstance(folder, Planned), "only one of them meets a Hugging Face folder"

    def read(item: tuple[str, Piece]) -> tuple[str, int, Tensor, Tensor]:
        name, piece = item
        cut, read = piece.read(), folder.read(name, piece.begin, piece.count)
        return name, piece.begin, *((read, cut) if folder is a else (cut, read))

    whole = [name for name in names if cutter.is_made_whole(name)]
    others = [name for name in names if not cutter.is_made_whole(name)]
    at_once = max(2, a.reads_at_once, b.reads_at_once)
    with ThreadPoolExecutor(at_once) as threads:
        items = ((name, piece) for name in others for piece in cutter.pieces(name))
        yield from ahead(threads, read, items, count=at_once)
    for name in whole:
        yield from (read((name, piece)) for piece in cutter.pieces(name))


@dataclass(slots=True)
class _Tally:
    """What the pieces of one tensor have shown so far."""

    num_differing: int = 0
    max_difference: float = 0.0
    at: int | None = None

    def count(self, begin: int, apart: Tensor | None, *, tolerance: float) -> None:
        """One piece more, from element number `begin` on."""
        if apart is None or not apart.numel():
            return
        self.num_differing += int((apart > tolerance).sum())
        worst, index = apart.max(0)
        if float(worst) > self.max_difference:
            self.max_difference, self.at = float(worst), begin + int(index)


def _apart(a: Tensor, b: Tensor) -> Tensor | None:
    """How far each element is from the other's, as float64; None if they are the same bytes."""
    if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return None
    if a.is_complex() or b.is_complex():
        wide = torch.promote_types(a.dtype, b.dtype)
        return (a.to(wide) - b.to(wide)).abs().double().nan_to_num(nan=torch.inf)
    one, other = a.double(), b.double()
    # large integers that differ may be the same as float64
    is_same = (a == b) if a.dtype == b.dtype else (one == other)
    is_same |= one.isnan() & other.isnan()
    apart = (one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not a.dtype.is_floating_point and not b.dtype.is_floating_point:
        apart = apart.clamp(min=1)
    return apart.masked_fill_(is_same, 0)


def _read(result: Compared, tally: _Tally, tolerance: float | None) -> Compared:
    verdict = Verdict.VALUES if tally.num_differing else Verdict.EQUAL
    assert result.a is not None and result.b is not None, "only what both have is read"
    if verdict is Verdict.EQUAL and tolerance is None and result.a.dtype != result.b.dtype:
        verdict = Verdict.DTYPE
    return replace(
        result,
        verdict=verdict,
        max_difference=tally.max_difference,
        at=None if tally.at is None else _index(tally.at, result.a.shape),
        num_differing=tally.num_differing,
        was_read=True,
    )


def _index(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Where in the tensor the element is that has this number."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(number), tuple(shape)))


def _other(name: str, a: Comparable, b: Comparable) -> Compared:
    one, other = a.others.get(name), b.others.get(name)
    if one is None or other is None:
        verdict = Verdict.ONLY_A if other is None else Verdict.ONLY_B
        return Compared(name=name, verdict=verdict)
    verdict = Verdict.EQUAL if one() == other() else Verdict.BYTES
    return Compared(name=name, verdict=verdict, was_read=True)
