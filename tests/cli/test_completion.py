"""The shell completes verbs, options and folders, once the README's line was run in it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

LINE = re.search(r"^eval .*_RAY_CKPT_COMPLETE=.*$", Path("README.md").read_text(), re.MULTILINE)
TYPED = """
compopt() {{  # what bash does with it at a prompt: folders, where the function knows nothing
  test "$2" = dirnames && COMPREPLY=($(compgen -d -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
function=$(complete -p ray-ckpt | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function ray-ckpt
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ray-ckpt re", {"report", "resume-plan", "retry"}),
        ("ray-ckpt purge /r --keep-", {"--keep-latest", "--keep-every"}),
        ("ray-ckpt export /r --dtype b", {"bfloat16"}),
        ("ray-ckpt ls ./run", {"./runs"}),
        ("ray-ckpt diff ./runs/a ./runs/", {"./runs/a", "./runs/b"}),
    ],
)
def test_bash_completes_what_was_begun(tmp_path: Path, words: str, expected: set[str]) -> None:
    assert LINE is not None
    for name in "ab":
        (tmp_path / "runs" / name).mkdir(parents=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", LINE[0] + TYPED.format(words=words)],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert set(done.stdout.split()) == expected, done.stderr
