"""Every converter alone, and together in the orders that work: name to options."""

from typing import Any

_LORA = {"rank": 2, "alpha": 4, "targets": ["layers.*.attention.w[qkvo]"]}
_EMA = {"decay": 0.8}
_FLOAT8 = {"targets": ["layers.*"], "emulate": True}
_QAT = {"weights": "int4", "group_size": 16, "targets": ["layers.*"]}

EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "float8": {"float8": _FLOAT8},
    "qat": {"qat": _QAT},
    "qat with int8 activations": {"qat": {**_QAT, "weights": "int8", "activations": "int8"}},
    "lora": {"lora": _LORA},
    "ema": {"ema": _EMA},
    "lora, ema": {"lora": _LORA, "ema": _EMA},
    "float8, lora": {"float8": _FLOAT8, "lora": _LORA},
    "qat, lora, ema": {"qat": _QAT, "lora": _LORA, "ema": _EMA},
}
