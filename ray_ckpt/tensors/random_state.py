"""The random number generators of one rank: Python's, torch's, numpy's global one, its GPU's.

rank_<r>.python    rank_<r>.torch    rank_<r>.numpy    rank_<r>.cuda
"""

import logging
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger("ray_ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generator:
    get: Callable[[], Any]
    """Its state, as plain values and tensors."""
    set: Callable[[Any], None]
    is_here: Callable[[], bool] = lambda: True


def _get_python() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": list(words), "gauss": gauss}


def _set_python(state: Mapping[str, Any]) -> None:
    random.setstate((state["version"], tuple(state["words"]), state["gauss"]))


def _numpy() -> Any:
    """`numpy.random`, or None where there is no numpy: it is no requirement."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy.random


def _get_numpy() -> dict[str, Any]:
    return _plain(_numpy().get_state(legacy=False))


def _plain(value: Any) -> Any:
    """Without arrays, which only a pickle could hold."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


_GENERATORS = {
    "python": _Generator(get=_get_python, set=_set_python),
    "torch": _Generator(get=torch.get_rng_state, set=torch.set_rng_state),
    "numpy": _Generator(
        get=_get_numpy,
        set=lambda state: _numpy().set_state(state),
        is_here=lambda: _numpy() is not None,
    ),
    "cuda": _Generator(
        get=torch.cuda.get_rng_state,  # of the current device, which is the rank's
        set=torch.cuda.set_rng_state,
        is_here=torch.cuda.is_available,
    ),
}


class RandomState:
    """A DCP `Stateful` around the generators that this process has."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._key = f"rank_{rank}"

    def state_dict(self) -> dict[str, Any]:
        """One entry named after the rank, which DCP keeps apart from other ranks'."""
        here = {name: g for name, g in _GENERATORS.items() if g.is_here()}
        return {self._key: {name: generator.get() for name, generator in here.items()}}

    def wanted(self, held: Collection[str]) -> dict[str, Any]:
        """What a source that holds these keys is to supply; the other generators start afresh.

        Those are the ones of a rank that was not there when the step was saved, and of a kind that
        it did not have.
        """
        own = self.state_dict()[self._key]
        begin = {name: f"{self._key}.{name}" for name in own}
        known = {n for n, b in begin.items() if any(k == b or k.startswith(f"{b}.") for k in held)}
        afresh = [name for name in own if name not in known]
        if afresh:
            log.warning(
                "no random state was saved for rank %d of %s: these generators start afresh",
                self._rank,
                ", ".join(afresh),
            )
        return {self._key: {name: own[name] for name in own if name in known}} if known else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The generators go on where they were; those that are not mentioned are left alone."""
        for name, state in state_dict.get(self._key, {}).items():
            _GENERATORS[name].set(state)
