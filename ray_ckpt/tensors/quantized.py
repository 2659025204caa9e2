"""Quantized Hugging Face tensors become plain ones, under the names that adapters know.

    fp8     X.weight  X.weight_scale_inv   ->  X.weight   float32   (DeepSeek V3)
    mxfp4   X_blocks  X_scales             ->  X          bfloat16  (GPT-OSS)

Pure, and decided by names and shapes alone: a folder that says it is quantized and holds plain
tensors too (norms, embeddings) has them as they are. Nothing is rounded more than once: FP8 values
times float32 scales are given in float32, MXFP4 ones are exact in bfloat16.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.core.errors import ConfigError, StateDictError

_FP8_BLOCK = (128, 128)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BIAS = 127
"""Of the exponent that a scale byte holds (E8M0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How one kind of quantized tensor is stored."""

    values: str
    """What the name of the values ends in."""
    scales: str
    """What the name of their scales ends in, instead of `values`."""
    plain: str
    """What the plain name ends in, instead of `values`."""
    undo: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
    """Values and scales, and the folder's `quantization_config`, to the plain tensor."""


def dequantize(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Plain tensors under plain names; the input is left as it is.

    Args:
        state_dict: a folder's tensors, or a part with values and scales together.
        config: the folder's `config.json`; without a `quantization_config` all is plain.

    Raises:
        ConfigError: it is quantized in a way that is not known here.
        StateDictError: values without their scales, or scales without their values.
    """
    settings: Mapping[str, Any] = config.get("quantization_config") or {}
    if not settings:
        return dict(state_dict)
    scheme = _scheme(settings)
    plain: dict[str, Tensor] = {}
    for name, (first, *scales) in _stored_as(state_dict, scheme).items():
        values = state_dict[first]
        plain[name] = scheme.undo(values, state_dict[scales[0]], settings) if scales else values
    return plain


def stored_as(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Each plain name with the names on disk that it is made from: itself, or values and scales.

    Every name on disk is used once. Errors are those of :func:`dequantize`.
    """
    settings: Mapping[str, Any] = config.get("quantization_config") or {}
    return _stored_as(names, _scheme(settings)) if settings else {name: (name,) for name in names}


def _scheme(settings: Mapping[str, Any]) -> _Scheme:
    method = settings.get("quant_method")
    if method not in _SCHEMES:
        raise ConfigError(
            f"quant_method {method!r} is not known here",
            "config.json: quantization_config",
            "nothing was loaded",
            f"known: {', '.join(_SCHEMES)}; or load a folder that is not quantized",
        )
    return _SCHEMES[method]


def _stored_as(names: Iterable[str], scheme: _Scheme) -> dict[str, tuple[str, ...]]:
    given = dict.fromkeys(names)
    stored: dict[str, tuple[str, ...]] = {}
    lonely: list[str] = []
    for name in given:
        if name.endswith(scheme.scales):
            values = name.removesuffix(scheme.scales) + scheme.values
            lonely += [] if values in given else [name]
        elif name.endswith(scheme.values):
            stem = name.removesuffix(scheme.values)
            parts = tuple(part for part in (name, stem + scheme.scales) if part in given)
            is_plain = len(parts) == 1 and scheme.values == scheme.plain
            stored[stem + scheme.plain] = parts
            lonely += [name] if len(parts) == 1 and not is_plain else []
        else:
            stored[name] = (name,)
    if lonely:
        raise StateDictError(
            f"quantized tensors without their other half: {', '.join(sorted(lonely))}",
            safe="nothing was loaded",
            do="download the folder again, or name one that is whole",
        )
    return stored


def _from_fp8(values: Tensor, scales: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """[rows, columns] float32: each block of values times its scale.

    Args:
        values: [rows, columns] float8_e4m3fn; the last blocks of a dimension may be cut short.
        scales: one for each block, float32.
        settings: `weight_block_size`, rows and columns of a block; 128 x 128 without it.

    Source: DeepSeek V3's `weight_dequant`.
    """
    block = tuple(settings.get("weight_block_size") or _FP8_BLOCK)
    blocks = tuple(-(-length // size) for length, size in zip(values.shape, block, strict=True))
    if tuple(scales.shape) != blocks:
        raise StateDictError(
            f"values of shape {tuple(values.shape)} in blocks of {block} need scales of shape "
            f"{blocks}, these have {tuple(scales.shape)}",
            safe="nothing was loaded",
            do="check weight_block_size in config.json",
        )
    spread = scales.float()
    for dim, size in enumerate(block):
        spread = spread.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return values.float() * spread


def _from_mxfp4(values: Tensor, scales: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """[experts, columns, rows] bfloat16, exact.

    Args:
        values: [experts, rows, blocks, bytes] uint8, two codes a byte, the low half first; a code
            is a sign and three bits of a number.
        scales: [experts, rows, blocks] uint8, exponents of two.
        settings: nothing of it is needed.

    Source: transformers' `convert_moe_packed_tensors`, which exchanges rows and columns too.
    """
    numbers = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], dtype=torch.bfloat16)
    codes = torch.stack((values & 0x0F, values >> 4), dim=-1).flatten(-2)
    exponents = scales.int().unsqueeze(-1) - _FP4_BIAS
    plain = torch.ldexp(numbers[codes.int()], exponents).flatten(-2)
    return plain.transpose(-2, -1).clone(memory_format=torch.contiguous_format)


_SCHEMES: dict[Any, _Scheme] = {
    "fp8": _Scheme(values=".weight", scales=".weight_scale_inv", plain=".weight", undo=_from_fp8),
    "mxfp4": _Scheme(values="_blocks", scales="_scales", plain="", undo=_from_mxfp4),
}
