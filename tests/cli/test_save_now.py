"""A person asks a trainer that runs to save."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Answer
from tests.roots import snapshot
from tests.tensors.plain import NEVER, Layer, plain_manager, save_steps, saved_steps
from tests.tensors.ranks import wait_until

Cli = Callable[..., Answer]


def test_save_now_makes_the_trainer_save_at_its_next_step(
    cli: Cli, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_ckpt.tensors.triggers.POLL_S", 0.01)
    manager = plain_manager(root, Layer(), NEVER)
    assert manager.save(1) is None
    answer = cli("save-now", root)
    assert answer.code == 0
    assert "saves at its next step" in answer.out
    wait_until(lambda: manager.save(2) is not None)
    manager.wait()
    assert manager.save(3) is None, "asked once, saved once"
    manager.close()
    assert saved_steps(root) == [2]


def test_save_now_names_the_trainer_to_a_script(cli: Cli, root: str) -> None:
    manager = plain_manager(root, Layer(), NEVER)
    document = cli("save-now", root, "--json").json
    manager.close()
    assert set(document) == {"asked", "host", "pid"}
    assert document["asked"] is True


def test_save_now_asks_for_nothing_where_no_trainer_runs(cli: Cli, root: str) -> None:
    save_steps(root, 1)
    before = snapshot(root)
    answer = cli("save-now", root)
    assert answer.code == 2
    assert "no trainer writes here" in answer.err
    assert f"ray-ckpt ls {Path(root)}" in answer.err
    assert snapshot(root) == before
