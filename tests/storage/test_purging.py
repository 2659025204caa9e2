"""A purge looks again right before it acts; scenarios 49 to 55 of the faults a lifecycle meets."""

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import PurgeRefusedError, StepNotFoundError
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.wanted import purge_action, verify_action
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import Holder
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.readers import reading
from tests.storage.steps import FILES, content_of, save_step

NOW = datetime(2030, 1, 1, tzinfo=UTC).timestamp()


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    """Steps 1, 2 and 3, each verified."""
    return verified(open_catalog(request.getfixturevalue(request.param)), 1, 2, 3)


@pytest.fixture
def local(root: str) -> Catalog:
    return verified(open_catalog(root), 1, 2, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.3)


def verified(catalog: Catalog, *steps: int) -> Catalog:
    for step in steps:
        save_step(catalog, step)
        verify(catalog, step)
    return catalog


def verify(catalog: Catalog, step: int) -> None:
    catalog.verify(step)
    record = ActionRecord(action=verify_action(catalog.checkpoint(step)))
    catalog.records.write_action(record.started(1.0).succeeded({}, 2.0))


def planned(catalog: Catalog, step: int) -> Action:
    return purge_action(catalog.checkpoint(step), grace_s=60.0)


def states(catalog: Catalog) -> dict[int, CheckpointState]:
    return {view.step: view.state for view in catalog.observe().checkpoints}


def refused(catalog: Catalog, action: Action) -> str:
    """Why the purge was refused; the step is as it was."""
    before = content_of(catalog, action.step)
    with pytest.raises(PurgeRefusedError) as caught:
        purge_step(catalog, action, now=NOW)
    assert caught.value.safe == "it was not touched"
    assert content_of(catalog, action.step) == before
    return caught.value.what


def test_a_purge_that_was_done_before_is_done(catalog: Catalog) -> None:
    """Scenario 49: killed in the middle, a rerun ends it; already gone is no error."""
    action = planned(catalog, 1)
    assert purge_step(catalog, action, now=NOW) == sum(len(data) for data in FILES.values())
    assert purge_step(catalog, action, now=NOW) == 0
    assert states(catalog)[1] is CheckpointState.TRASHED
    catalog.restore(1)
    catalog.verify(1)


def test_a_step_that_is_being_read_stays_until_its_reader_has_ended(catalog: Catalog) -> None:
    """Scenario 50: a load or an export holds the step."""
    action = planned(catalog, 1)
    with reading(catalog.store, 1, who="export hf-bf16"):
        assert "step-1 stays: it is being read: export hf-bf16, process" in refused(catalog, action)
    assert purge_step(catalog, action, now=NOW) > 0


def test_a_reader_that_died_on_another_host_holds_a_step_for_a_while_only(local: Catalog) -> None:
    """Scenario 50: the lease of a dead reader ends."""
    holder = Holder(owner="load", token="t", host="another-host", pid=1, beat=3)
    local.store.write(names.reader_key(1, "ab12"), json.dumps(asdict(holder)).encode())
    assert purge_step(local, planned(local, 1), now=NOW) > 0


def test_a_pin_between_plan_and_purge_keeps_the_step(catalog: Catalog) -> None:
    """Scenario 51."""
    action = planned(catalog, 1)
    catalog.pin(1, name="ada", reason="the paper")
    assert refused(catalog, action) == "step-1 stays: it is pinned: ada"
    catalog.unpin(1)
    assert purge_step(catalog, action, now=NOW) > 0


def test_a_pin_that_has_expired_keeps_nothing(catalog: Catalog) -> None:
    """Scenario 51, the other way round."""
    action = planned(catalog, 1)
    catalog.pin(1, name="ada", reason="the paper", until="2030-01-02T00:00:00+00:00")
    assert refused(catalog, action) == "step-1 stays: it is pinned: ada until 2030-01-02"
    assert purge_step(catalog, action, now=NOW + 86400.0) > 0


def test_a_pin_that_cannot_be_read_keeps_its_step(local: Catalog) -> None:
    """Scenario 51: nobody can tell whether it has expired."""
    local.store.write(names.pin_key(1, "ada"), b"{")
    assert "it is pinned: ada" in refused(local, planned(local, 1))


def test_two_other_verified_steps_must_remain(local: Catalog) -> None:
    """Scenario 52: one of the newest turns out to be damaged after the plan was made."""
    action = planned(local, 1)
    local.quarantine(3)
    assert "two other verified checkpoints must remain, and there are: 2" in refused(local, action)
    save_step(local, 4)
    assert "and there are: 2" in refused(local, action), "nobody has verified it"
    verify(local, 4)
    assert purge_step(local, action, now=NOW) > 0


def test_a_truncated_step_is_no_way_back(local: Catalog) -> None:
    """Scenario 52: the sizes alone show it."""
    action = planned(local, 1)
    local.store.write("step-3/__0_0.distcp", b"short")
    assert "and there are: 2" in refused(local, action)


def test_a_step_that_is_a_symbolic_link_is_neither_moved_nor_emptied(
    local: Catalog, tmp_path: Path
) -> None:
    """Scenario 53; see test_links.py for the others."""
    action = planned(local, 1)
    shutil.move(f"{local.uri}/step-1", tmp_path / "elsewhere")
    Path(local.uri, "step-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        purge_step(local, action, now=NOW)
    assert (tmp_path / "elsewhere" / names.MANIFEST).exists()
    assert Path(local.uri, "step-1").is_symlink()


def test_a_step_that_somebody_removed_needs_no_purge(local: Catalog) -> None:
    """Scenario 54."""
    action = planned(local, 1)
    shutil.rmtree(f"{local.uri}/step-1")
    assert purge_step(local, action, now=NOW) == 0
    assert sorted(states(local)) == [2, 3]
    with pytest.raises(StepNotFoundError, match="the trash holds no step-1"):
        local.restore(1)


def test_no_plan_however_wrong_takes_the_last_two_verified_steps(catalog: Catalog) -> None:
    """Scenario 55: a policy mistake."""
    actions = [planned(catalog, step) for step in (1, 2, 3)]
    assert purge_step(catalog, actions[0], now=NOW) > 0
    assert "there are: 3" in refused(catalog, actions[1])
    assert "there are: 2" in refused(catalog, actions[2])


def test_another_save_of_the_step_is_not_what_was_planned(catalog: Catalog) -> None:
    action = planned(catalog, 1)
    catalog.trash(1)
    save_step(catalog, 1, files={"__0_0.distcp": b"the new one"}, save_id="second")
    assert "another save of the step is in its place" in refused(catalog, action)


def test_a_refused_purge_is_tried_again_later() -> None:
    action = Action.from_document(
        {
            "kind": "purge",
            "step": 1,
            "source_id": "x",
            "export": None,
            "destination": None,
            "grace_s": 1,
        }
    )
    record = ActionRecord(action=action).started(1.0).failed(PurgeRefusedError("read"), 2.0)
    assert record.state is ActionState.BLOCKED
