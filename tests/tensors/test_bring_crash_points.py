"""A manager that dies before any change that it makes while it brings a staged save to the root.

Every change is tried; the next manager ends what was begun, and nothing happens twice.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_ckpt.cluster.executors import Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.core.actions import Action
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.storage.backends import open_catalog
from tests.staged import Patient, config
from tests.tensors.faults import SURVIVED, arm, arm_s3, attempts, die
from tests.tensors.plain import Layer, loaded, plain_manager, saved_steps

KINDS = ActionKind.GATHER, ActionKind.COMMIT, ActionKind.FREE


def _bring(root: str) -> None:
    """Everything that was staged is committed, and nothing is left on the node."""
    catalog = open_catalog(root)

    def wants(action: Action) -> bool:
        return action.kind in KINDS

    reconciler = Reconciler(catalog, Patient(Threads()), owner=str(os.getpid()), wants=wants)
    while reconciler.round(time.time()).observed.drafts:
        pass
    reconciler.close()


def _dying(root: str, number: int, disks: str, armed: Callable[..., None]) -> None:
    model = Layer()
    manager = plain_manager(root, model, config(_disk(root, disks)))
    model.fill(5)
    manager.save(5)
    manager.close()
    armed(Path(root), number, die)
    _bring(root)
    os._exit(SURVIVED)


def _disk(root: str, disks: str) -> Path:
    """Of the node on which the run with this root saves."""
    return Path(disks, Path(root).name)


def _check(root: str, disks: str) -> list[int]:
    """What a reader finds; the next manager then ends it all."""
    before = saved_steps(root)
    _bring(root)
    assert saved_steps(root) == [5]
    assert loaded(root) == (5, {5.0})
    catalog = open_catalog(root)
    assert [path for path in _disk(root, disks).rglob("*") if path.is_file()] == []
    assert catalog.observe().drafts == ()
    assert list(catalog.store.list_objects(".ray_ckpt/staging")) == []
    assert catalog.store.stat(".ray_ckpt/drafts") is None
    return before


@pytest.mark.slow
def test_a_manager_that_dies_anywhere_leaves_nothing_or_all_and_the_next_ends_it(
    tmp_path: Path,
) -> None:
    roots = (str(tmp_path / f"run{number}") for number in itertools.count())
    disks = str(tmp_path / "disks")
    found = [_check(root, disks) for _, root in attempts(_dying, roots, disks, arm)]
    assert (found[0], found[-1]) == ([], [5])  # between: two threads take turns as they like


@pytest.mark.s3
@pytest.mark.slow
def test_on_an_object_store_the_same_holds(s3_root: str, tmp_path: Path) -> None:
    roots: Iterator[str] = (f"{s3_root}{number}" for number in itertools.count())
    disks = str(tmp_path / "disks")
    found = [_check(root, disks) for _, root in attempts(_dying, roots, disks, arm_s3)]
    assert (found[0], found[-1]) == ([], [5])  # between: two threads take turns as they like
