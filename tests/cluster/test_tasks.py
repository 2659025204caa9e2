"""What each action leaves behind: the effect on storage, and what its record says."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.perform import perform_here, verify_here
from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copies import copies, retire_action
from ray_ckpt.core.errors import IntegrityError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.names import log_key
from ray_ckpt.core.wanted import export_action, publish_action, scrub_action, verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import MANAGER, Lease
from tests.roots import flip_byte, make_root

HF = ExportSpec(name="hf-bf16")


def carry_out(catalog: Catalog, action: Action) -> Mapping[str, Any]:
    """What the action's task says, asked by a manager that holds the lease; recorded as usual."""
    lease = Lease(catalog.store, MANAGER, owner="test")
    lease.acquire()
    record = ActionRecord(action=action).started(time.time())
    catalog.records.write_action(record)
    try:
        result = run_action(catalog.uri, attempt_of(record, epoch=lease.epoch))
    finally:
        lease.release()
    catalog.records.write_action(record.succeeded(result, time.time()))
    return result


def attempt_of(record: ActionRecord, *, epoch: int) -> Attempt:
    return Attempt(
        action=record.action,
        number=record.attempts,
        started_at=record.changed_at,
        epoch=epoch,
        beat_s=0.1,
    )


def test_a_scrub_of_a_good_step_leaves_it_verified(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    verify_here(catalog, catalog.checkpoint(10))
    result = carry_out(catalog, scrub_action(catalog.checkpoint(10)))
    assert result["bytes"] == catalog.manifest(10).total_bytes
    assert catalog.checkpoint(10).state is CheckpointState.VERIFIED


def test_a_scrub_that_finds_damage_quarantines_and_takes_the_verdict_back(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    view = catalog.checkpoint(10)
    verify_here(catalog, view)
    flip_byte(Path(root) / "step-10" / "__0_0.distcp")
    with pytest.raises(IntegrityError, match="step-10 is corrupt"):
        carry_out(catalog, scrub_action(view))
    states = {v.step: v.state for v in catalog.observe().checkpoints}
    assert states[10] is CheckpointState.QUARANTINED
    assert catalog.records.action(verify_action(view)).state is ActionState.PENDING


def test_a_retired_copy_is_no_copy_any_more(root: str, tmp_path: Path) -> None:
    make_root(root, (10, 20))
    catalog, to = open_catalog(root), str(tmp_path / "copies")
    for step in (10, 20):
        perform_here(catalog, publish_action(catalog.checkpoint(step), HF, to))
    retire = retire_action(publish_action(catalog.checkpoint(10), HF, to))
    assert carry_out(catalog, retire)["bytes"] > 0
    assert [e.step for e in open_catalog(to).observe().exports] == [20]
    assert [copy.action.step for copy in copies(catalog.observe())] == [20]
    assert carry_out(catalog, retire)["bytes"] == 0


def test_what_a_failed_attempt_said_is_kept(root: str, tmp_path: Path) -> None:
    make_root(root, (10, 20))
    (tmp_path / "a-file").write_text("no folder")
    catalog = open_catalog(root)
    view = catalog.checkpoint(10)
    perform_here(catalog, export_action(view, HF))
    publish = publish_action(view, HF, str(tmp_path / "a-file/below"))
    with pytest.raises(UsageError):
        carry_out(catalog, publish)
    log = catalog.store.read(log_key(publish.key, 1)).decode()
    assert log.startswith(f"{publish.title}, attempt 1 on ")
    assert "Traceback" in log
