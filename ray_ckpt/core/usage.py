"""Which checkpoint, export or remains every byte of a root belongs to. Pure.

    checkpoint   tensors of the model, of the optimizer, and the rest: settings, data position,
                 random numbers, tokenizer
    export       a finished one
    trash        comes back with `undo`, goes once its grace time is over
    quarantine   damaged, kept for a person to look at
    unfinished   attempts that run or died, finished files of exports in the making, uploads
    records      what was asked, done and told
    not ours     a step folder without a manifest, and whatever somebody else has put there

On an object store what is in the trash leaves its shards in `step-<n>/`: whose they are their
manifest says.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ray_ckpt.core import names
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import READABLE, CheckpointView, Observation


class Kind(StrEnum):
    """What somebody may do with it depends on it."""

    CHECKPOINT = "checkpoint"
    EXPORT = "export"
    TRASH = "trash"
    QUARANTINE = "quarantine"
    UNFINISHED = "unfinished"
    RECORDS = "records"
    NOT_OURS = "not ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One thing that takes room."""

    kind: Kind
    name: str
    """As a person says it: `step-500`, `hf-bf16 of step-500`."""
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much room one thing takes."""

    owner: Owner
    size_bytes: int
    num_files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What the bytes of checkpoints are for."""

    model: int = 0
    optimizer: int = 0
    rest: int = 0

    def __add__(self, other: "Split") -> "Split":
        return Split(
            model=self.model + other.model,
            optimizer=self.optimizer + other.optimizer,
            rest=self.rest + other.rest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aside:
    """A save in the trash or the quarantine, and which files of its step are still its own."""

    owner: Owner
    manifest: Manifest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """Knows of every key of a root whose it is."""

    in_place: Mapping[int, CheckpointView]
    aside: Mapping[int, tuple[_Aside, ...]]
    exported: frozenset[str]
    """Folders of finished exports."""
    begun: frozenset[str] = field(default_factory=frozenset[str])
    """Folders that somebody of ours has begun to write."""

    @classmethod
    def of(cls, observed: Observation, keys: Iterable[str]) -> "Owners":
        """As one look saw the root; `keys` are all there are."""
        aside: dict[int, tuple[_Aside, ...]] = {}
        kinds = {
            CheckpointState.TRASHED: Kind.TRASH,
            CheckpointState.QUARANTINED: Kind.QUARANTINE,
        }
        for view in observed.checkpoints:
            if view.state in kinds:
                owner = Owner(
                    kind=kinds[view.state], name=names.step_dir(view.step), step=view.step
                )
                one = _Aside(owner=owner, manifest=view.manifest)
                aside[view.step] = (*aside.get(view.step, ()), one)
        notes = (names.parse_begun(key) for key in keys)
        return cls(
            in_place={view.step: view for view in observed.checkpoints if view.state not in kinds},
            aside=aside,
            exported=frozenset(names.export_dir(e.name, e.step) for e in observed.exports),
            begun=frozenset(folder for folder in notes if folder is not None),
        )

    def owner(self, key: str) -> Owner:
        """Whose the object is."""
        head, _, rest = key.partition("/")
        step = names.parse_step(head)
        if step is not None and rest:
            return self._in_step(step, rest)
        if head == names.EXPORTS and rest:
            return self._in_exports(rest)
        if head == names.PRIVATE:
            return _private(key)
        return Owner(kind=Kind.NOT_OURS, name=head)

    def _in_step(self, step: int, file: str) -> Owner:
        folder, view = names.step_dir(step), self.in_place.get(step)
        committed = view.manifest if view is not None and view.state in READABLE else None
        if committed is not None and (_is_extra(file) or _names(committed, file)):
            return Owner(kind=Kind.CHECKPOINT, name=folder, step=step)
        for aside in self.aside.get(step, ()):
            if _names(aside.manifest, file):
                return aside.owner
        is_begun = folder in self.begun or (
            view is not None and view.state is CheckpointState.SAVING
        )
        if is_begun or names.save_of_shard(file) is not None:
            return Owner(kind=Kind.UNFINISHED, name=f"save of {folder}", step=step)
        return Owner(kind=Kind.NOT_OURS, name=folder, step=step)

    def _in_exports(self, rest: str) -> Owner:
        name, _, rest = rest.partition("/")
        head, _, file = rest.partition("/")
        step = names.parse_step(head)
        if step is None or not file:
            return Owner(kind=Kind.RECORDS, name="names that lead to copies")
        folder, title = names.export_dir(name, step), f"{name} of {head}"
        if folder in self.exported:
            return Owner(kind=Kind.EXPORT, name=title, step=step)
        if folder in self.begun:
            return Owner(kind=Kind.UNFINISHED, name=f"export {title}", step=step)
        return Owner(kind=Kind.NOT_OURS, name=folder, step=step)


def usage(owners: Owners, sizes: Iterable[tuple[str, int]]) -> list[Use]:
    """Room by owner, the largest first, of objects given by key and size."""
    totals: dict[Owner, tuple[int, int]] = {}
    for key, size_bytes in sizes:
        owner = owners.owner(key)
        total, count = totals.get(owner, (0, 0))
        totals[owner] = total + size_bytes, count + 1
    uses = [Use(owner=owner, size_bytes=t, num_files=n) for owner, (t, n) in totals.items()]
    return sorted(uses, key=lambda use: (-use.size_bytes, use.owner.kind, use.owner.name))


def split(manifest: Manifest, size_bytes: int, *, without: Collection[str] = ()) -> Split:
    """What `size_bytes` of a checkpoint are for.

    These are the bytes of all its files but those `without`, which count with another step.
    """
    held = [found for path, found in manifest.tensor_bytes.items() if path not in without]
    model, optimizer = sum(one.model for one in held), sum(one.optimizer for one in held)
    return Split(model=model, optimizer=optimizer, rest=max(0, size_bytes - model - optimizer))


def _private(key: str) -> Owner:
    for parent, kind in ((names.TRASH, Kind.TRASH), (names.QUARANTINE, Kind.QUARANTINE)):
        if key.startswith(f"{parent}/"):
            folder = key.removeprefix(f"{parent}/").partition("/")[0]
            parsed = names.parse_set_aside(folder)
            if parsed is not None:
                return Owner(kind=kind, name=names.step_dir(parsed[0]), step=parsed[0])
            return Owner(kind=kind, name=folder)
    if key.startswith(f"{names.STAGING}/") and names.parse_begun(key) is None:
        attempt = key.removeprefix(f"{names.STAGING}/").partition("/")[0]
        return Owner(kind=Kind.UNFINISHED, name=f"attempt {attempt}")
    return Owner(kind=Kind.RECORDS, name="requests, actions, events, leases")


def _names(manifest: Manifest | None, file: str) -> bool:
    return manifest is not None and any(entry.path == file for entry in manifest.files)


def _is_extra(file: str) -> bool:
    """Whether it lies in a checkpoint beside what its manifest lists."""
    return file == names.MANIFEST or names.parse_pin(file) is not None
