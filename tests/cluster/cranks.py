"""A manager that a test turns itself, round by round, and places where its tasks hang."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.executors import Executor, RayTasks, Running
from ray_ckpt.cluster.nodes import kill_if_same
from ray_ckpt.cluster.reconciler import Reconciler, Round
from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.names import MANIFEST, export_dir
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.beats import all_beats
from tests.waiting import wait_for


class Crank:
    """One root's manager in this process."""

    def __init__(self, root: str, executor: Executor) -> None:
        self.catalog = open_catalog(root)
        self.reconciler = Reconciler(self.catalog, executor, owner="test")

    def turn(self) -> Round:
        return self.reconciler.round(time.time())

    def until(self, look: Callable[[Round], object]) -> Round:
        """The round after which `look` finds what it looks for."""
        return wait_for(lambda: r if look(r := self.turn()) else None)

    def until_all(self, kind: ActionKind, state: ActionState) -> list[ActionRecord]:
        """The records of a kind, once each is in this state."""

        def are_all(_: Round) -> bool:
            found = self.records(kind)
            return bool(found) and all(record.state is state for record in found)

        self.until(are_all)
        return self.records(kind)

    def beat_of(self, kind: ActionKind) -> Beat:
        """The first sign of life of a task of this kind."""
        self.until(lambda _: self._beats(kind))
        return self._beats(kind)[0]

    def heard_of(self, action: Action) -> None:
        """A task has begun with it, and `close` will find its process."""
        self.until(lambda _: any(key == action.key for key, _ in all_beats(self.catalog.store)))

    def records(self, kind: ActionKind) -> list[ActionRecord]:
        found = self.catalog.records.actions().values()
        return [record for record in found if record.action.kind is kind]

    def close(self) -> None:
        """No task is left that hangs, and the lease is free."""
        for beat in all_beats(self.catalog.store).values():
            if beat.node is not None:
                kill_if_same(beat.pid, beat.process_born)
        self.reconciler.close()

    def _beats(self, kind: ActionKind) -> list[Beat]:
        keys = {record.action.key for record in self.records(kind)}
        beats = all_beats(self.catalog.store)
        return [beat for (key, _), beat in beats.items() if key in keys]


class OnlyOn(RayTasks):
    """Knows of these nodes alone."""

    def __init__(self, *ids: str | None) -> None:
        self._ids = ids
        self.asked: dict[tuple[int, ActionKind], str | None] = {}
        """By step and kind, the node that Ray was asked for; it may take another one."""

    def nodes(self) -> Sequence[LiveNode]:
        return [node for node in super().nodes() if node.id in self._ids]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        self.asked[attempt.action.step, attempt.action.kind] = (
            placement.node.id if placement else None
        )
        return super().start(root, attempt, placement)


class Unreachable:
    """Processes of a host that nobody can stop: what is given up there may wake up again."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        self.futures: dict[str, Future[Any]] = {}
        """By the attempt's title."""

    def nodes(self) -> Sequence[LiveNode]:
        return [LiveNode(id="", name="elsewhere")]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Future[Any]:
        future = self._pool.submit(run_action, root, attempt)
        self.futures[attempt.title] = future
        return future

    def takes(self, action: Action) -> bool:
        return True

    def why_waiting(self, action: Action) -> str:
        return "waits for a process"

    def has_room(self, action: Action) -> bool:
        return False

    def end_process(self, beat: Beat) -> None:
        pass

    def close(self) -> None:
        self._pool.shutdown()


class HangingPlace:
    """A destination that never answers, as a dead file server: who reads there waits for ever."""

    def __init__(self, folder: Path, *, steps: Sequence[int]) -> None:
        self.uri = str(folder)
        self._pipes = [folder / export_dir("hf", step) / MANIFEST for step in steps]
        for pipe in self._pipes:
            pipe.parent.mkdir(parents=True)
            os.mkfifo(pipe)

    def answers(self) -> None:
        """Whoever asks from now on finds nothing there; who waits already waits on."""
        for pipe in self._pipes:
            pipe.unlink(missing_ok=True)
