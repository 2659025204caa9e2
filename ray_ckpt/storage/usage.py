"""How much room everything takes at a root, and what of it is known to lie elsewhere.

One listing of the root, one of unfinished writes, one manifest a checkpoint. Bytes that several
steps share, through hard links, count once: with the oldest of them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.copies import copies
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.usage import Kind, Owner, Owners, Split, Use, split, usage
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import ObjectInfo
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
    sizes, elsewhere = _own_sizes(catalog.store.list_objects(""))
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
    known = {step: size for step, size in steps.items() if step is not None}
    return Usage(
        uses=tuple(sorted(uses, key=lambda use: -use.size_bytes)),
        splits=_splits(catalog, known, elsewhere),
        elsewhere=tuple(_elsewhere(observed)),
        free_bytes=catalog.store.free_bytes(),
    )


def _own_sizes(infos: Iterable[ObjectInfo]) -> tuple[dict[str, int], set[str]]:
    """Bytes of every key, and the keys whose bytes count elsewhere: with the oldest step."""
    sizes: dict[str, int] = {}
    counted: set[str] = set()
    elsewhere: set[str] = set()
    for info in sorted(infos, key=_by_age):
        is_counted = bool(info.shared) and info.shared in counted
        sizes[info.key] = 0 if is_counted else info.size_bytes
        elsewhere |= {info.key} if is_counted else set()
        counted.add(info.shared)
    return sizes, elsewhere


def _by_age(info: ObjectInfo) -> tuple[bool, int, str]:
    """Steps first, the oldest before the others."""
    step = names.parse_step(info.key.partition("/")[0])
    return step is None, step or 0, info.key


def _splits(
    catalog: Catalog, sizes: Mapping[int, int], elsewhere: Collection[str]
) -> dict[int, Split]:
    def look(step: int) -> Split | None:
        folder = names.step_dir(step)
        told = told_in(catalog.store, folder)
        if not isinstance(told, Manifest):
            return None
        others = {e.path for e in told.files if f"{folder}/{e.path}" in elsewhere}
        return split(told, sizes[step], without=others)

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
