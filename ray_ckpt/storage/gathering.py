"""How a staged save gets from its nodes to the root, becomes a checkpoint, and leaves the nodes.

    gather    on a node     each file: digest, then to the place where it waits; seen whole or not
    commit    anywhere      other branches set aside, then one commit; then the draft has ended
    free      on a node     the save's folder there is removed, and nothing else

Each may run twice and be killed anywhere: what a run finds done it leaves as it is.
"""

import shutil
from functools import partial
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Node
from ray_ckpt.core.errors import IntegrityError, NodeLostError, UsageError
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import algorithm_of, describe_file
from ray_ckpt.storage.lease import Guard
from ray_ckpt.storage.progress import UNTOLD, Progress

_NUM_THREADS = 4
_UNTOUCHED = "steps that were committed are untouched; nothing of this one is visible"


def gather(catalog: Catalog, save_id: str, node: Node, *, progress: Progress = UNTOLD) -> int:
    """What the node, this one, holds of the draft has arrived; returns the bytes sent.

    Raises:
        NodeLostError: a file is not there any more.
        IntegrityError: a file is not what the rank wrote; it was not sent.
    """
    draft = catalog.drafts.read(save_id)
    if draft.ended is not None:
        return 0
    missing = draft.missing_from(node)
    gone = [path for path in missing if not Path(path).is_file()]
    if gone:
        raise _gone(draft, node, gone)
    # each is read twice, to be digested and to be sent
    progress.begin("brings files", 2 * sum(entry.size_bytes for entry in missing.values()))
    send = partial(_send, catalog, draft, progress=progress)
    return sum(at_once(lambda one: send(*one), missing.items(), num_threads=_NUM_THREADS))


def _send(
    catalog: Catalog, draft: Draft, name: str, entry: FileEntry, *, progress: Progress
) -> int:
    path = Path(name)
    found = describe_file(path, entry.path, algorithm_of(entry), progress=progress)
    if found != entry:
        raise IntegrityError(
            f"{entry.path} of step-{draft.step} is {found.digest}, the rank wrote {entry.digest}",
            str(path),
            _UNTOUCHED,
            "look at the node's disk; training goes on, and saves again",
        )
    folder = names.step_dir(draft.step)
    key = catalog.commit.waiting_key(folder, draft.save_id, entry.path)
    catalog.store.upload(path, key, progress=progress)
    return entry.size_bytes


def commit_draft(catalog: Catalog, save_id: str, guard: Guard, *, now: float) -> Manifest:
    """The step is a checkpoint, made of what was brought, and the draft has ended.

    Raises:
        StepExistsError: another save of the step is committed, which this one does not supersede.
        UsageError: it supersedes a pinned step, or was abandoned meanwhile.
        LeaseHeldError: another manager has taken over.
    """
    draft = catalog.drafts.read(save_id)
    if not _was_committed(catalog, draft):
        _refuse_ended(catalog, draft)
        _set_aside_others(catalog, draft, guard, now=now)
        catalog.refuse_existing(draft.step)
        guard()
        catalog.commit_waiting(draft.manifest)
    _drop_copies(catalog, draft)
    catalog.drafts.end(save_id, "committed", why="all of it was brought", at=now)
    return draft.manifest


def free(catalog: Catalog, save_id: str, node: Node) -> int:
    """Nothing of a draft that has ended lies on the node, this one; returns the bytes freed.

    Raises:
        UsageError: the draft has not ended: what lies on the node may be all there is.
    """
    draft = catalog.drafts.read(save_id)
    if draft.ended is None:
        raise UsageError(
            f"the save of step-{draft.step} is still needed on {node.title}",
            catalog.uri,
            "nothing was removed",
        )
    folders = [Path(place.folder) for place in draft.places if place.node == node]
    return sum(remove_save(folder, save_id) for folder in folders)


def remove_save(folder: Path, save_id: str) -> int:
    """The folder of that save is gone, and its parents if nothing else is there; bytes freed.

    Raises:
        UsageError: the folder is not named after the save, or is a symbolic link.
    """
    if folder.name != names.save_attempt(save_id) or folder.is_symlink():
        raise UsageError("no folder of that save, so it is left alone", str(folder))
    files = [path for path in folder.rglob("*") if path.is_file()]
    freed = sum(path.lstat().st_size for path in files)
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def _was_committed(catalog: Catalog, draft: Draft) -> bool:
    """Whether this very save is a checkpoint already, wherever it was moved since."""
    for parent in (names.TRASH, names.QUARANTINE):
        aside = names.set_aside_dir(parent, draft.step, draft.save_id)
        if catalog.store.stat(names.manifest_key(aside)) is not None:
            return True
    return _save_in_place(catalog, draft.step) == draft.save_id


def _save_in_place(catalog: Catalog, step: int) -> str | None:
    return catalog.manifest(step).save_id if catalog.is_in_place(step) else None


def _set_aside_others(catalog: Catalog, draft: Draft, guard: Guard, *, now: float) -> None:
    """What the run left behind when it went on from an older step: drafts and committed steps.

    The newest goes first: whenever this dies, what is left is one unbroken branch.
    """
    why = f"training went on from an older step and saved step-{draft.step}"
    committed = [
        step
        for step, save_id in sorted(draft.supersedes, reverse=True)
        if _save_in_place(catalog, step) == save_id
    ]
    pinned = [step for step in committed if any(pin.holds(now) for pin in catalog.pins(step))]
    if pinned:
        raise UsageError(
            f"step-{draft.step} was saved by a run that went on from an older step, and step "
            f"{pinned[0]} of the branch that it leaves behind is pinned",
            catalog.uri,
            "both are safe: the pinned one in place, the other one where it was brought to",
            f"ray-ckpt unpin {catalog.uri} {pinned[0]}, then ray-ckpt retry {catalog.uri}",
        )
    guard()
    for _, save_id in draft.supersedes:
        if catalog.drafts.is_there(save_id):
            catalog.drafts.end(save_id, "abandoned", why=why, at=now)
    for step in committed:
        catalog.trash(step)


def _refuse_ended(catalog: Catalog, draft: Draft) -> None:
    if draft.ended is not None:
        raise UsageError(
            f"the save of step-{draft.step} is {draft.ended.how}: {draft.ended.reason}",
            catalog.uri,
            _UNTOUCHED,
        )


def _drop_copies(catalog: Catalog, draft: Draft) -> None:
    """Nothing waits any more in the attempt's private place, and no note says that it does.

    A rename has taken all of it along; an object store keeps copies.
    """
    private = names.staging_dir(names.gather_attempt(draft.save_id))
    waiting = [info.key for info in catalog.store.list_objects(private)]
    catalog.store.delete([*waiting, names.begun_key(names.step_dir(draft.step))])


def _gone(draft: Draft, node: Node, paths: list[str]) -> NodeLostError:
    return NodeLostError(
        f"{node.title} has lost {len(paths)} files of step-{draft.step}, which was never committed",
        paths[0],
        "only what was not committed is lost; a run resumes from the newest committed step",
        "nothing: the save is given up; if the disk is only not mounted, mount it now",
    )
