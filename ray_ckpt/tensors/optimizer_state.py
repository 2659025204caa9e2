"""The state of one or several optimizers by parameter name, whatever the sharding or grouping.

    state.<fqn>.<name>            as the optimizer has it, `exp_avg` for example
    param_groups.<fqn>.<key>      every hyper-parameter, once a parameter

A parameter that has had no gradient yet has no state: it is saved without, and comes back without.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.optim import Optimizer

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.fqn import canonical_fqn

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"
_OWN = frozenset({_PARAMS, "param_names"})
"""Of a group: which parameters it has. Our keys say it already, for every way to make a group."""


class OptimizerState:
    """A DCP `Stateful` around optimizers of one model; no parameter is in two of them."""

    def __init__(self, parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._parts = parts
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """What the optimizers hold; nothing of them changes.

        Raises:
            StateDictError: one holds a parameter that is none of the model's.
        """
        return self._flat([optimizer.state_dict() for optimizer in self._optimizers])

    def wanted(self, held: Collection[str]) -> dict[str, Any]:
        """What a source that holds these keys is to supply, with memory to read it into.

        State is asked for even where the optimizer has none yet; but not for a parameter that the
        source knows and holds no state of. The memory is an optimizer's own where it has state of
        every parameter. The optimizers are as they were.
        """
        stateless = _beginnings(held, _GROUPS) - _beginnings(held, _STATE)
        return self._flat([_with_state(o) for o in self._optimizers], stateless=stateless)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Undoes :meth:`state_dict`."""
        for optimizer, names in zip(self._optimizers, self._names(), strict=True):
            own = optimizer.state_dict()
            states = _states(state_dict, set(names))
            loaded = {at: states[fqn] for at, fqn in enumerate(names) if fqn in states}
            groups = [_group(group, names, state_dict) for group in own[_GROUPS]]
            optimizer.load_state_dict({**own, _STATE: loaded, _GROUPS: groups})

    def _flat(
        self, own: Sequence[Mapping[str, Any]], stateless: Collection[str] = ()
    ) -> dict[str, Any]:
        """State dicts of the optimizers under the names of parameters."""
        flat: dict[str, Any] = {}
        for state_dict, names in zip(own, self._names(), strict=True):
            for at, fqn in enumerate(names):
                state = state_dict[_STATE].get(at, {}) if fqn not in stateless else {}
                flat.update(_leaves(f"{_STATE}.{fqn}", state))
            for group in state_dict[_GROUPS]:
                options = {key: value for key, value in group.items() if key not in _OWN}
                for at in group[_PARAMS]:
                    flat.update((f"{_GROUPS}.{names[at]}.{k}", v) for k, v in options.items())
        return flat

    def _names(self) -> list[list[str]]:
        """For each optimizer the names of its parameters, in its own order."""
        fqn_of = {
            parameter: canonical_fqn(name)
            for part in self._parts
            for name, parameter in part.named_parameters()
        }
        names = [
            [fqn_of.get(p, "") for group in optimizer.param_groups for p in group[_PARAMS]]
            for optimizer in self._optimizers
        ]
        num_strangers = sum(name == "" for one in names for name in one)
        if num_strangers:
            raise StateDictError(
                f"the optimizer holds {num_strangers} parameters that are none of the model's",
                "optimizer",
                "nothing was saved or loaded",
                "make the optimizer after the model was converted and sharded",
            )
        return names


def _with_state(optimizer: Optimizer) -> dict[str, Any]:
    """Its state dict, or the one it would have after a step with gradients of every parameter.

    Torch makes one by a step with gradients and a learning rate of zero.
    """
    parameters = [p for group in optimizer.param_groups for p in group[_PARAMS]]
    if all(optimizer.state.get(parameter) for parameter in parameters):
        return optimizer.state_dict()
    state, gradients = optimizer.state, [parameter.grad for parameter in parameters]
    optimizer.state = defaultdict(dict)
    for parameter in parameters:
        parameter.grad = None
    try:
        _init_optim_state(optimizer)
        return optimizer.state_dict()
    finally:
        optimizer.state = state
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in `value` that is no mapping, under a dotted key."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, child in value.items():
        yield from _leaves(f"{key}.{name}", child)


def _states(state_dict: Mapping[str, Any], fqns: Collection[str]) -> dict[str, dict[str, Any]]:
    """Parameter name to its state, dotted names inside it taken apart again."""
    states: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        kind, _, rest = key.partition(".")
        fqn = next((f for f in _dotted(rest) if f in fqns), None) if kind == _STATE else None
        if fqn is not None:
            *path, last = rest.removeprefix(f"{fqn}.").split(".")
            place = states.setdefault(fqn, {})
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value
    return states


def _group(
    group: Mapping[str, Any], names: Sequence[str], state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """A parameter group with the hyper-parameters of its first parameter."""
    if not group[_PARAMS]:
        return dict(group)
    first = f"{_GROUPS}.{names[group[_PARAMS][0]]}"
    return {k: v if k in _OWN else state_dict[f"{first}.{k}"] for k, v in group.items()}


def _beginnings(keys: Iterable[str], kind: str) -> set[str]:
    """Everything that a parameter could be called that one of these keys is about."""
    about = (key.partition(".")[2] for key in keys if key.startswith(f"{kind}."))
    return {beginning for rest in about for beginning in _dotted(rest)}


def _dotted(key: str) -> list[str]:
    """`a`, `a.b` for `a.b.c`."""
    words = key.split(".")
    return [".".join(words[:count]) for count in range(1, len(words))]
