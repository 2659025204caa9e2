"""The README.md of an export: where the weights come from and how to use them."""

from ray_ckpt.core.manifest import Manifest
from ray_ckpt.tensors.converters import WHOLE_MODEL
from ray_ckpt.tensors.export_plan import ExportPlan

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


def model_card(source: Manifest, plan: ExportPlan) -> str:
    """Markdown with the front matter that the Hub reads; names no path and no machine."""
    is_whole_model = plan.layout.weights == WHOLE_MODEL.weights
    origins = [origin.name for origin in source.lineage.started_from]
    on_hub = next((name for name in origins if "/" in name), None)
    base = plan.layout.config.get("base_model_name_or_path") or on_hub
    lines = [
        "---",
        f"library_name: {'transformers' if is_whole_model else 'peft'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {base}"] if base else []),
        "tags:",
        "- ray_ckpt",
        "---",
        "",
        f"# {source.lineage.run_id}, step {source.step}",
        "",
        f"Weights in {plan.dtype}, exported from a training checkpoint by ray_ckpt.",
        "",
        "| | |",
        "|---|---|",
        f"| run | `{source.lineage.run_id}` |",
        f"| step | {source.step} |",
        f"| checkpoint saved at | {source.created_at} |",
        f"| checkpoint content | `{source.content_id}` |",
        *(f"| started from | `{name}` |" for name in origins),
        *(f"| {name} | {value:.6g} |" for name, value in sorted(source.metrics.items())),
        "",
        "```python",
        *(_WHOLE_MODEL_USE if is_whole_model else _ADAPTER_USE),
        "```",
        "",
    ]
    return "\n".join(lines)
