"""The end of the chain: verify, export, publish, and a name that leads to the copy."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ray_ckpt.cluster.drain import drain
from ray_ckpt.cluster.executors import Threads
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_policy import KeepCopies
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.history import EventReader
from tests.roots import make_root


def policy(to: str, **publish: object) -> LifecyclePolicy:
    export = ExportPolicy(name="hf", dtype="float32", every_steps=10)
    copy = PublishPolicy(export="hf", to=to, promote="latest")
    return LifecyclePolicy(export=(export,), publish=(replace(copy, **publish),))


def promotes(catalog: Catalog) -> dict[int, ActionRecord]:
    records = catalog.records.actions().values()
    return {r.action.step: r for r in records if r.action.kind is ActionKind.PROMOTE}


def test_from_pretrained_loads_the_newest_copy_by_a_name_that_never_changes(
    root: str, tmp_path: Path
) -> None:
    copies = str(tmp_path / "copies")
    make_root(root, (10, 20), policy(copies, keep=KeepCopies(latest=1)))
    catalog = open_catalog(root)
    drain(catalog, Threads())
    latest = f"{copies}/exports/hf/latest"
    assert Path(latest).resolve() == Path(copies, "exports/hf/step-20").resolve()
    loaded = AutoModelForCausalLM.from_pretrained(latest)
    exported = AutoModelForCausalLM.from_pretrained(f"{root}/exports/hf/step-20")
    for one, other in zip(loaded.parameters(), exported.parameters(), strict=True):
        assert one.equal(other)
    assert [e.step for e in open_catalog(copies).observe().exports] == [20], "10 was retired"
    told = [e.text for e in EventReader(catalog.store).read()]
    assert f"promote step-20 hf to latest at {copies}: succeeded" in told


def test_the_name_goes_back_to_an_older_step_that_is_the_best(root: str, tmp_path: Path) -> None:
    copies = str(tmp_path / "copies")
    make_root(root, (10, 20, 30), policy(copies))
    catalog = open_catalog(root)
    store = open_catalog(copies).store
    for order, step in (("min", 30), ("max", 10), ("min", 30)):  # the loss falls
        best = policy(copies, promote_by="best", order=order)
        catalog.records.begin_run("run", best)
        drain(catalog, Threads())
        assert store.pointed("exports/hf/latest") == f"step-{step}"


def test_a_promote_whose_manager_died_before_it_said_so_ends_as_if_it_had_not(
    root: str, tmp_path: Path
) -> None:
    """Scenario 26: no action has its effect twice."""
    copies = str(tmp_path / "copies")
    make_root(root, (10, 20), policy(copies))
    catalog = open_catalog(root)
    drain(catalog, Threads())
    done = promotes(catalog)[20]
    link = Path(copies, "exports/hf/latest")
    before = link.lstat().st_ino
    catalog.records.write_action(ActionRecord(action=done.action).started(time.time()))
    drain(catalog, Threads())
    again = promotes(catalog)[20]
    assert (again.state, again.attempts) == (ActionState.SUCCEEDED, 2)
    assert link.lstat().st_ino == before, "it led there already"


@pytest.mark.s3
def test_on_s3_an_object_says_which_step(root: str, s3_root: str) -> None:
    make_root(root, (10, 20), policy(s3_root))
    drain(open_catalog(root), Threads())
    assert open_catalog(s3_root).store.read("exports/hf/latest") == b"step-20"
    assert [e.step for e in open_catalog(s3_root).observe().exports] == [10, 20]
