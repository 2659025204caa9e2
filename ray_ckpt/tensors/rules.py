"""Rules that pair native tensor names with Hugging Face ones, and the engine that applies a table.

A table is total in both directions: a tensor that no rule speaks for is an error, and so is a rule
that matches nothing. `{n}` in a name stands for a layer number, the same on both sides.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ray_ckpt.core.errors import StateDictError


def unchanged(tensor: Tensor) -> Tensor:
    """The very tensor."""
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One pair of names, and how values differ between them."""

    native: str
    hf: str
    to_hf: Callable[[Tensor], Tensor] = unchanged
    from_hf: Callable[[Tensor], Tensor] = unchanged


def rename(native: str, hf: str) -> Rule:
    """The same values under another name."""
    return Rule(native=native, hf=hf)


def rotary(native: str, hf: str, *, num_heads: int) -> Rule:
    """A projection whose rows rotary embedding pairs up: (2i, 2i+1) natively, (i, i+d/2) in HF."""
    return Rule(
        native=native,
        hf=hf,
        to_hf=lambda weight: interleaved_to_halves(weight, num_heads),
        from_hf=lambda weight: halves_to_interleaved(weight, num_heads),
    )


class RuleAdapter:
    """A StateDictAdapter made of a table of rules."""

    def __init__(self, family: str, rules: Sequence[Rule]) -> None:
        self.family = family
        self._rules = tuple(rules)

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """HF names and values; the input is left as it is. Part of a model will do."""
        pairs = self._match(state_dict, [rule.native for rule in self._rules], "native")
        return {
            _fill(self._rules[i].hf, layer): self._rules[i].to_hf(state_dict[key])
            for key, (i, layer) in pairs.items()
        }

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit."""
        pairs = self._match(state_dict, [rule.hf for rule in self._rules], "Hugging Face")
        return {
            _fill(self._rules[i].native, layer): self._rules[i].from_hf(state_dict[key])
            for key, (i, layer) in pairs.items()
        }

    def sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """For a whole model: each HF name with the native names it is made of.

        Raises:
            StateDictError: a key that no rule speaks for, or a rule that matches no key.
        """
        pairs = self._match(keys, [rule.native for rule in self._rules], "native")
        used = {index for index, _ in pairs.values()}
        idle = [rule.native for index, rule in enumerate(self._rules) if index not in used]
        if idle:
            raise StateDictError(
                f"the {self.family} adapter expects tensors that are not there: {', '.join(idle)}",
                safe="nothing was written",
                do="check the model's family and config (tied embeddings, number of layers)",
            )
        return {_fill(self._rules[i].hf, layer): (key,) for key, (i, layer) in pairs.items()}

    def _match(
        self, keys: Iterable[str], patterns: Sequence[str], kind: str
    ) -> dict[str, tuple[int, str]]:
        """For each key the index of its rule, and the layer number in its name."""
        compiled = [re.compile(re.escape(p).replace(r"\{n\}", r"(\d+)")) for p in patterns]
        pairs: dict[str, tuple[int, str]] = {}
        unmatched: list[str] = []
        for key in keys:
            found = ((i, m) for i, regex in enumerate(compiled) if (m := regex.fullmatch(key)))
            index, match = next(found, (-1, None))
            if match is None:
                unmatched.append(key)
            else:
                pairs[key] = (index, match[1] if match.groups() else "")
        if unmatched:
            raise StateDictError(
                f"no rule of the {self.family} adapter speaks for these {kind} tensors: "
                + ", ".join(sorted(unmatched)),
                safe="nothing was written, and no tensor is ever left out in silence",
                do="add a rule to the adapter, or name the model's own family",
            )
        return pairs


def interleaved_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rotary rows reordered from interleaved pairs to two halves.

    For head_dim 4, rows 0 1 2 3 of each head become 0 2 1 3.

    Args:
        weight: [num_heads * head_dim, hidden], any dtype; head_dim is even.
        num_heads: query heads for q_proj, key/value heads for k_proj.

    Returns:
        A new tensor of the same shape and dtype; undone by :func:`halves_to_interleaved`.

    Source: what transformers' Llama does with the two halves of a head (`rotate_half`).
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def halves_to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Undoes :func:`interleaved_to_halves`; [num_heads * head_dim, hidden] in and out."""
    rows, hidden = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, hidden)
    return halves.transpose(1, 2).reshape(rows, hidden)


def _fill(pattern: str, layer: str) -> str:
    return pattern.replace("{n}", layer)
