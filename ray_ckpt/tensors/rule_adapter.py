"""The engine that applies an adapter's table of rules.

A table is total in both directions: a tensor that no rule speaks for is an error, so is a rule some
of whose tensors are lacking, and so is, for a whole model, a rule that matches nothing.
"""

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.layouts import Tensors
from ray_ckpt.tensors.rules import Rule

_LOG = logging.getLogger(__name__)
_NAMES_TOLD = 20
Key = TypeVar("Key", int, str)


class RuleAdapter:
    """A StateDictAdapter made of a table of rules."""

    def __init__(self, family: str, rules: Sequence[Rule], *, num_layers: int = 0) -> None:
        self.family = family
        pairs = [rule for rule in rules if rule.native]
        links = [link for rule in pairs for link in _links(rule, range(num_layers))]
        self._to_hf = _Direction(family, "native", links)
        self._from_hf = _Direction(family, "Hugging Face", [link.mirrored() for link in links])
        self._uncast = {name for link in links if not link.is_cast for name in link.sources}
        unused = [fnmatch.translate(name) for rule in rules if not rule.native for name in rule.hf]
        self._unused = re.compile("|".join(unused)) if unused else None

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """HF names and values; the input is left as it is. Whole rules of a model will do.

        Raises:
            StateDictError: a tensor that no rule speaks for, or a rule lacks some of its tensors.
        """
        return self._to_hf.apply(state_dict)

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit."""
        used = self._used(state_dict)
        left = [name for name in state_dict if name not in used]
        if left:
            _LOG.warning("no part of the model num_tensors=%d names=%s", len(left), _told(left))
        return self._from_hf.apply({name: state_dict[name] for name in used})

    def is_cast(self, native: str) -> bool:
        """Whether an export in another type casts the tensor of this native name."""
        return native not in self._uncast

    def expect_whole(self, native: Iterable[str]) -> None:
        """Returns if these are all native tensors of the model, and no other.

        Raises:
            StateDictError: a key that no rule speaks for; or a rule, or a layer, that is lacking.
        """
        self._to_hf.expect_whole(native)

    def expect_whole_hf(self, hf: Iterable[str]) -> None:
        """Returns if these are all HF tensors of the model; ones that are left out may be there."""
        self._from_hf.expect_whole(self._used(hf))

    def _used(self, hf: Iterable[str]) -> dict[str, None]:
        """Names that a rule must speak for, in order."""
        unused = self._unused
        return {name: None for name in hf if unused is None or not unused.match(name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """One rule in one layer and one direction, its names written out."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    patterns: tuple[str, ...]
    """Of the sources."""
    target_patterns: tuple[str, ...]
    layer: int | None
    apply: Callable[[Tensors], Tensors]
    undo: Callable[[Tensors], Tensors]
    is_cast: bool

    def mirrored(self) -> "_Link":
        """The other direction."""
        return _Link(
            sources=self.targets,
            targets=self.sources,
            patterns=self.target_patterns,
            target_patterns=self.patterns,
            layer=self.layer,
            apply=self.undo,
            undo=self.apply,
            is_cast=self.is_cast,
        )


def _links(rule: Rule, layers: Iterable[int]) -> list[_Link]:
    """The rule written out for every layer; once if its names have no layer number."""
    numbered = any("{n}" in pattern for pattern in (*rule.native, *rule.hf))
    chosen = (layers if rule.layers is None else rule.layers) if numbered else [None]
    return [
        _Link(
            sources=tuple(pattern.replace("{n}", str(layer)) for pattern in rule.native),
            targets=tuple(pattern.replace("{n}", str(layer)) for pattern in rule.hf),
            patterns=rule.native,
            target_patterns=rule.hf,
            layer=layer,
            apply=rule.to_hf,
            undo=rule.from_hf,
            is_cast=rule.is_cast,
        )
        for layer in chosen
    ]


class _Direction:
    """All links of one direction, found by the name of any of their sources."""

    def __init__(self, family: str, kind: str, links: Sequence[_Link]) -> None:
        self._family = family
        self._kind = kind
        self._links = links
        self._link_of = {name: link for link in links for name in link.sources}
        assert len(self._link_of) == sum(len(link.sources) for link in links), "a name in two rules"

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Targets of every rule whose sources are given, in the order of their first source."""
        self._expect_known(state_dict)
        links = {id(link): link for link in (self._link_of[name] for name in state_dict)}.values()
        self._expect_given([name for link in links for name in link.sources], state_dict)
        made: dict[str, Tensor] = {}
        for link in links:
            tensors = link.apply(tuple(state_dict[name] for name in link.sources))
            if len(tensors) != len(link.targets):
                raise StateDictError(
                    f"{link.sources[0]} holds {len(tensors)} tensors, the {self._family} adapter "
                    f"expects {len(link.targets)}: {_told(link.targets)}",
                    safe="nothing was loaded or written",
                    do="check the model's config (number of experts)",
                )
            made.update(zip(link.targets, tensors, strict=True))
        return made

    def expect_whole(self, names: Iterable[str]) -> None:
        """Returns if the names are the sources of all rules."""
        given = set(names)
        self._expect_known(given)
        self._expect_given(self._link_of, given)

    def _expect_known(self, names: Iterable[str]) -> None:
        strangers = sorted(name for name in names if name not in self._link_of)
        if strangers:
            raise StateDictError(
                f"no rule of the {self._family} adapter speaks for these {self._kind} tensors: "
                + _told(strangers),
                safe="nothing was loaded or written, and no tensor is ever left out in silence",
                do="add a rule to the adapter, or name the model's own family",
            )

    def _expect_given(self, names: Iterable[str], given: Iterable[str]) -> None:
        lacking = [name for name in names if name not in given]
        if lacking:
            raise StateDictError(
                f"the {self._family} adapter expects {len(lacking)} {self._kind} tensors that are "
                f"not there: {_told(self._summed_up(lacking))}",
                safe="nothing was loaded or written",
                do="check the model's family and config (tied embeddings, number of layers and "
                "experts)",
            )

    def _summed_up(self, lacking: Sequence[str]) -> list[str]:
        """Layers of which nothing is there, rules of which nothing is there, else single names."""
        absent = set(lacking)
        layers = _absent_as_a_whole(
            (link.layer, name in absent)
            for link in self._links
            if link.layer is not None
            for name in link.sources
        )
        patterns = _absent_as_a_whole(
            (pattern, name in absent)
            for link in self._links
            if link.layer not in layers
            for pattern, name in zip(link.patterns, link.sources, strict=True)
        )
        told = dict.fromkeys(f"all of layer {layer}" for layer in sorted(layers))
        for name in lacking:
            link = self._link_of[name]
            if link.layer not in layers:
                pattern = link.patterns[link.sources.index(name)]
                told[pattern if pattern in patterns else name] = None
        return list(told)


def _absent_as_a_whole(facts: Iterable[tuple[Key, bool]]) -> set[Key]:
    """Keys that are never told to be there."""
    there: Counter[Key] = Counter()
    for key, absent in facts:
        there[key] += not absent
    return {key for key, count in there.items() if count == 0}


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(names[:_NAMES_TOLD]) + more
