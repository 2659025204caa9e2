"""The manager on a real Ray follows the policy to the end, and then looks at old steps again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import (
    ExportPolicy,
    LifecyclePolicy,
    PublishPolicy,
    VerifyPolicy,
)
from ray_ckpt.storage.backends import open_catalog
from tests.roots import make_root
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


def done(root: str, kind: ActionKind) -> list[ActionRecord]:
    found = open_catalog(root).records.actions().values()
    return [r for r in found if r.action.kind is kind and r.state is ActionState.SUCCEEDED]


def test_the_best_is_exported_copied_and_older_copies_go(
    root: str, tmp_path: Path, manage: Callable[[str], Any]
) -> None:
    copies = str(tmp_path / "copies")
    make_root(
        root,
        (10, 20, 30),  # each has a smaller loss than the one before
        LifecyclePolicy(
            export=(ExportPolicy(name="hf", best=1, steps=(10, 20), last_step=False),),
            publish=(PublishPolicy(export="hf", to=copies, keep=KeepCopies(latest=1)),),
        ),
    )
    manage(root)
    wait_for(lambda: len(done(root, ActionKind.RETIRE)) == 2)
    wait_for(lambda: len(done(root, ActionKind.PUBLISH)) == 3)
    assert [e.step for e in open_catalog(copies).observe().exports] == [30]
    assert [e.step for e in open_catalog(root).observe().exports] == [10, 20, 30]


def test_old_steps_are_scrubbed_again_and_again(root: str, manage: Callable[[str], Any]) -> None:
    make_root(root, (10, 20), LifecyclePolicy(verify=VerifyPolicy(scrub_every_s=1.0)))
    manage(root)
    first = wait_for(lambda: s if len(s := done(root, ActionKind.SCRUB)) == 2 else None)
    last = max(record.changed_at for record in first)

    def are_newer() -> bool:
        scrubs = done(root, ActionKind.SCRUB)
        return len(scrubs) == 2 and all(record.changed_at > last for record in scrubs)

    wait_for(are_newer)
