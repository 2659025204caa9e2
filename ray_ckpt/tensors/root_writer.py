"""A run as the one writer of its root: its lease, its id, and the step it goes on from.

Knows whose save it is. Neither what a save holds nor how it is carried out.
"""

import logging
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from ray_ckpt.core import names
from ray_ckpt.core.draft import Node
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.manifest import Lineage, Manifest, StartSource
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import TRAINER, Lease
from ray_ckpt.tensors.contents import Contents
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.run import Run
from ray_ckpt.tensors.save_target import IntoRoot, OntoNodes, SaveTarget

log = logging.getLogger("ray_ckpt")
_FRESH = -1
"""The branch of a run that goes on from nothing: every step is newer."""


class RootWriter:
    """Holds the root's lease from its construction, which is collective, to `close`."""

    def __init__(
        self, catalog: Catalog, run: Run, ranks: Ranks, *, local_dir: str | None = None
    ) -> None:
        self._catalog = catalog
        self._run = run
        self._ranks = ranks
        self._token = ranks.on_coordinator(lambda: uuid.uuid4().hex[:12])
        self.owner = run.owner or self._token
        """Who writes, as its lease and its events say."""
        self._lease = Lease(catalog.store, TRAINER, owner=self.owner)
        self._run_id = ranks.on_coordinator(self._begin)
        self._resumed_from: int | None = None
        self._started_from: tuple[StartSource, ...] = ()
        self._num_saves = 0
        self.check_lease = self._lease.guard()
        """Raises if another writer has taken over."""
        self.branch: int | None = None
        """The step this run goes on from, until its first save: newer ones are another branch."""
        self.target: SaveTarget = IntoRoot(catalog=catalog)
        """Where saves go."""
        if local_dir is not None:
            self.target = self._onto_nodes(Path(local_dir))

    def goes_on_from(self, step: int | None, *, started_from: tuple[StartSource, ...]) -> None:
        """What is saved from now on comes after `step`; None for a fresh start.

        `started_from` is what the run took its weights from before its first step.
        """
        self.branch = self._resumed_from = step
        if step is None and self.target.becomes == "staged":
            self.branch = _FRESH  # what others have staged must not become its future
        self._started_from = started_from

    def has_saved(self) -> None:
        """Once a save is committed the branch is this run's own: nothing newer is left of another.

        A staged save may still be lost; then the next one sets aside what this one was to.
        """
        if self.target.becomes == "committed":
            self.branch = None

    def draft(
        self, step: int, contents: Contents, *, is_last_step: bool, metrics: Mapping[str, float]
    ) -> Manifest:
        """The manifest of a save that begins now, with an id of its own; the same on every rank.

        Files, tensors and the model's keys are filled in by those who write them.
        """
        self._num_saves += 1
        return Manifest(
            step=step,
            save_id=names.save_id(self._token, self._num_saves),
            created_at="",
            lineage=Lineage(
                run_id=self._run_id,
                resumed_from=self._resumed_from,
                started_from=self._started_from,
            ),
            files=(),
            world_size=self._ranks.size,
            is_last_step=is_last_step,
            metrics=metrics,
            versions={"torch": torch.__version__},
            model=contents.model,
            holds=contents.holds,
            needs=contents.needs,
        )

    def close(self) -> None:
        """The root is free for the next writer."""
        if self._ranks.is_coordinator:
            if self.target.becomes == "staged":
                self._tell_staged()
            self._lease.release()

    def _onto_nodes(self, local_dir: Path) -> OntoNodes:
        """The disk of this node, without what was left there by trainers before; collective."""
        target = OntoNodes(
            catalog=self._catalog,
            node=self._run.node or Node(host=socket.gethostname()),
            folder=local_dir / names.run_name(self._catalog.uri),
        )
        live = self._ranks.on_coordinator(
            lambda: {d.save_id for d in self._catalog.drafts.all() if d.ended is None}
        )
        target.sweep(live=live, own=self._token)
        return target

    def _tell_staged(self) -> None:
        """Which steps are no checkpoints yet, where they lie, and who brings them to the root."""
        try:
            drafts = [draft for draft in self._catalog.drafts.all() if draft.ended is None]
        except StorageError as error:
            log.warning("nobody can tell what is still to be brought to the root: %s", error)
            return
        for draft in drafts:
            log.info(
                "step-%d lies on %s and is no checkpoint yet; the manager of %s brings it there, "
                "or on each of these hosts: ray-ckpt drain %s",
                draft.step,
                ", ".join(node.title for node in draft.nodes),
                self._catalog.uri,
                self._catalog.uri,
            )

    def _begin(self) -> str:
        """On rank 0: the root is writable and ours; returns the run's id."""
        self._lease.acquire()
        # the lease is exclusive: whatever another trainer left in staging will never be finished
        for remains in self._catalog.commit.remains():
            if names.is_save(remains.attempt):
                self._catalog.commit.give_up(remains)
                log.warning("removed what %s left: %s", remains.attempt, remains.what)
        name = names.run_name(self._catalog.uri)
        return self._catalog.records.begin_run(f"{name}-{self._token}", self._run.policy).run_id
