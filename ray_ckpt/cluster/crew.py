"""The shards of one export, made by several nodes of the cluster at once.

    the export's own task    makes one shard after the other, whatever the others do
    helpers                  a Ray task a shard, as many as there are free slots for: what others
                             wait for is not taken

A shard that a lost helper had goes back to those that are left, and one that a helper does not come
to the end of is made here as well: of two who make the same shard the first one counts.
"""

import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ckpt.cluster import nodes, priority
from ray_ckpt.cluster.ray_result import raised_in
from ray_ckpt.core.errors import ConflictError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.exporting import Export, begin_export
from ray_ckpt.tensors.output_shards import OutputShard

log = logging.getLogger("ray_ckpt")
_LOOK_EVERY_S = 0.2
_ASK_FOR_ROOM_EVERY_S = 1.0
_PATIENCE_S = 30.0
"""Before a shard that a helper has is made here as well."""
_SLOW = 2.0
"""And so many times as long as the slowest one that was made so far."""
_ENDS_WITHIN_S = 5.0
_MAX_LOST = 3
"""Helpers; after that the rest is made without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOrder:
    """One shard of one export: all that a helper is told."""

    root: str
    step: int
    spec: ExportSpec
    export_id: str
    file: str


def make_shard(order: ShardOrder) -> None:
    """The shard is finished, by a task that gives way to training; the plan is made anew.

    Raises:
        ConflictError: the step was saved anew, or another version of ray_ckpt is at work here.
    """
    priority.giving_way(lambda: _make(order))


def _make(order: ShardOrder) -> None:
    catalog = open_catalog(order.root)
    export = begin_export(catalog, catalog.manifest(order.step), order.spec)
    if export.parts.export_id != order.export_id:
        raise ConflictError(
            f"{order.file} of step-{order.step} would not be the same if it was made here",
            order.root,
            "nothing of the export is visible",
            "nothing, it is tried again; install the same ray_ckpt and torch on every node",
        )
    export.make(export.shard(order.file))


def together(title: str) -> "_Crew":
    """A crew of Ray tasks that the dashboard shows as `<title> 3/8`."""
    return _Crew(title)


class _Crew:
    def __init__(self, title: str) -> None:
        self._title = title

    def __call__(self, export: Export, shards: Sequence[OutputShard], progress: Progress) -> None:
        with ThreadPoolExecutor(1, "ray_ckpt shard") as thread:
            work = _Work(self._title, export, deque(shards), progress, thread)
            try:
                work.until_done()
            finally:
                work.end()


@dataclass(frozen=True, slots=True)
class _Helper:
    task: "ray.ObjectRef[Any]"
    shard: OutputShard
    begun_at: float


class _Work:
    """What is left, and who has what."""

    def __init__(
        self,
        title: str,
        export: Export,
        left: deque[OutputShard],
        progress: Progress,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._title = title
        self._export = export
        self._left = left
        self._progress = progress
        self._thread = thread
        self._own: tuple[OutputShard, Future[None]] | None = None
        self._helpers: list[_Helper] = []
        self._num_lost = 0
        self._slowest_s = 0.0
        self._asked_for_room_at: float | None = None

    def until_done(self) -> None:
        """Every shard is finished; raises what went wrong with one."""
        while self._left or self._helpers or self._own:
            self._take_one()
            self._send_some()
            self._wait()
            self._see_own()
            self._see_helpers()

    def end(self) -> None:
        """No helper is at work any more, unless its process does not answer."""
        tasks = [helper.task for helper in self._helpers]
        for task in tasks:
            ray.cancel(task, force=True)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=_ENDS_WITHIN_S)

    def _take_one(self) -> None:
        """Its own task is never without work, as long as there is any."""
        if self._own is not None:
            return
        if self._left:
            self._begin(self._left.popleft(), self._progress)
        elif (late := self._late()) is not None:
            log.info("%s: %s is late and made twice", self._title, late.shard.file)
            self._begin(late.shard, Progress())

    def _begin(self, shard: OutputShard, progress: Progress) -> None:
        self._own = shard, self._thread.submit(self._export.make, shard, progress=progress)

    def _late(self) -> _Helper | None:
        """The helper that has been at its shard far too long."""
        waited_s = max(_PATIENCE_S, _SLOW * self._slowest_s)
        late = [h for h in self._helpers if time.monotonic() - h.begun_at > waited_s]
        return min(late, key=lambda helper: helper.begun_at, default=None)

    def _send_some(self) -> None:
        """To as many nodes as have room now."""
        if not self._left or self._num_lost >= _MAX_LOST:
            return
        now = time.monotonic()
        asked_at = self._asked_for_room_at
        if asked_at is not None and now - asked_at < _ASK_FOR_ROOM_EVERY_S:
            return
        self._asked_for_room_at = now
        num_gpus = self._export.spec.num_gpus
        room = nodes.room_for_helpers(len(self._helpers), num_gpus=num_gpus)
        for _ in range(min(len(self._left), room)):
            self._helpers.append(self._sent(self._left.popleft()))

    def _sent(self, shard: OutputShard) -> _Helper:
        export = self._export
        files = [other.file for other in export.plan.shards]
        order = ShardOrder(
            root=export.catalog.uri,
            step=export.source.step,
            spec=export.spec,
            export_id=export.parts.export_id,
            file=shard.file,
        )
        task = ray.remote(make_shard).options(
            name=f"{self._title} {files.index(shard.file) + 1}/{len(files)}",
            max_retries=0,
            num_gpus=export.spec.num_gpus,
            **nodes.options_of_helper(),
        )
        return _Helper(task.remote(order), shard, time.monotonic())

    def _wait(self) -> None:
        """For something to end, but not for long."""
        if self._helpers:
            ray.wait([helper.task for helper in self._helpers], timeout=_LOOK_EVERY_S)
        elif self._own is not None:
            concurrent.futures.wait([self._own[1]], timeout=_LOOK_EVERY_S)

    def _see_own(self) -> None:
        if self._own is None or not self._own[1].done():
            return
        shard, future = self._own
        self._own = None
        future.result()
        for helper in [h for h in self._helpers if h.shard is shard]:
            ray.cancel(helper.task, force=True)
            self._helpers.remove(helper)
            self._progress.advance(shard.size_bytes)

    def _see_helpers(self) -> None:
        for helper in list(self._helpers):
            finished, _ = ray.wait([helper.task], timeout=0)
            if finished:
                self._helpers.remove(helper)
                self._see(helper)

    def _see(self, helper: _Helper) -> None:
        try:
            ray.get(helper.task)
        except RayTaskError as error:
            raise raised_in(error) from None
        except RayError as error:
            self._num_lost += 1
            self._left.append(helper.shard)
            log.warning("lost the helper that made %s: %s", helper.shard.file, error)
        else:
            self._slowest_s = max(self._slowest_s, time.monotonic() - helper.begun_at)
            self._progress.advance(helper.shard.size_bytes)
