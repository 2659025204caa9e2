"""The README.md of an export: where the weights come from, how to use them and how to make them.

    front matter   what the Hub reads: library, license, base model
    table          run, step, checkpoint, what it started from, metrics
    code           how to load it, and the command that makes it again

What nobody has said is left out, the license above all.
"""

import logging
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ray_ckpt.core.config import MAX_SHARD_BYTES
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.tensors.converters import WHOLE_MODEL
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.run import CARD

log = logging.getLogger("ray_ckpt")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_WHOLE_MODEL_USE = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("PATH OR REPOSITORY OF THIS FOLDER")',
    'tokenizer = AutoTokenizer.from_pretrained("PATH OR REPOSITORY OF THIS FOLDER")',
)
_ADAPTER_USE = (
    "from peft import PeftModel",
    "from transformers import AutoModelForCausalLM",
    "",
    'base = AutoModelForCausalLM.from_pretrained("THE BASE MODEL")',
    'model = PeftModel.from_pretrained(base, "PATH OR REPOSITORY OF THIS FOLDER")',
)


def model_card(
    source: Manifest,
    plan: ExportPlan,
    *,
    spec: ExportSpec | None,
    license: Mapping[str, Any],
) -> str:
    """Markdown with the front matter that the Hub reads; names no path and no machine."""
    is_whole_model = plan.layout.weights == WHOLE_MODEL.weights
    origins = [origin.name for origin in source.lineage.started_from]
    front = {
        "library_name": "transformers" if is_whole_model else "peft",
        "pipeline_tag": "text-generation",
        **license,
        **_base_model(plan, origins),
        "tags": ["ray_ckpt"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {source.lineage.run_id}, step {source.step}",
        "",
        f"Weights in {plan.dtype}, exported from a training checkpoint by ray_ckpt.",
        "",
        *_table(source, origins),
        "",
        "```python",
        *(_WHOLE_MODEL_USE if is_whole_model else _ADAPTER_USE),
        "```",
        "",
        *([] if spec is None else _made_by(spec, source.step)),
    ]
    return "\n".join(lines)


def license_of(assets: Mapping[str, bytes], spec: ExportSpec | None) -> dict[str, Any]:
    """What the front matter says of the license: what was asked for, else the base model's."""
    if spec is not None and spec.license is not None:
        return {"license": spec.license}
    text = assets.get(CARD, b"").decode(errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        log.warning("the base model's %s cannot be read, its license is left out: %s", CARD, error)
        return {}
    known = front if isinstance(front, dict) else {}
    return {key: known[key] for key in _LICENSE_KEYS if known.get(key)}


def _base_model(plan: ExportPlan, origins: list[str]) -> dict[str, str]:
    """A repository on the Hub, or nothing: folders are nobody's business."""
    names = (plan.layout.config.get("base_model_name_or_path"), *origins)
    found = (name for name in names if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    base = next(found, None)
    return {} if base is None else {"base_model": base}


def _table(source: Manifest, origins: list[str]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        f"| run | `{source.lineage.run_id}` |",
        f"| step | {source.step} |",
        f"| checkpoint saved at | {source.created_at} |",
        f"| checkpoint content | `{source.content_id}` |",
        *(f"| started from | `{name}` |" for name in origins),
        *(f"| {name} | {value:.6g} |" for name, value in sorted(source.metrics.items())),
    ]


def _made_by(spec: ExportSpec, step: int) -> list[str]:
    return ["Made again from the run's checkpoints by", "", f"    {_command(spec, step)}", ""]


def _command(spec: ExportSpec, step: int) -> str:
    """What a person types to get this very export; what is usual is left out."""
    unusual = (
        ("--format", spec.format, "safetensors"),
        ("--max-shard-size", spec.max_shard_bytes, MAX_SHARD_BYTES),
        ("--device", spec.device, "cpu"),
        ("--logits-within", spec.logits_within, None),
        ("--license", spec.license, None),
    )
    words = ["ray-ckpt", "export", "ROOT", "--step", str(step), "--name", spec.name]
    words += ["--dtype", spec.dtype]
    for name, flavor in spec.flavors.items():
        words += ["--as", f"{name}={flavor}"]
    for option, value, usual in unusual:
        words += [] if value == usual else [option, str(value)]
    words += ["--allow-non-finite"] if spec.allow_non_finite else []
    words += ["--allow-zeros"] if spec.allow_zeros else []
    return shlex.join(words)
