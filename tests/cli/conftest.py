"""The command line as a person or a script meets it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from ray_ckpt.cli.main import main


@dataclass(frozen=True)
class Answer:
    """How one command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs `ray-ckpt` with these arguments, without a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["ray-ckpt", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run
