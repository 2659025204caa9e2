"""Scenario 30: .ray_ckpt/ is lost or damaged; nothing is purged before all is known anew."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.storage import lease
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from tests.roots import make_root
from tests.waiting import wait_for

KEEP_ALL, KEEP_TWO = LifecyclePolicy(), LifecyclePolicy(keep=KeepConfig(latest=2))
STEPS = (10, 20, 30, 40)


def lose(private: Path) -> None:
    shutil.rmtree(private)


def damage(private: Path) -> None:
    for path in private.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff\x00" + path.read_bytes()[: path.stat().st_size // 2])


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


@pytest.mark.parametrize("spoil", [lose, damage])
def test_steps_are_verified_anew_before_any_of_them_is_purged(
    root: str, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 1.0)
    make_root(root, STEPS, KEEP_ALL)
    catalog = open_catalog(root)
    catalog.pin(10, name="paper", reason="figure 2")
    drain(catalog, Threads())
    assert set(states(catalog).values()) == {CheckpointState.VERIFIED}
    spoil(Path(root, ".ray_ckpt"))

    catalog = open_catalog(root)
    assert states(catalog) == dict.fromkeys(STEPS, CheckpointState.COMMITTED)
    drain(catalog, Threads())
    assert set(states(catalog)) == set(STEPS), "without a policy everything is kept"
    spoil(Path(root, ".ray_ckpt"))

    catalog.records.begin_run("run", KEEP_TWO)
    manager = Reconciler(catalog, Threads(), owner="test")
    first = manager.round(time.time())
    assert not [f for f in first.running if f.attempt.action.kind is ActionKind.PURGE]
    assert set(states(catalog)) == set(STEPS)
    wait_for(lambda: manager.round(time.time()).planned.planned == ())
    manager.close()
    kept, trashed = CheckpointState.VERIFIED, CheckpointState.TRASHED
    assert states(catalog) == {10: kept, 20: trashed, 30: kept, 40: kept}
    records = list(catalog.records.actions().values())
    verified = {r.action.step: r.changed_at for r in records if r.action.kind is ActionKind.VERIFY}
    (purge,) = [r for r in records if r.action.kind is ActionKind.PURGE]
    assert purge.state is ActionState.SUCCEEDED
    assert max(verified[30], verified[40]) <= purge.changed_at
