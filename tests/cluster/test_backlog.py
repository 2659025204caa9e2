"""What becomes of uploads that are slower than saves."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import Running, Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.cluster.tasks import Result, run_action
from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.history import EventReader
from tests.roots import make_root
from tests.waiting import wait_for

EXPORTS = LifecyclePolicy(export=(ExportPolicy(name="hf", every_steps=10, last_step=False),))


class SlowUploads:
    """Carries out actions as threads do, but one upload at a time, which ends when it is let."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._upload: Running | None = None
        self.is_let = threading.Event()

    def wants(self, action: Action) -> bool:
        is_busy = self._upload is not None and not self._upload.done()
        return action.kind is not ActionKind.PUBLISH or not is_busy

    def nodes(self) -> Sequence[LiveNode]:
        return [LiveNode(id="", name="here")]

    def takes(self, action: Action) -> bool:
        return True

    def why_waiting(self, action: Action) -> str:
        return "waits for a thread"

    def has_room(self, action: Action) -> bool:
        return False

    def end_process(self, beat: Beat) -> None:
        pass

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        running = self._pool.submit(self._run, root, attempt)
        if attempt.action.kind is ActionKind.PUBLISH:
            self._upload = running
        return running

    def _run(self, root: str, attempt: Attempt) -> Result:
        if attempt.action.kind is ActionKind.PUBLISH:
            assert self.is_let.wait(60)
        return run_action(root, attempt)

    def close(self) -> None:
        self.is_let.set()
        self._pool.shutdown()


@pytest.fixture
def uploads() -> Iterator[SlowUploads]:
    executor = SlowUploads()
    yield executor
    executor.close()


def publishes(catalog: Catalog) -> dict[int, ActionState]:
    records = catalog.records.actions().values()
    return {r.action.step: r.state for r in records if r.action.kind is ActionKind.PUBLISH}


def test_uploads_that_fall_behind_skip_to_the_newest_step_and_free_the_rest(
    root: str, tmp_path: Path, uploads: SlowUploads
) -> None:
    """Scenario 44: uploads are slower than saves for hours."""
    copies = str(tmp_path / "copies")
    policy = LifecyclePolicy(
        export=EXPORTS.export,
        publish=(PublishPolicy(export="hf", to=copies, when_behind="newest"),),
        keep=KeepConfig(latest=2),
    )
    catalog = open_catalog(root)
    make_root(root, (10,), EXPORTS)
    drain(catalog, Threads())
    catalog.records.begin_run("run", policy)
    manager = Reconciler(catalog, uploads, owner="m", wants=uploads.wants)
    manager.round(time.time())
    assert publishes(catalog) == {10: ActionState.RUNNING}

    make_root(root, (20, 30, 40, 50))  # while step 10 is on its way
    superseded = {step: ActionState.SUPERSEDED for step in (20, 30, 40)}
    wait_for(
        lambda: manager.round(time.time()) and superseded.items() <= publishes(catalog).items()
    )
    uploads.is_let.set()
    wait_for(
        lambda: (
            manager.round(time.time())
            and publishes(catalog).get(50) is ActionState.SUCCEEDED
            and not manager.round(time.time()).running
        )
    )
    manager.close()
    assert {e.step for e in open_catalog(copies).observe().exports} == {10, 50}
    states = {view.step: view.state for view in catalog.observe().checkpoints}
    assert states[20] is states[30] is CheckpointState.TRASHED, "nobody waits for their copies"
    assert states[40] is states[50] is CheckpointState.VERIFIED
    told = [e.text for e in EventReader(catalog.store).read() if e.what == "action.superseded"]
    assert any(text.startswith(f"publish step-20 hf to {copies}: superseded: by") for text in told)
