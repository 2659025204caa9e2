"""What it takes a manager to look at a root, to start there, and to have actions done.

Every step is committed and verified. Its files are a byte each: a manager reads none of them. Its
manifest lists as many tensors as asked for, in a piece a file. The actions cost nothing themselves:
what is measured is all that a manager does about them.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from jobs.bench.counting import CountingStore
from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.reconciler import Reconciler, Round
from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest, TensorBytes, TensorEntry
from ray_ckpt.core.observation import CheckpointView
from ray_ckpt.core.reconcile import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.marker import MarkerCommit
from ray_ckpt.storage.observer import CLOSE_EVERY_S
from ray_ckpt.storage.read_once import at_once

NUM_FILES = 4
NUM_PARAMETERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """One look at all steps of one root."""

    num_steps: int
    look: str
    wall_s: float
    cpu_s: float
    """Of this process and all its threads."""
    num_list: int
    num_get: int
    num_head: int
    num_stat: int
    """Questions to a local file system."""
    num_put: int
    manifest_kb: float


def measure_looks(
    root: str, steps: Sequence[int], *, num_tensors: int, num_actions: int
) -> list[Looked]:
    """Six rows for each number of steps; what was written below `root` is removed."""
    rows: list[Looked] = []
    for num_steps in steps:
        with _filled(root, num_steps, num_tensors) as store:
            rows.extend(_looks(store, num_steps, num_tensors, num_actions))
    return rows


def _looks(store: Store, num_steps: int, num_tensors: int, num_actions: int) -> list[Looked]:
    counting = CountingStore(store)
    counted = cast(Store, counting)
    catalog = Catalog(counted, MarkerCommit(counted))
    observer = catalog.observer()
    manifest_kb = len(_manifest(1, num_tensors).to_json()) / 1e3

    def timed(what: str, act: Callable[[], None]) -> Looked:
        counting.take()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        act()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        calls = counting.take()
        return Looked(
            num_steps=num_steps,
            look=what,
            wall_s=wall_s,
            cpu_s=cpu_s,
            num_list=calls.get("LIST", 0),
            num_get=calls.get("GET", 0),
            num_head=calls.get("HEAD", 0),
            num_stat=calls.get("STAT", 0),
            num_put=calls.get("PUT", 0),
            manifest_kb=manifest_kb,
        )

    def look(what: str, now: float) -> Looked:
        def act() -> None:
            seen = observer.observe(now=now).checkpoints
            assert len(seen) >= num_steps, "every step is seen"

        return timed(what, act)

    first = look("first", 0.0)
    again = look("again", 1.0)
    _commit(store, num_steps + 1, num_tensors)
    more = look("one more step", 2.0)
    looks = [first, again, more, look("close", CLOSE_EVERY_S)]
    manager = Reconciler(catalog, _AtOnce(), owner="bench")
    started = timed("a manager starts", lambda: _turn_until_rest(manager))
    for number in range(num_actions):
        _commit(store, num_steps + 2 + number, num_tensors, is_verified=False)
    done = timed(f"{num_actions} actions", lambda: _turn_until_rest(manager))
    manager.close()
    return [*looks, started, done]


def _turn_until_rest(manager: Reconciler) -> None:
    """Rounds without a pause, until nothing is left to do."""
    last: Round | None = None
    while last is None or last.running or last.waiting:
        last = manager.round(time.time())


class _AtOnce:
    """Every action has succeeded when it begins, on enough nodes for all that a policy allows."""

    def nodes(self) -> Sequence[LiveNode]:
        return [LiveNode(id=str(number), name=str(number)) for number in range(8)]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result({})
        return done

    def takes(self, action: Action) -> bool:
        return True

    def why_waiting(self, action: Action) -> str:
        return "waits for nothing"

    def has_room(self, action: Action) -> bool:
        return True

    def end_process(self, beat: Beat) -> None:
        """None was begun."""

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def _filled(root: str, num_steps: int, num_tensors: int) -> Generator[Store]:
    """A root of its own below `root`, with that many steps."""
    store = open_catalog(f"{root.rstrip('/')}/ray_ckpt-bench-{uuid.uuid4().hex[:8]}").store
    try:
        at_once(lambda step: _commit(store, step, num_tensors), range(1, num_steps + 1))
        yield store
    finally:
        store.delete([info.key for info in store.list_objects("")])


def _commit(store: Store, step: int, num_tensors: int, *, is_verified: bool = True) -> None:
    """The step as a save leaves it, and a manager's verify action."""
    manifest = _manifest(step, num_tensors)
    folder = names.step_dir(step)
    for entry in manifest.files:
        store.create(f"{folder}/{entry.path}", b"0")
    store.create(names.manifest_key(folder), manifest.to_json())
    if not is_verified:
        return
    view = CheckpointView(step=step, state=CheckpointState.COMMITTED, manifest=manifest)
    record = ActionRecord(action=verify_action(view)).started(1.0).succeeded({}, 2.0)
    store.create(names.action_key(record.action.key), record.to_json())


def _manifest(step: int, num_tensors: int) -> Manifest:
    paths = [f"__{rank}_0.distcp" for rank in range(NUM_FILES)]
    return Manifest(
        step=step,
        save_id=f"save{step}",
        created_at="2026-11-22T15:45:40+00:00",
        lineage=Lineage(run_id="bench"),
        files=tuple(
            FileEntry(path=p, size_bytes=1, digest=f"crc64nvme:{step:016x}") for p in paths
        ),
        tensors=tuple(map(_tensor, range(num_tensors))),
        tensor_bytes={path: TensorBytes(model=0, optimizer=1) for path in paths},
        world_size=NUM_FILES,
    )


def _tensor(number: int) -> TensorEntry:
    return TensorEntry(
        name=f"optimizer.state.layers.{number}.attention.wq.weight.exp_avg",
        dtype="float32",
        shape=(NUM_PARAMETERS, NUM_PARAMETERS),
    )
