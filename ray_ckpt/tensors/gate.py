"""What must be true before anything is called an export; each refusal names the tensor.

    plan      names, shapes and types against the model's config; every tensor is made of the ones
              that its name says, and nothing that a converter learned is forgotten
    values    while they are written: no NaN or Inf, no matrix of zeros alone
    files     once they are there: each tensor is in the file that the index names, and once

The plan is checked by the other direction of the adapter and by the config, which had no part in
making it.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.tensors.converters.protocol import SHADOWS
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.hf_shapes import expected_shape
from ray_ckpt.tensors.recording import Recording, TensorSpec, record
from ray_ckpt.tensors.transforms import TORCH_DTYPES, StateDictTransforms
from ray_ckpt.tensors.views import View

log = logging.getLogger("ray_ckpt")
_NAMES_TOLD = 5
_A_FEW = 64
_LOOK = "look at how it is made: ray-ckpt export ROOT --step N --plan --json"
_NON_FINITE = "export in another --dtype; or, if you want it all the same, add --allow-non-finite"
_ZEROS = "export another step; or, if you want it all the same, add --allow-zeros"
_SAFE = "the checkpoint is untouched, and no reader sees a part of the export"


def expect_sound_plan(
    recording: Recording, transforms: StateDictTransforms, config: Mapping[str, Any]
) -> None:
    """Nothing, if the outputs are the model that `config` describes, made as their names say.

    Raises:
        StateDictError: a name that the architecture does not have, or lacks.
        IntegrityError: a tensor of another shape or type, made of nothing or of another tensor, or
            a converter's that has no part in any.
    """
    problems = [*_made_of_nothing(recording), *_forgotten(recording, transforms)]
    if transforms.names() is transforms.adapter:
        transforms.adapter.expect_whole_hf(recording.outputs)
        problems += _misshapen(recording, config)
        problems += _of_another_type(recording, transforms)
        problems += _misnamed(recording, transforms)
    _refuse(problems)


def expect_sound_files(
    found: Mapping[str, Mapping[str, TensorSpec]], expected: Mapping[str, Mapping[str, TensorSpec]]
) -> None:
    """Nothing, if each file holds the tensors that it should; both are by file and by name.

    Raises:
        IntegrityError: a tensor is lacking, in two files, or not what the plan says.
    """
    problems: list[str] = []
    held = Counter(name for tensors in found.values() for name in tensors)
    problems += [f"{name} is in {count} files" for name, count in held.items() if count > 1]
    for file, tensors in expected.items():
        here = found.get(file, {})
        problems += [f"{name} is not in {file}" for name in tensors if name not in here]
        problems += [f"{name} is in {file} for no reason" for name in here if name not in tensors]
        problems += [
            f"{name} in {file} is {_told(here[name])}, expected {_told(spec)}"
            for name, spec in tensors.items()
            if name in here and here[name] != spec
        ]
    _refuse(problems)


def expect_sound_assets(assets: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
    """Nothing, if the JSON files can be read; a token that the model lacks is told of.

    Models whose tokenizer got one more token than their embedding has rows work until it is used.

    Raises:
        IntegrityError: one cannot be used.
    """
    documents = {name: _parsed(name, data) for name, data in assets.items() if _is_json(name)}
    tokenizer, vocab_size = documents.get("tokenizer.json"), config.get("vocab_size")
    if tokenizer is None or vocab_size is None:
        return
    try:
        vocab = tokenizer["model"].get("vocab", {})
        added = [int(token["id"]) for token in tokenizer.get("added_tokens") or ()]
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *added]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        _refuse([f"tokenizer.json is no tokenizer: {error!r}"])
        return
    if ids and max(ids) >= vocab_size:
        log.warning(
            "tokenizer.json has token %d, the model ends with %d: it fails where that is used",
            max(ids),
            vocab_size - 1,
        )


@dataclass
class Values:
    """Looks at one tensor block by block, as it is written."""

    name: str
    spec: TensorSpec
    allow_non_finite: bool = False
    allow_zeros: bool = False
    is_zero: bool = True
    """So far."""

    def look(self, block: Tensor) -> None:
        """At the next elements.

        Raises:
            IntegrityError: one of them is NaN or Inf.
        """
        if self.is_zero and self._holds_weights:
            # a few say it nearly always, and ten times faster than all
            flat = block.view(-1)
            self.is_zero = not (bool(flat[:_A_FEW].any()) or bool(flat.any()))
        if not self.allow_non_finite and not is_finite(block):
            what = f"{self.name} holds NaN or Inf once it is {_dtype(self.spec.dtype)}"
            _refuse([what], do=_NON_FINITE)

    def end(self) -> None:
        """All of it was looked at.

        Raises:
            IntegrityError: it is a matrix of zeros alone.
        """
        is_matrix = sum(size > 1 for size in self.spec.shape) > 1
        if self.is_zero and is_matrix and self._holds_weights and not self.allow_zeros:
            _refuse([f"{self.name} is nothing but zeros"], do=_ZEROS)

    @property
    def _holds_weights(self) -> bool:
        """Zero points and codes of a quantized weight may all be zero, and so may biases."""
        is_bias = "bias" in self.name.rpartition(".")[2]
        return self.spec.dtype.is_floating_point and self.spec.dtype.itemsize > 1 and not is_bias


def _made_of_nothing(recording: Recording) -> Iterable[str]:
    return (
        f"{name} is made of no tensor of the checkpoint"
        for name, output in recording.outputs.items()
        if not output.sources
    )


def _forgotten(recording: Recording, transforms: StateDictTransforms) -> Iterable[str]:
    """What a converter has learned must be in it, in whatever form; averaged by another will do."""
    used = {_plain(key) for output in recording.outputs.values() for key in output.sources}
    return (
        f"{key} of {converter.name} has no part in any tensor"
        for converter in transforms.converters
        for key in recording.inputs
        if _plain(key) not in used and converter.key_filter(key) and converter.has_part(key)
    )


def _misshapen(recording: Recording, config: Mapping[str, Any]) -> Iterable[str]:
    for name, output in recording.outputs.items():
        expected = expected_shape(name, config)
        if expected is not None and output.spec.shape != expected:
            yield (
                f"{name} has shape {list(output.spec.shape)}, by config.json it has "
                f"{list(expected)}"
            )


def _of_another_type(recording: Recording, transforms: StateDictTransforms) -> Iterable[str]:
    wanted = TORCH_DTYPES[transforms.dtype]
    for name, output in recording.outputs.items():
        types = {recording.inputs[key].dtype for key in output.sources}
        is_cast = all(transforms.adapter.is_cast(_plain(key)) for key in output.sources)
        if all(dtype.is_floating_point for dtype in types):
            allowed = {wanted} if is_cast else {wanted, *types}
            if output.spec.dtype not in allowed:
                yield f"{name} is {_dtype(output.spec.dtype)}, asked for was {transforms.dtype}"


def _misnamed(recording: Recording, transforms: StateDictTransforms) -> Iterable[str]:
    """The way back leads to the tensors that each one came from."""
    specs = {name: output.spec for name, output in recording.outputs.items()}
    back = record(transforms.adapter.from_hf, specs)
    used = {name for output in back.outputs.values() for name in output.sources}
    yield from (f"{name} has no part in this model" for name in specs if name not in used)
    for native, output in back.outputs.items():
        origins = {native, SHADOWS + native}
        for name in output.sources:
            sources = recording.outputs[name].sources
            if sources and not origins & set(sources):
                yield f"{name} is made of {_listed(sources)}, by its name of {native}"
            elif _is_turned(recording.outputs[name].view, output.view):
                yield f"the elements of {name} are not in the order that its name says"


def _is_turned(there: View | None, back: View | None) -> bool:
    """Whether one way exchanges elements and the other does not."""
    if there is None or back is None:
        return False
    return there.is_contiguous != back.is_contiguous


def _plain(key: str) -> str:
    return key.removeprefix(SHADOWS)


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _parsed(name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        _refuse([f"{name} is no JSON: {error}"])
        raise AssertionError("it was refused") from error


def _refuse(problems: Iterable[str], *, do: str = _LOOK) -> None:
    problems = list(problems)
    if problems:
        more = len(problems) - _NAMES_TOLD
        told = [*problems[:_NAMES_TOLD], *([f"and {more} more"] if more > 0 else [])]
        raise IntegrityError("; ".join(told), "export", _SAFE, do)


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(sorted(names)[:_NAMES_TOLD]) + more


def _told(spec: TensorSpec) -> str:
    return f"{_dtype(spec.dtype)} {list(spec.shape)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
