"""What is still to be done, from the command line: drain, retry, cancel."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from tests.cli.conftest import Answer
from tests.roots import make_root

Cli = Callable[..., Answer]


@pytest.fixture
def copies(root: str, tmp_path: Path) -> Path:
    """Where a root is published to; a file is in the way."""
    blocked = tmp_path / "copies"
    blocked.write_text("no folder")
    policy = LifecyclePolicy(
        export=(ExportPolicy(name="hf"),), publish=(PublishPolicy(export="hf", to=str(blocked)),)
    )
    make_root(root, (10, 20), policy)
    return blocked


def publish_state(root: str) -> ActionState:
    records = open_catalog(root).records.actions().values()
    return next(r.state for r in records if r.action.kind is ActionKind.PUBLISH)


def test_a_drained_root_says_what_failed_for_good_and_a_retry_brings_it_back(
    cli: Cli, root: str, copies: Path
) -> None:
    drained = cli("drain", root)
    assert drained.code == 1
    assert "publish step-20 hf" in drained.err
    assert "Not a directory" in drained.err
    copies.unlink()
    asked = cli("retry", root)
    assert f"retry: publish step-20 hf to {copies}" in asked.out
    assert f"ray-ckpt drain {root}" in asked.out
    assert cli("drain", root).code == 0
    assert open_catalog(str(copies)).export("hf", 20).step == 20


def test_a_cancelled_action_is_not_done_until_somebody_retries_it(
    cli: Cli, root: str, copies: Path
) -> None:
    copies.unlink()
    assert cli("export", root, "--step", 20, "--name", "hf").code == 0
    cancelled = cli("cancel", root, "--kind", "publish", "--json").json
    assert cancelled["actions"] == [f"publish step-20 hf to {copies}"]
    assert cancelled["manager"] is None
    assert cli("drain", root).code == 0
    assert publish_state(root) is ActionState.CANCELLED
    assert not copies.exists()
    cli("retry", root)
    assert cli("drain", root).code == 0
    assert publish_state(root) is ActionState.SUCCEEDED


def test_cancelling_everything_at_once_is_refused(cli: Cli, root: str, copies: Path) -> None:
    answer = cli("cancel", root)
    assert answer.code == 2
    assert "--step" in answer.err


def test_nothing_to_retry_is_said(cli: Cli, root: str) -> None:
    make_root(root, (10, 20))
    answer = cli("retry", root)
    assert answer.code == 0
    assert "nothing to retry" in answer.out
