"""The same numbers in another order: what differs between two implementations of one layer.

Every function is pure, needs shapes only (so it runs on meta tensors), and returns tensors of
their own: writing into what comes back never changes what went in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def interleaved_to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Rotary rows reordered from interleaved pairs to two halves.

    For head_dim 4, rows 0 1 2 3 of each head become 0 2 1 3.

    Args:
        tensor: [num_heads * head_dim, ...], a weight or a bias of any dtype; head_dim is even.
        num_heads: query heads for q_proj, key/value heads for k_proj.

    Returns:
        A new tensor of the same shape and dtype; undone by :func:`halves_to_interleaved`.

    Source: what transformers' Llama does with the two halves of a head (`rotate_half`).
    """
    return _copy(tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2)).flatten(0, 2)


def halves_to_interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """Undoes :func:`interleaved_to_halves`; [num_heads * head_dim, ...] in and out."""
    return _copy(tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2)).flatten(0, 2)


def split_rows(fused: Tensor, rows: Sequence[int]) -> Tensors:
    """[sum(rows), ...] cut along its first dimension; undone by :func:`join_rows`."""
    return tuple(_copy(part) for part in fused.split(list(rows)))


def join_rows(parts: Tensors) -> Tensor:
    """The parts one below the other."""
    return torch.cat(parts)


def split_alternating(fused: Tensor, dim: int, num_parts: int) -> Tensors:
    """Every `num_parts`-th slice along `dim`: gate and up of rows g0 u0 g1 u1 ...

    Undone by :func:`join_alternating`.
    """
    parts = fused.unflatten(dim, (-1, num_parts)).unbind(dim + 1)
    return tuple(_copy(part) for part in parts)


def join_alternating(parts: Tensors, dim: int) -> Tensor:
    """One slice of each part in turn along `dim`."""
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def split_qkv(fused: Tensor, num_heads: int, num_kv_heads: int) -> Tensors:
    """Queries, keys and values of a projection fused by key/value head.

    Args:
        fused: [num_kv_heads * (queries per key + 2) * head_dim, ...]: for each key/value head its
            query heads, then its key, then its value. A weight or a bias.
        num_heads: query heads; a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads.

    Returns:
        [num_heads * head_dim, ...] and twice [num_kv_heads * head_dim, ...]; undone by
        :func:`join_qkv`.
    """
    queries = num_heads // num_kv_heads
    heads = fused.unflatten(0, (num_kv_heads, queries + 2, -1))
    q, k, v = heads.split([queries, 1, 1], dim=1)
    return tuple(_copy(part).flatten(0, 2) for part in (q, k, v))


def join_qkv(parts: Tensors, num_kv_heads: int) -> Tensor:
    """Undoes :func:`split_qkv`."""
    _, key, _ = parts
    head_dim = key.shape[0] // num_kv_heads
    heads = [part.unflatten(0, (num_kv_heads, -1, head_dim)) for part in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)


def unstack(stacked: Tensor) -> Tensors:
    """[num_experts, ...] as one tensor an expert; undone by :func:`stack`."""
    return tuple(_copy(expert) for expert in stacked.unbind())


def stack(experts: Tensors) -> Tensor:
    """[num_experts, ...]."""
    return torch.stack(experts)


def swap_last_two(tensor: Tensor) -> Tensor:
    """[..., rows, columns] as [..., columns, rows], laid out anew; undoes itself."""
    return _copy(tensor.transpose(-2, -1))


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous tensor of its own."""
    if tensor.is_contiguous():
        return tensor.clone()  # on meta a tenth of the time, and stacks of experts have many
    return tensor.clone(memory_format=torch.contiguous_format)
