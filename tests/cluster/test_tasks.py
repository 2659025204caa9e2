"""What each action leaves behind: the effect on storage, and what its record says."""

from pathlib import Path

import pytest

from ray_ckpt.cluster.perform import perform_here, verify_here
from ray_ckpt.core.actions import ExportSpec
from ray_ckpt.core.copies import copies, retire_action
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.wanted import export_action, publish_action, scrub_action, verify_action
from ray_ckpt.storage.backends import open_catalog
from tests.roots import flip_byte, make_root

HF = ExportSpec(name="hf-bf16")


def test_a_scrub_of_a_good_step_leaves_it_verified(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    verify_here(catalog, catalog.checkpoint(10))
    record = perform_here(catalog, scrub_action(catalog.checkpoint(10)))
    assert record.result["bytes"] == catalog.manifest(10).total_bytes
    assert catalog.checkpoint(10).state is CheckpointState.VERIFIED


def test_a_scrub_that_finds_damage_quarantines_and_takes_the_verdict_back(root: str) -> None:
    make_root(root, (10, 20))
    catalog = open_catalog(root)
    view = catalog.checkpoint(10)
    verify_here(catalog, view)
    flip_byte(Path(root) / "step-10" / "__0_0.distcp")
    with pytest.raises(IntegrityError, match="step-10 is corrupt"):
        perform_here(catalog, scrub_action(view))
    states = {v.step: v.state for v in catalog.observe().checkpoints}
    assert states[10] is CheckpointState.QUARANTINED
    assert catalog.records.action(verify_action(view)).state is ActionState.PENDING


def test_a_retired_copy_is_no_copy_any_more(root: str, tmp_path: Path) -> None:
    make_root(root, (10, 20))
    catalog, to = open_catalog(root), str(tmp_path / "copies")
    for step in (10, 20):
        view = catalog.checkpoint(step)
        verify_here(catalog, view)
        perform_here(catalog, export_action(view, HF))
        perform_here(catalog, publish_action(view, HF, to))
    retire = retire_action(publish_action(catalog.checkpoint(10), HF, to))
    record = perform_here(catalog, retire)
    assert record.result["bytes"] > 0
    assert [e.step for e in open_catalog(to).observe().exports] == [20]
    assert [copy.action.step for copy in copies(catalog.observe())] == [20]
    assert perform_here(catalog, retire).result["bytes"] == 0
