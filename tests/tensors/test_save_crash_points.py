"""A process that dies before any change it makes to storage leaves the old truth or the new one.

Every change of one save is tried: the n-th one is the last thing the process does not do.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.names import parse_step
from ray_ckpt.storage.backends import open_catalog
from tests.tensors.faults import SURVIVED, arm, arm_s3, attempts, die
from tests.tensors.plain import Layer, plain_manager, save_steps, saved_steps

TRASHED = CheckpointState.TRASHED
ANEW = 0.5
"""What every tensor of the save holds that dies; the others hold the number of their step."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is there before, what the save does, and what may be there afterwards."""

    old: tuple[int, ...] = ()
    resumed: int | None = None
    step: int
    truths: tuple[tuple[int, set[float]], ...]
    """Which step the next process resumes from, and what it finds there."""


SCENARIOS = {
    "into an empty root": Scenario(step=1, truths=((0, {-1.0}), (1, {ANEW}))),
    "beside an older step": Scenario(old=(1,), step=2, truths=((1, {1.0}), (2, {ANEW}))),
    "in place of newer steps": Scenario(
        old=(1, 2, 3),
        resumed=1,
        step=2,
        truths=((3, {3.0}), (2, {2.0}), (1, {1.0}), (2, {ANEW})),
    ),
}


def _save(root: str, number: int, scenario: Scenario, armed: Callable[..., None]) -> None:
    model = Layer()
    manager = plain_manager(root, model)
    if scenario.resumed is not None:
        manager.load(step=scenario.resumed)
    model.fill(ANEW)
    armed(Path(root), number, die)
    manager.do_save(scenario.step, "test", last_step=False, metrics={}).wait()
    os._exit(SURVIVED)


def _check(root: str, scenario: Scenario) -> tuple[int, set[float]]:
    """What a new process finds; everything it promises holds, and it can go on."""
    before = saved_steps(root)
    model = Layer(value=-1.0)
    manager = plain_manager(root, model)
    step = manager.load().step
    found = step, model.values()
    manager.do_save(step + 1, "test", last_step=False, metrics={}).wait()
    manager.close()
    assert found in scenario.truths
    assert before == [s for s in {*scenario.old, scenario.step} if s <= step]
    assert saved_steps(root) == [*before, step + 1]
    views = open_catalog(root).observe().checkpoints
    assert {view.state for view in views} <= {CheckpointState.COMMITTED, CheckpointState.TRASHED}
    assert {view.step for view in views} >= set(scenario.old), "rolled back is in the trash"
    return found


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_save_that_dies_anywhere_leaves_a_root_from_which_training_goes_on(
    tmp_path: Path, scenario: Scenario
) -> None:
    """Scenarios 3 and 4: after all shards, before or at the one write that commits."""
    save_steps(tmp_path / "old", *scenario.old)

    def roots() -> Iterator[str]:
        for number in itertools.count():
            yield shutil.copytree(tmp_path / "old", tmp_path / f"run{number}").as_posix()

    found: list[tuple[int, set[float]]] = []
    for _, root in attempts(_save, roots(), scenario, arm):
        found.append(_check(root, scenario))
        left = [path.name for path in Path(root).iterdir() if path.name != ".ray_ckpt"]
        assert all(parse_step(name) is not None for name in left)
        assert list(Path(root, ".ray_ckpt/staging").iterdir()) == []
    assert all(truth in found for truth in scenario.truths), "each was reached by some death"
    assert found == sorted(found, key=scenario.truths.index), "old truths come before newer ones"


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("name", ["beside an older step", "in place of newer steps"])
def test_a_save_to_an_object_store_that_dies_anywhere_is_there_whole_or_not(
    s3_root: str, name: str
) -> None:
    """Scenarios 3 and 4: the manifest is the only commit marker there is."""
    scenario = SCENARIOS[name]

    def roots() -> Iterator[str]:
        for number in itertools.count():
            root = f"{s3_root}{number}"
            save_steps(root, *scenario.old)
            yield root

    found: list[tuple[int, set[float]]] = []
    for _, root in attempts(_save, roots(), scenario, arm_s3):
        found.append(_check(root, scenario))
        _bring_everything_back(root, scenario)
    assert all(truth in found for truth in scenario.truths)


def _bring_everything_back(root: str, scenario: Scenario) -> None:
    """What was rolled back is whole, whatever was saved in its place since."""
    catalog = open_catalog(root)
    trashed = {v.step for v in catalog.observe().checkpoints if v.state is TRASHED}
    for step in sorted(trashed & set(scenario.old)):
        if catalog.is_in_place(step):
            catalog.quarantine(step)
        catalog.restore(step)
        catalog.verify(step)
        model = Layer(value=-1.0)
        manager = plain_manager(root, model)
        manager.load(step=step)
        manager.close()
        assert model.values() == {float(step)}
