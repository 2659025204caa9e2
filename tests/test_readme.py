"""What the README shows is run, and what it names is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from jobs.train import TrainConfig
from ray_ckpt.cli.main import VERBS, cli
from ray_ckpt.core.config import load_toml
from ray_ckpt.storage.backends import open_catalog
from tests.waiting import PATIENCE_S, wait_for

README = Path("README.md").read_text()
STEPS = 3


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def program(name: str, folder: Path) -> Path:
    """The block that begins with its name, as a file."""
    (text,) = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def apply(diff: str, text: str) -> str:
    """`text` with the lines of `diff` changed; each of its parts begins with a line of `text`."""
    for part in diff.split("...\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] or "\n" for line in lines if line[:1] != "-"))
    return text


def run(*command: str, **environment: str) -> str:
    """What it printed; a failure shows it."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def ray_ckpt(line: str, **words: str) -> Path:
    """The folder that this line of the README prints, with values for its words."""
    assert f"`{line}`" in README
    arguments = [words.get(word, word) for word in line.split()[1:]]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def steps_of(root: str) -> list[int]:
    """Every committed step."""
    return sorted(view.step for view in open_catalog(root).observe().checkpoints)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A tiny model with random weights, as `save_pretrained` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_training_loop_runs() -> None:
    (block,) = [block for block in blocks("python") if not block.startswith("# ")]
    shutil.rmtree("/tmp/ray_ckpt-readme", ignore_errors=True)
    run(sys.executable, "-c", block)
    assert Path("/tmp/ray_ckpt-readme/step-4/ray_ckpt.manifest.json").is_file()
    shutil.rmtree("/tmp/ray_ckpt-readme")


def test_the_torchrun_recipe_resumes_and_saves_before_it_is_killed(
    tmp_path: Path, root: str
) -> None:
    path = str(program("fsdp.py", tmp_path))
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launch = (torchrun, "--standalone", "--nproc-per-node", "2", path, root)
    assert f"`{Path(torchrun).name} {' '.join(launch[1:4])} fsdp.py" in README
    run(*launch, "3")
    with subprocess.Popen((*launch, "1000000"), stderr=subprocess.DEVNULL) as again:
        try:
            wait_for(lambda: any(step >= 100 for step in steps_of(root)))
        finally:
            again.terminate()
    first, *scheduled, last = steps_of(root)
    assert first == 3
    assert all(step % 100 == 0 for step in scheduled)
    assert last % 100 != 0
    assert open_catalog(root).manifest(last).lineage.resumed_from == 3


@pytest.mark.slow
@pytest.mark.ray
def test_the_ray_recipe_starts_from_a_folder_and_ends_in_one(
    tmp_path: Path, root: str, base: str, ray_cluster: str
) -> None:
    from transformers import AutoModelForCausalLM

    path = program("finetune.py", tmp_path)
    run(sys.executable, str(path), base, root, str(STEPS), RAY_ADDRESS=ray_cluster)
    folder = ray_ckpt("ray-ckpt export ROOT --step 1000", ROOT=root, **{"1000": str(STEPS)})
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for path in (base, folder)
    )
    assert set(before) == set(after)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 0.01  # a few steps of AdamW away from where it started


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for an old name
def test_the_lora_recipe_saves_an_adapter_that_peft_loads(
    tmp_path: Path, root: str, base: str, ray_cluster: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = program("finetune.py", tmp_path)
    (diff,) = blocks("diff")
    path.write_text(apply(diff, path.read_text()))
    run(sys.executable, str(path), base, root, str(STEPS), RAY_ADDRESS=ray_cluster)
    line = "ray-ckpt export ROOT --step 1000 --as lora=peft"
    folder = ray_ckpt(line, ROOT=root, **{"1000": str(STEPS)})
    weights: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
    assert all(0 < float(w.abs().max()) < 0.01 for n, w in weights.items() if "lora_B" in n)
    ids = torch.arange(8)[None]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        plain = model(ids).logits
        tuned = PeftModel.from_pretrained(model, str(folder))(ids).logits
    assert 0 < float((tuned - plain).abs().max()) < 0.1


def test_every_verb_is_in_the_table() -> None:
    assert all(f"| `ray-ckpt {verb.name}" in README for verb in VERBS)


def test_the_lines_under_develop_are_the_ones_ci_runs() -> None:
    develop = next(block for block in blocks("bash") if "lint-imports" in block)
    ci = Path(".ci/run").read_text()
    assert all(line in ci for line in develop.splitlines() if not line.startswith("pip"))


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:jobs|ray_ckpt|tests|\.ci)/[\w./]+)`", README)
    assert len(named) > 10
    missing = [name for name in named if not Path(name).exists() and "<" not in name]
    assert missing == []


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_message_that_is_explained_is_one_that_is_said() -> None:
    source = "".join(path.read_text() for path in Path("ray_ckpt").rglob("*.py"))
    rows = section("When something is wrong").splitlines()
    cells = [row.split(" | ")[0] for row in rows if row.startswith("| `")]
    said = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(said) > 15
    assert [text for text in said if text not in source] == []


def test_every_command_has_its_verb_and_its_options() -> None:
    verbs = {verb.name: verb for verb in VERBS}
    lines = re.findall(r"(?:`|^)ray-ckpt ([a-z-]+)([^`\n#]*)", README, flags=re.MULTILINE)
    assert len(lines) > 50
    for name, words in lines:
        known = {option for parameter in verbs[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", words)) <= known, f"{name}{words}"


def test_the_policy_is_one_that_a_run_takes(tmp_path: Path) -> None:
    (block,) = blocks("toml")
    policy = load_toml(TrainConfig, block, where="README.md", overrides=["root=/r"]).lifecycle
    assert policy.keep.latest == 3
    assert [publish.to for publish in policy.publish] == ["s3://bucket/models", "/mnt/backup/a"]
    assert policy.limits.total == 8


def test_links_within_the_readme_lead_somewhere() -> None:
    titles = re.findall(r"^##+ (.+)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", README))
    assert len(linked) > 10
    assert linked <= anchors
