"""The README.md of an export: where the weights come from and how to use them."""

from ray_ckpt.core.manifest import Manifest


def model_card(source: Manifest, dtype: str) -> str:
    """Markdown with the front matter that the Hub reads; names no path and no machine."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- ray_ckpt",
        "---",
        "",
        f"# {source.lineage.run_id}, step {source.step}",
        "",
        f"Weights in {dtype}, exported from a training checkpoint by ray_ckpt.",
        "",
        "| | |",
        "|---|---|",
        f"| run | `{source.lineage.run_id}` |",
        f"| step | {source.step} |",
        f"| checkpoint saved at | {source.created_at} |",
        f"| checkpoint content | `{source.content_id}` |",
        *(f"| {name} | {value:.6g} |" for name, value in sorted(source.metrics.items())),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH OR REPOSITORY OF THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH OR REPOSITORY OF THIS FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
