"""A place that never answers holds up nothing but the looks at its own copies."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ckpt.cluster.executors import RayTasks
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_policy import PublishPolicy
from ray_ckpt.core.copy_states import look_action
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy
from ray_ckpt.core.wanted import publish_action, verify_action
from ray_ckpt.storage.backends import open_catalog
from tests.cluster.cranks import Crank, HangingPlace
from tests.roots import make_root

pytestmark = pytest.mark.ray
DAY_S = 86400.0


@pytest.fixture
def crank(root: str, ray_cluster: str) -> Iterator[Crank]:
    crank = Crank(root, RayTasks())
    yield crank
    crank.close()


def test_copies_elsewhere_and_new_steps_go_on_beside_a_dead_place(
    root: str, crank: Crank, tmp_path: Path
) -> None:
    dead = HangingPlace(tmp_path / "dead", steps=(20,))
    well = str(tmp_path / "well")
    places = [PublishPolicy(export="hf", to=to, look_every_s=DAY_S) for to in (dead.uri, well)]
    policy = LifecyclePolicy(export=(ExportPolicy(name="hf"),), publish=(places[1],))
    make_root(root, (10, 20), policy)
    crank.until_all(ActionKind.PUBLISH, ActionState.SUCCEEDED)
    catalog = open_catalog(root)
    (copy,) = crank.records(ActionKind.PUBLISH)
    catalog.records.begin_run("run", replace(policy, publish=tuple(places)))
    elsewhere = replace(copy, action=replace(copy.action, destination=dead.uri))
    for record in (copy, elsewhere):
        made_at = time.time() - 2 * DAY_S
        catalog.records.write_action(replace(record, changed_at=made_at))

    def states() -> dict[str | None, ActionState]:
        return {r.action.destination: r.state for r in crank.records(ActionKind.LOOK)}

    both = {dead.uri: ActionState.RUNNING, well: ActionState.SUCCEEDED}
    crank.until(lambda _: states() == both)
    view = catalog.checkpoint(10)
    catalog.records.forget_action(verify_action(view))
    spec = copy.action.export
    asked = publish_action(view, spec, str(tmp_path / "asked"))
    catalog.records.write_action(ActionRecord(action=asked, asked_by="me"))
    crank.until(lambda _: catalog.records.action(asked).state is ActionState.SUCCEEDED)
    assert states() == both
    crank.heard_of(look_action(elsewhere.action))  # only then can it be ended
    dead.answers()
