"""One plain function that carries out an action; Ray runs it as a task, a command line as it is.

Every action may run twice: its effect is looked for first, attempts work in private folders, and
what becomes visible does so in one step.
"""

import contextlib
import errno
import os
import socket
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_ckpt.cluster.attempts import Attempt, AttemptGuard
from ray_ckpt.cluster.task_log import TaskLog
from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import NODE
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.copy_states import (
    COPIED_AT,
    FINGERPRINT,
    LOOKED_AT,
    READ_AT,
    STATE,
    WHY,
    CopyState,
)
from ray_ckpt.core.errors import (
    ConflictError,
    IntegrityError,
    OutOfMemoryError,
    StepNotFoundError,
    StorageError,
)
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.promoting import EPOCH, METRICS, NON_FINITE, publish_of
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.beats import beating, first_beat
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.copy_look import Made, look_at_copy
from ray_ckpt.storage.copies.hand_over import handing_over
from ray_ckpt.storage.copies.promote import promote_copy
from ray_ckpt.storage.copies.publish import publish_checkpoint, publish_export
from ray_ckpt.storage.copies.retire import retire_copy
from ray_ckpt.storage.gathering import commit_draft, free, gather
from ray_ckpt.storage.lease import Guard
from ray_ckpt.storage.memory import peak_rss_bytes
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.secrets import without_secrets

if TYPE_CHECKING:
    from ray_ckpt.tensors.export import Crew
    from ray_ckpt.tensors.exporting import Export
    from ray_ckpt.tensors.output_shards import OutputShard

Result = dict[str, Any]
"""What a record keeps of a finished action; plain JSON values."""


def run_action(
    root: str, attempt: Attempt, *, node: str | None = None, crew: "Crew | None" = None
) -> Result:
    """The action's effect is there; returns what its record says about it.

    Tells that it lives and how far it is meanwhile; `node` is Ray's id of where that is. `crew` has
    a part in an export; without one it is made here alone. What an attempt that failed said lies
    under `.ray_ckpt/logs/` then.

    Raises:
        OutOfMemoryError: this process may not take as much memory as it needs.
    """
    started = time.perf_counter()
    catalog = open_catalog(root)
    guard = AttemptGuard(catalog=catalog, attempt=attempt)
    first = first_beat(attempt_started_at=attempt.started_at, node=node)
    told = TaskLog(catalog.uri, attempt)
    with (
        told.lines(),
        beating(
            catalog.store,
            attempt.beat_key,
            first=first,
            every_s=attempt.beat_s,
            heard=told.heard,
        ) as progress,
    ):
        try:
            run = _RUNNERS[attempt.action.kind]
            if attempt.action.kind is ActionKind.EXPORT:
                run = partial(_export, crew=crew, places_after=attempt.places_after)
            elif attempt.action.kind is ActionKind.PUBLISH:
                run = partial(_publish, verify=attempt.verify)
            elif attempt.action.kind is ActionKind.LOOK:
                run = partial(_look, verify=attempt.verify)
            result = run(catalog, attempt.action, guard, progress)
        except Exception as error:
            _keep_log(catalog, attempt, traceback.format_exc())
            if _is_lack_of_memory(error):
                raise _out_of_memory(error) from error
            raise
    return {
        **result,
        "seconds": round(time.perf_counter() - started, 3),
        EPOCH: attempt.epoch,
        "host": socket.gethostname(),
        NODE: node,
    }


def _is_lack_of_memory(error: Exception) -> bool:
    """Torch's allocator says it with a RuntimeError, a mapping with an OSError."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )


def _out_of_memory(error: Exception) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{socket.gethostname()} gave no more memory, after {peak_rss_bytes() / 1e9:.2f} GB: "
        f"{str(error) or type(error).__name__}",
        safe="nothing of the attempt is visible",
        do="give tasks a node with more memory (custom resource ckpt_io)",
    )


def _keep_log(catalog: Catalog, attempt: Attempt, text: str) -> None:
    host = f"{socket.gethostname()} process {os.getpid()}"
    head = f"{attempt.action.title}, attempt {attempt.number} on {host}\n"
    with contextlib.suppress(StorageError):  # the error itself is what matters
        data = (head + without_secrets(text)).encode()
        catalog.store.write(names.log_key(attempt.action.key, attempt.number), data)


def _verify(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Reads every byte. Damage moves the step out of every reader's way."""
    try:
        return _read(catalog, action, progress)
    except IntegrityError:
        guard()
        catalog.quarantine(action.step)
        raise


def _read(catalog: Catalog, action: Action, progress: Progress) -> Result:
    manifest = catalog.verify(action.step, progress=progress)
    return {"bytes": manifest.total_bytes, "files": len(manifest.files)}


def _export(
    catalog: Catalog,
    action: Action,
    _: Guard,
    progress: Progress,
    *,
    crew: "Crew | None" = None,
    places_after: Sequence[str] = (),
) -> Result:
    """The engine returns an export that is there already as it is."""
    from ray_ckpt.tensors.export import alone, export_step  # torch, which the manager never needs

    assert action.export is not None, "an export action names its export"
    work = crew or alone

    def make(export: "Export", shards: "Sequence[OutputShard]", told: Progress) -> None:
        with handing_over(catalog.store, export.parts, places_after):
            work(export, shards, told)

    source = catalog.manifest(action.step)
    manifest = export_step(catalog, source, action.export, progress=progress, crew=make)
    return {"bytes": manifest.total_bytes, "content_id": manifest.content_id}


def _publish(
    catalog: Catalog, action: Action, _: Guard, progress: Progress, *, verify: Proof = "sizes"
) -> Result:
    """Looks at the destination first; the same content there means nothing is sent.

    Raises:
        ConflictError: somebody removed the export after this was planned, and it is to be made
            again; or the checkpoint that is to be copied is another one now.
    """
    assert action.destination is not None, "a publish action says where it goes"
    if action.export is None:
        with reading(catalog.store, action.step, who=action.title):
            manifest = _as_planned(catalog, action)
            published = publish_checkpoint(
                catalog, manifest, action.destination, verify=verify, progress=progress
            )
    else:
        with _export_stays(catalog, action.export.name, action.step):
            export = catalog.export(action.export.name, action.step)
            manifest = export.manifest
            published = publish_export(
                catalog, export, action.destination, verify=verify, progress=progress
            )
    return {
        "location": published.location,
        "bytes": published.bytes_sent,
        "bytes_copied": published.bytes_copied,
        "content_id": manifest.content_id,
        "verified": verify,
        FINGERPRINT: published.fingerprint,
        METRICS: dict(manifest.metrics),
        NON_FINITE: len(manifest.non_finite),
    }


def _as_planned(catalog: Catalog, action: Action) -> Manifest:
    """The manifest of the very checkpoint that the action is about."""
    manifest = catalog.manifest(action.step)
    if manifest.content_id != action.source_id:
        raise ConflictError(
            f"step-{action.step} was saved anew before it was copied",
            catalog.uri,
            "nothing was copied",
            "nothing: what is there now is looked at by itself",
        )
    return manifest


@contextlib.contextmanager
def _export_stays(catalog: Catalog, name: str, step: int) -> Generator[None]:
    """What goes wrong because somebody removed the export meanwhile is a ConflictError."""
    try:
        yield
    except (StepNotFoundError, StorageError) as error:
        folder = names.export_dir(name, step)
        if catalog.store.stat(names.manifest_key(folder)) is not None:
            raise
        raise ConflictError(
            f"somebody removed {name} of step-{step} before it was copied",
            f"{catalog.uri}/{folder}",
            "the checkpoint is untouched, and no reader sees a part of the copy",
            "nothing, it is made again; if nobody is to need it, leave it out of the policy",
        ) from error


def _promote(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Lets a name lead to a copy; a repeated run finds that it does."""
    assert action.pointer is not None, "a promote action says which name"
    publish = publish_of(action)
    content_id = str(catalog.records.action(publish).result.get("content_id"))
    progress.begin(f"lets {action.pointer} lead to it")
    location = promote_copy(publish, action.pointer, content_id=content_id, guard=guard)
    return {"location": location, "step": action.step}


def _purge(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Looks once more whether the step may go; a repeated run finds it gone and says 0 bytes."""
    guard()
    progress.begin("moves it to the trash")
    return {"bytes": purge_step(catalog, action, now=time.time(), guard=guard)}


def _retire(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Removes one copy at its destination; a repeated run finds it gone."""
    publish = replace(action, kind=ActionKind.PUBLISH)
    made = catalog.records.action(publish)  # must be read first: a copy made anew is another one
    guard()
    progress.begin("removes the copy")
    retired = retire_copy(catalog.uri, publish, content_id=made.result.get("content_id"))
    return {
        "place": retired.place,
        "bytes": retired.bytes_freed,
        COPIED_AT: made.changed_at,
    }


def _look(
    catalog: Catalog, action: Action, _: Guard, progress: Progress, *, verify: Proof = "sizes"
) -> Result:
    """Says what became of one copy, and changes nothing."""
    publish = replace(action, kind=ActionKind.PUBLISH)
    copy = catalog.records.action(publish)
    before = catalog.records.action(action).result
    is_same = before.get(COPIED_AT) == copy.changed_at
    fingerprint = before.get(FINGERPRINT) if is_same else copy.result.get(FINGERPRINT)
    made = Made(content_id=str(copy.result.get("content_id")), fingerprint=fingerprint or "")
    looked_at = time.time()
    look = look_at_copy(publish, made, verify=verify, progress=progress)
    is_whole = look.was_read and look.state is CopyState.PRESENT
    return {
        STATE: look.state,
        WHY: look.why,
        LOOKED_AT: looked_at,
        READ_AT: looked_at if is_whole else before.get(READ_AT) if is_same else None,
        FINGERPRINT: look.fingerprint,
        COPIED_AT: copy.changed_at,
    }


def _gather(catalog: Catalog, action: Action, _: Guard, progress: Progress) -> Result:
    """Sends what has not arrived yet, to a private place."""
    assert action.node is not None, "a gather names its node"
    return {"bytes": gather(catalog, action.source_id, action.node, progress=progress)}


def _commit(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Makes the step visible; a repeated run finds it committed and says so."""
    progress.begin("commits it")
    manifest = commit_draft(catalog, action.source_id, guard, now=time.time())
    return {"bytes": manifest.total_bytes, "content_id": manifest.content_id}


def _free(catalog: Catalog, action: Action, _: Guard, progress: Progress) -> Result:
    """Removes the save's folder on its node; a repeated run finds it gone and says 0 bytes."""
    assert action.node is not None, "and so does what is freed"
    progress.begin("frees the disk")
    return {"bytes": free(catalog, action.source_id, action.node)}


def _scrub(catalog: Catalog, action: Action, guard: Guard, progress: Progress) -> Result:
    """Reads every byte once more. Of a damaged step nothing says any longer that it is verified."""
    try:
        return _read(catalog, action, progress)
    except IntegrityError:
        guard()
        catalog.records.forget_action(replace(action, kind=ActionKind.VERIFY))
        catalog.quarantine(action.step)
        raise


_RUNNERS: dict[ActionKind, Callable[[Catalog, Action, Guard, Progress], Result]] = {
    ActionKind.VERIFY: _verify,
    ActionKind.EXPORT: _export,
    ActionKind.PUBLISH: _publish,
    ActionKind.PROMOTE: _promote,
    ActionKind.PURGE: _purge,
    ActionKind.RETIRE: _retire,
    ActionKind.LOOK: _look,
    ActionKind.SCRUB: _scrub,
    ActionKind.GATHER: _gather,
    ActionKind.COMMIT: _commit,
    ActionKind.FREE: _free,
}
