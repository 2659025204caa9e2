import re
import shutil
import subprocess
import sys
from pathlib import Path

from ray_ckpt.cli.main import VERBS

README = Path("README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run() -> None:
    assert blocks("python")
    for block in blocks("python"):
        shutil.rmtree("/tmp/ray_ckpt-readme", ignore_errors=True)
        subprocess.run([sys.executable, "-c", block], check=True, timeout=60)
        assert Path("/tmp/ray_ckpt-readme/step-4/ray_ckpt.manifest.json").is_file()
        shutil.rmtree("/tmp/ray_ckpt-readme")


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
