"""Rules that pair native tensor names with Hugging Face ones: the words of an adapter's table.

    rename       one name      <->  one name
    rotary       one name      <->  one name, rows of each head in another order
    transpose    one name      <->  one name, last two dimensions exchanged
    split        one fused     <->  several
    experts      one stacked   <->  one an expert, `{e}` in its name
    left_out     nothing       <->  what Hugging Face stores and training has no use for

`{n}` in a name stands for a layer number, the same on both sides of a rule. `rule_adapter` applies
the table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_ckpt.tensors import layouts
from ray_ckpt.tensors.layouts import Tensors


def unchanged(tensors: Tensors) -> Tensors:
    """The very tensors."""
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Names on both sides, and how values differ between them."""

    native: tuple[str, ...]
    hf: tuple[str, ...]
    to_hf: Callable[[Tensors], Tensors] = unchanged
    """Takes one tensor for each native name, gives one for each HF name; pure."""
    from_hf: Callable[[Tensors], Tensors] = unchanged
    """Undoes it bit for bit."""
    layers: tuple[int, ...] | None = None
    """Layers that have these tensors; None for all."""
    is_cast: bool = True
    """Whether an export in another type casts them."""


def rename(native: str, hf: str) -> Rule:
    """The same values under another name."""
    return Rule(native=(native,), hf=(hf,))


def renames(native_prefix: str, hf_prefix: str, names: Mapping[str, str]) -> list[Rule]:
    """One :func:`rename` for each native name, the prefixes put before both."""
    return [rename(native_prefix + native, hf_prefix + hf) for native, hf in names.items()]


def rotary(native: str, hf: str, *, num_heads: int) -> Rule:
    """Weight or bias whose rows rotary embedding pairs: (2i, 2i+1) natively, (i, i+d/2) in HF."""
    return Rule(
        native=(native,),
        hf=(hf,),
        to_hf=lambda tensors: (layouts.interleaved_to_halves(tensors[0], num_heads),),
        from_hf=lambda tensors: (layouts.halves_to_interleaved(tensors[0], num_heads),),
    )


def transpose(native: str, hf: str) -> Rule:
    """[..., rows, columns] on one side, [..., columns, rows] on the other."""
    return Rule(native=(native,), hf=(hf,), to_hf=_exchanged, from_hf=_exchanged)


def split(native: str, hf: Sequence[str], *, rows: Sequence[int]) -> Rule:
    """One native tensor that holds several HF ones, one below the other."""
    return Rule(
        native=(native,),
        hf=tuple(hf),
        to_hf=lambda tensors: layouts.split_rows(tensors[0], rows),
        from_hf=lambda tensors: (layouts.join_rows(tensors),),
    )


def split_alternating(native: str, hf: Sequence[str], *, dim: int) -> Rule:
    """One native tensor in which the slices of several HF ones take turns along `dim`."""
    return Rule(
        native=(native,),
        hf=tuple(hf),
        to_hf=lambda tensors: layouts.split_alternating(tensors[0], dim, len(hf)),
        from_hf=lambda tensors: (layouts.join_alternating(tensors, dim),),
    )


def split_qkv(native: str, hf: Sequence[str], *, num_heads: int, num_kv_heads: int) -> Rule:
    """Queries, keys and values fused by key/value head natively, three tensors in HF."""
    return Rule(
        native=(native,),
        hf=tuple(hf),
        to_hf=lambda tensors: layouts.split_qkv(tensors[0], num_heads, num_kv_heads),
        from_hf=lambda tensors: (layouts.join_qkv(tensors, num_kv_heads),),
    )


def experts(native: str, hf: str, *, num_experts: int) -> Rule:
    """[num_experts, ...] natively; in HF a tensor an expert, whose number stands for `{e}`."""
    return Rule(
        native=(native,),
        hf=tuple(hf.replace("{e}", str(expert)) for expert in range(num_experts)),
        to_hf=lambda tensors: layouts.unstack(tensors[0]),
        from_hf=lambda tensors: (layouts.stack(tensors),),
    )


def left_out(hf: str) -> Rule:
    """HF names, `*` for any text, that are no part of the model: never needed, never written."""
    return Rule(native=(), hf=(hf,))


def uncast(rule: Rule) -> Rule:
    """The same rule for values that every export keeps in the type in which they train."""
    return replace(rule, is_cast=False)


def output(native: str, config: Mapping[str, object]) -> Rule:
    """The output projection; tied to the embedding it has no name of its own on either side."""
    if config.get("tie_word_embeddings", False):
        return left_out("lm_head.weight")
    return rename(native, "lm_head.weight")


def in_layers(layers: Iterable[int], rules: Iterable[Rule]) -> list[Rule]:
    """The same rules for some layers only."""
    numbers = tuple(layers)
    return [replace(rule, layers=numbers) for rule in rules]


def _exchanged(tensors: Tensors) -> Tensors:
    return (layouts.swap_last_two(tensors[0]),)
