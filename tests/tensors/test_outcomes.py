"""What a run writes down about itself, and that nobody waits for it."""

from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import StepExistsError
from ray_ckpt.core.events import Event
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.history import EventReader
from ray_ckpt.tensors.outcomes import Outcomes
from tests.tensors.plain import EVERY_STEP_SYNC, Layer, plain_manager, saved_steps

BACKGROUND = SaveConfig(every_steps=1, mode="async")


def events(root: Path) -> list[Event]:
    return EventReader(open_catalog(str(root)).store).read()


@pytest.mark.parametrize("config", [EVERY_STEP_SYNC, BACKGROUND], ids=["sync", "async"])
def test_a_run_writes_down_how_it_began_and_what_it_saved(
    tmp_path: Path, config: SaveConfig
) -> None:
    for steps in ((1, 2), (3,)):
        manager = plain_manager(tmp_path, Layer(), config, owner="job-1")
        manager.load()
        for step in steps:
            manager.save(step)
            manager.wait()
        manager.close()
    told = events(tmp_path)
    assert [(event.what, event.step) for event in told] == [
        ("run.started", None),
        ("save.committed", 1),
        ("save.committed", 2),
        ("run.resumed", 2),
        ("save.committed", 3),
    ]
    assert {event.who for event in told} == {"trainer job-1"}
    assert told[3].text == "training goes on from step-2 on 1 ranks: newest committed checkpoint"
    assert told[3].details == {"reason": "newest committed checkpoint", "world_size": 1}
    written = sum(path.stat().st_size for path in (tmp_path / "step-3").rglob("*.*"))
    assert told[4].details["bytes"] == written
    assert told[4].details["seconds"] > 0
    assert told[4].details["reason"] in told[4].text


def test_a_failed_save_is_written_down_with_its_error(tmp_path: Path) -> None:
    manager = plain_manager(tmp_path, Layer(), EVERY_STEP_SYNC)
    manager.save(1)
    with pytest.raises(StepExistsError):
        manager.do_save(1, "again", last_step=False, metrics={})
    manager.close()
    failed = events(tmp_path)[-1]
    assert (failed.what, failed.step) == ("save.failed", 1)
    assert failed.details["error_kind"] == "StepExistsError"
    assert "is committed already" in failed.text


def test_a_skipped_save_is_written_down_with_its_reason(tmp_path: Path) -> None:
    store = open_catalog(str(tmp_path)).store
    for is_coordinator in (True, False):
        outcomes = Outcomes(store, None, owner="job-1", is_coordinator=is_coordinator)
        outcomes.skipped(7, "every 1 steps; step-6 is still being written")
        outcomes.close()
    [event] = events(tmp_path)
    assert event.text == (
        "the save of step-7 is skipped: every 1 steps; step-6 is still being written"
    )


def test_events_that_cannot_be_written_are_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / names.PRIVATE).mkdir()
    (tmp_path / names.EVENTS).write_text("a file where the folder should be")
    manager = plain_manager(tmp_path, Layer(), EVERY_STEP_SYNC)
    for step in (1, 2):
        manager.save(step)
    manager.close()
    assert saved_steps(tmp_path) == [1, 2]
    assert caplog.text.count("an event cannot be written; all else goes on") == 2
