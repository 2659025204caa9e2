"""Show that an export is the model that was trained, and let it write a few words.

    ray job submit --working-dir . -- python -m jobs.sample root=/runs/a step=60 name=hf-bf16

The checkpoint is loaded into the native model, the export into transformers: every weight must be
equal bit for bit after the cast, and the logits must agree. Its last line is one JSON object.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from jobs.command import parse, run_job
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig
from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.proven import Origin, bring_all
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.load_into import read_tensors
from ray_ckpt.tensors.reader import read_asset
from ray_ckpt.tensors.transforms import cast_floating

TOLERANCE = 1e-3
"""Largest difference of logits in float32: the two models add in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """One look at one export."""

    root: str
    """Where the run keeps its checkpoints."""
    step: int
    """Which one."""
    name: str = "hf-bf16"
    """Which export of it."""
    prompt: str = "def "
    """What it goes on from."""
    num_tokens: int = 60
    """How many bytes it writes."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of the native model."""


def main() -> None:
    """Load both, compare, write."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = parse(SampleConfig, __doc__)
    catalog = open_catalog(config.root)
    export = catalog.export(config.name, config.step)
    checkpoint = catalog.manifest(config.step)
    assert checkpoint.model and checkpoint.model.family, "an export's checkpoint names its model"
    native = Decoder(config.model, VOCAB_SIZE)
    weights = read_tensors(catalog, checkpoint, checkpoint.model.keys)

    with tempfile.TemporaryDirectory() as folder:
        source = names.export_dir(config.name, config.step)
        origin = Origin(
            store=catalog.store,
            folder=source,
            safe="the checkpoint it was made from is untouched",
            do="remove the export's folder and export the step again",
        )
        bring_all(origin, export.manifest.files, Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = model.state_dict()
    config_file = json.loads(read_asset(catalog, checkpoint, "config.json") or b"{}")
    adapter = make_adapter(checkpoint.model.family, config_file)
    expected = adapter.to_hf(cast_floating(weights, model.dtype))
    same = set(expected) == set(loaded) and all(
        torch.equal(expected[key], loaded[key]) for key in expected
    )
    native.load_state_dict(cast_floating(cast_floating(weights, model.dtype), torch.float32))
    model = model.float()
    ids = tokenizer(config.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (native(ids) - model(ids).logits).abs().max().item()
    if not same or difference > TOLERANCE:
        raise IntegrityError(
            f"the export is another model: weights equal {same}, logits differ by {difference}",
            f"{catalog.uri}/{source}",
            "the checkpoint is untouched",
            "remove the export's folder and export the step again",
        )
    torch.manual_seed(0)
    written = cast(Any, model).generate(
        ids, max_new_tokens=config.num_tokens, do_sample=True, temperature=0.7, top_k=20
    )
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(json.dumps({"max_logit_difference": difference, "weights_equal": same, "text": text}))


if __name__ == "__main__":
    run_job(main)
