"""How much room everything takes at a root, and what of it is known to lie elsewhere.

One listing of the root, one of unfinished writes, one manifest a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.copies import copies
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.usage import Kind, Owner, Owners, Split, Use, split, usage
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.listing import told_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A copy that was made elsewhere, as far as its record says."""

    title: str
    location: str
    size_bytes: int | None
    """None where what was copied is not here any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Who takes the room of one root."""

    uses: tuple[Use, ...]
    """The largest first."""
    splits: Mapping[int, Split]
    """Of each checkpoint by step, where its manifest can be read."""
    elsewhere: tuple[Copied, ...]
    free_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Of everything at the root."""
        return sum(use.size_bytes for use in self.uses)

    def of(self, kind: Kind) -> list[Use]:
        """The largest first."""
        return [use for use in self.uses if use.owner.kind is kind]


def measure(catalog: Catalog, observed: Observation) -> Usage:
    """Everything at the root; changes nothing, reads no tensor."""
    sizes = {info.key: info.size_bytes for info in catalog.store.list_objects("")}
    owners = Owners.of(observed, sizes)
    uploads = [
        Use(
            owner=Owner(kind=Kind.UNFINISHED, name=f"upload of {write.key}"),
            size_bytes=write.size_bytes,
            num_files=1,
        )
        for write in catalog.store.list_unfinished("")
    ]
    uses = [*usage(owners, sizes.items()), *uploads]
    steps = {u.owner.step: u.size_bytes for u in uses if u.owner.kind is Kind.CHECKPOINT}
    return Usage(
        uses=tuple(sorted(uses, key=lambda use: -use.size_bytes)),
        splits=_splits(catalog, {s: size for s, size in steps.items() if s is not None}),
        elsewhere=tuple(_elsewhere(observed)),
        free_bytes=catalog.store.free_bytes(),
    )


def _splits(catalog: Catalog, sizes: Mapping[int, int]) -> dict[int, Split]:
    """With the index of the tensors, which an observation leaves out."""

    def look(step: int) -> Split | None:
        told = told_in(catalog.store, names.step_dir(step))
        return split(told, sizes[step]) if isinstance(told, Manifest) else None

    found = zip(sizes, at_once(look, sizes), strict=True)
    return {step: one for step, one in found if one is not None}


def _elsewhere(observed: Observation) -> list[Copied]:
    exports = {(e.name, e.step): e.manifest.total_bytes for e in observed.exports}
    steps = {v.step: v.manifest.total_bytes for v in observed.checkpoints if v.manifest}
    found: list[Copied] = []
    for record in copies(observed):
        action = record.action
        name = action.export.name if action.export else None
        size = exports.get((name, action.step)) if name else steps.get(action.step)
        title = f"{name or 'checkpoint'} of {names.step_dir(action.step)}"
        location = str(record.result.get("location", action.destination))
        found.append(Copied(title=title, location=location, size_bytes=size))
    return sorted(found, key=lambda copy: (-(copy.size_bytes or 0), copy.location))
