"""No sequence of saves, crashes, pins, readers, purges and jumping clocks loses what is protected.

Hypothesis makes up sequences over a real root; after every step the invariants hold by which a
lifecycle is judged (I1, I2, I3, I4, I5 and I8; their sentences are in the names below). Quick by
default; `RAY_CKPT_LONG_TESTS=1` looks for much longer.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import PurgeRefusedError, StepExistsError, StepNotFoundError
from ray_ckpt.core.lifecycle import ActionKind, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import purge_action, verify_action
from ray_ckpt.storage import lease as lease_module
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.readers import reading
from tests.storage.steps import content_of, empty_trash, save_export, save_step, stage

IS_LONG = bool(os.environ.get("RAY_CKPT_LONG_TESTS"))
HOURS = st.floats(min_value=-48.0, max_value=48.0)
GRACE_S = 3600.0


Views = dict[int, CheckpointView]


class Lifecycle(RuleBasedStateMachine):
    """A root, and what a person who wrote everything down knows of it."""

    saves = Bundle("saves")
    """Steps that were committed."""
    plans = Bundle("plans")
    """Purges that somebody planned a while ago."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ray_ckpt-machine-"))
        self.catalog = open_catalog(str(self.folder / "run"))
        self.now = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
        self.num_saves = 0
        self.contents: dict[str, dict[str, bytes]] = {}
        """Save id to what was saved."""
        self.erased: set[str] = set()
        self.most_verified = 0
        self.readers: dict[int, contextlib.ExitStack] = {}

    def teardown(self) -> None:
        for reader in self.readers.values():
            reader.close()
        shutil.rmtree(self.folder)

    # ---- what can happen ----

    @initialize(target=saves)
    def begin(self) -> object:
        """Enough that a purge may take something."""
        return multiple(*(self.save(is_verified=True) for _ in range(4)))

    @rule(target=saves, is_verified=st.booleans())
    def save(self, is_verified: bool) -> int:
        step = self.num_saves + 1
        self._save(step)
        if is_verified:
            self.verify(step)
        return step

    @rule(step=saves)
    def save_again(self, step: int) -> None:
        """A run that goes on from an older step."""
        if self.catalog.is_in_place(step):
            with pytest.raises(StepExistsError):
                save_step(self.catalog, step, save_id="refused")
        else:
            self._save(step)

    @rule()
    def die_in_the_middle_of_a_save(self) -> None:
        step = self.num_saves + 1
        files = {"__0_0.distcp": b"half"}
        stage(self.catalog, step, files=files, save_id=f"dead{self.num_saves}")

    @rule(step=saves)
    def verify(self, step: int) -> None:
        view = self._in_place().get(step)
        if view is not None:
            self.catalog.verify(step)
            record = ActionRecord(action=verify_action(view)).started(self.now)
            self.catalog.records.write_action(record.succeeded({}, self.now))

    @rule(step=saves)
    def export(self, step: int) -> None:
        if step in self._in_place():
            files = {"config.json": b"{}"}
            save_export(self.catalog, "hf", step, files=files, save_id=f"export{step}")

    @rule(step=saves, name=st.sampled_from(["ada", "bob"]), hours=st.none() | HOURS)
    def pin(self, step: int, name: str, hours: float | None) -> None:
        """For ever, for a while, or until a moment that is over already."""
        if step in self._in_place():
            until = None if hours is None else _iso(self.now + 3600.0 * hours)
            self.catalog.pin(step, name=name, reason="the paper", until=until)

    @rule(step=saves)
    def unpin(self, step: int) -> None:
        self.catalog.unpin(step)

    @rule(step=saves)
    def begin_to_read(self, step: int) -> None:
        if step in self._in_place() and step not in self.readers:
            self.readers[step] = contextlib.ExitStack()
            self.readers[step].enter_context(reading(self.catalog.store, step, who="load"))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end_to_read(self, data: st.DataObject) -> None:
        self.readers.pop(data.draw(st.sampled_from(sorted(self.readers)))).close()

    @rule(hours=HOURS)
    def let_the_clock_jump(self, hours: float) -> None:
        self.now += 3600.0 * hours

    @rule(target=plans, latest=st.integers(2, 4), every=st.none() | st.integers(2, 5))
    def plan_a_purge(self, latest: int, every: int | None) -> object:
        """Carried out at once, later, or twice: by a second purger, who knows nothing of it."""
        return multiple(*self._planned(KeepConfig(latest=latest, every_steps=every)))

    @rule(latest=st.integers(2, 4))
    def purge(self, latest: int) -> None:
        for action in self._planned(KeepConfig(latest=latest)):
            self._purge(action)

    @rule(action=plans)
    def carry_out_an_old_plan(self, action: Action) -> None:
        self._purge(action)

    @rule(steps=st.permutations(range(6)))
    def purge_everything(self, steps: list[int]) -> None:
        """The worst policy there could be."""
        views = sorted(self._in_place().items(), key=lambda item: steps[item[0] % 6])
        for _, view in views:
            self._purge(purge_action(view, grace_s=GRACE_S))

    @rule(step=saves)
    def undo(self, step: int) -> None:
        with contextlib.suppress(StepExistsError, StepNotFoundError):
            self.catalog.restore(step)

    @rule()
    def empty_the_trash(self) -> None:
        before = self._aside()
        empty_trash(self.catalog, older_than_s=GRACE_S, now=self.now)
        self.erased |= before - self._aside()

    # ---- what must hold whatever happened ----

    @invariant()
    def every_invariant_holds(self) -> None:
        in_place = self._in_place()
        self.what_is_committed_is_whole_and_no_mix_of_saves(in_place)
        self.every_save_is_in_one_place_or_was_erased_after_its_grace_time(in_place)
        self.two_verified_steps_remain(in_place)
        self.what_is_being_read_is_in_place(in_place)
        self.all_that_is_ours_alone_can_be_lost(in_place)

    def what_is_committed_is_whole_and_no_mix_of_saves(self, in_place: Views) -> None:
        """I1 and I3."""
        for step, view in in_place.items():
            assert content_of(self.catalog, step) == self.contents[_save_id(view)]
            assert self.catalog.damage(step) == []

    def every_save_is_in_one_place_or_was_erased_after_its_grace_time(
        self, in_place: Views
    ) -> None:
        """I2 and I5."""
        there, aside = {_save_id(view) for view in in_place.values()}, self._aside()
        assert there | aside | self.erased == set(self.contents)
        assert not there & aside

    def two_verified_steps_remain(self, in_place: Views) -> None:
        """I4."""
        verified = sum(v.state is CheckpointState.VERIFIED for v in in_place.values())
        self.most_verified = max(self.most_verified, verified)
        assert verified >= min(2, self.most_verified)

    def what_is_being_read_is_in_place(self, in_place: Views) -> None:
        """I5."""
        assert set(self.readers) <= set(in_place)

    def all_that_is_ours_alone_can_be_lost(self, in_place: Views) -> None:
        """I8."""
        with self._without_private_folder() as bare:
            after = {v.step: v for v in bare.observe().readable()}
            assert after.keys() == in_place.keys()
            for step, view in in_place.items():
                assert after[step].manifest == view.manifest
                assert after[step].pins == view.pins
                assert bare.damage(step) == []

    # ---- how ----

    def _save(self, step: int) -> None:
        self.num_saves += 1
        save_id = f"save{self.num_saves}"
        files = {".metadata": b"index", "__0_0.distcp": f"weights of {save_id}".encode()}
        created_at = _iso(1e9 + self.num_saves)
        save_step(self.catalog, step, files=files, save_id=save_id, created_at=created_at)
        self.contents[save_id] = files

    def _planned(self, keep: KeepConfig) -> list[Action]:
        policy = LifecyclePolicy(keep=replace(keep, trash_grace_s=GRACE_S))
        planned = plan(replace(self._observed(), policy=policy), now=self.now)
        return [action for action in planned.actions if action.kind is ActionKind.PURGE]

    def _purge(self, action: Action) -> None:
        protected = self._protected()
        record = ActionRecord(action=action).started(self.now)
        try:
            freed = purge_step(self.catalog, action, now=self.now)
        except PurgeRefusedError:
            assert action.step in self._in_place()
            return
        assert protected <= set(self._in_place())
        if freed:
            self.catalog.records.write_action(record.succeeded({"bytes": freed}, self.now))

    def _protected(self) -> set[int]:
        views = self._observed().at(self.now).readable()
        return {v.step for v in views if v.pins} | set(self.readers)

    def _observed(self) -> Observation:
        return self.catalog.observe()

    def _in_place(self) -> Views:
        return {view.step: view for view in self._observed().readable()}

    def _aside(self) -> set[str]:
        """Save ids in the trash, each of which `undo` could bring back."""
        folders = self.catalog.store.list_folders(names.TRASH)
        return {save[1] for name in folders if (save := names.parse_set_aside(name))}

    @contextlib.contextmanager
    def _without_private_folder(self) -> Generator[Catalog]:
        copy = self.folder / "copy"
        ignored = shutil.ignore_patterns(names.PRIVATE)
        try:
            if Path(self.catalog.uri).exists():
                shutil.copytree(self.catalog.uri, copy, ignore=ignored)
            yield open_catalog(str(copy))
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _save_id(view: CheckpointView) -> str:
    assert view.manifest is not None
    return view.manifest.save_id


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")


@pytest.mark.timeout(4 * 3600)
def test_no_sequence_of_events_loses_what_is_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    budget = settings(
        max_examples=1000 if IS_LONG else 20,
        stateful_step_count=80 if IS_LONG else 20,
        deadline=None,
        derandomize=not IS_LONG,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Lifecycle, settings=budget)
