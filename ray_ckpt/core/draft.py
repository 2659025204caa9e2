"""A save that lies on the disks of the nodes that wrote it: a checkpoint only once it is brought.

Knows what is where. Not how it gets to the root (`storage.gathering`), nor when (`core.gathering`).
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry, Manifest

SCHEMA = "ray_ckpt.draft/1"
How = Literal["committed", "abandoned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine with a disk of its own."""

    host: str
    """What it calls itself."""
    id: str | None = None
    """What the cluster calls it, another one each time it joins; None without a cluster."""

    @property
    def title(self) -> str:
        """For people: `host-a`, or `host-a (node 1f0c8a2e)`."""
        return self.host if self.id is None else f"{self.host} (node {self.id[:8]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder on one node that holds files of a draft."""

    node: Node
    folder: str
    """Absolute; its last part names the save, so that nothing else is ever removed by it."""
    files: tuple[str, ...]
    """As the manifest names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a draft."""

    how: How
    reason: str
    at: float
    """Seconds since the epoch, by the clock of whoever says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One staged save."""

    manifest: Manifest
    """As it will be committed."""
    places: tuple[Place, ...]
    supersedes: tuple[tuple[int, str], ...] = ()
    """Step and save id of what another branch of training has saved: set aside at the commit."""
    ended: Ended | None = None
    brought: frozenset[str] = frozenset()
    """Files that have arrived at the root, whole."""

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self.manifest.step

    @property
    def save_id(self) -> str:
        """Names this save and no other."""
        return self.manifest.save_id

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Each once."""
        return tuple(dict.fromkeys(place.node for place in self.places))

    def missing_from(self, node: Node) -> dict[str, FileEntry]:
        """What is still to be brought from the node: where it lies there, and what it must be."""
        entries = {entry.path: entry for entry in self.manifest.files}
        return {
            f"{place.folder}/{name}": entries[name]
            for place in self.places
            if place.node == node
            for name in place.files
            if name not in self.brought
        }

    @property
    def is_whole(self) -> bool:
        """Whether every file has arrived."""
        return all(entry.path in self.brought for entry in self.manifest.files)

    def to_json(self) -> bytes:
        """UTF-8 JSON of what the ranks know; what became of it is told elsewhere."""
        document = {
            "schema": SCHEMA,
            "manifest": self.manifest.to_json().decode(),
            "places": [asdict(place) for place in self.places],
            "supersedes": self.supersedes,
        }
        return json.dumps(document, sort_keys=True).encode()

    @classmethod
    def from_json(
        cls,
        text: bytes,
        where: str,
        *,
        manifest: Callable[[bytes, str], Manifest] = Manifest.from_json,
    ) -> "Draft":
        """What :meth:`to_json` wrote; `manifest` reads the manifest in it.

        Raises:
            IntegrityError: it is something else, or its places do not hold the files it lists.
        """
        try:
            document = json.loads(text)
            draft = cls(
                manifest=manifest(document["manifest"].encode(), where),
                places=tuple(_place(place) for place in document["places"]),
                supersedes=tuple((int(s), str(save_id)) for s, save_id in document["supersedes"]),
            )
            lying = {name for place in draft.places for name in place.files}
            if document["schema"] != SCHEMA or lying != {e.path for e in draft.manifest.files}:
                raise ValueError("its places do not hold the files of its manifest")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"the draft of a save cannot be read: {error!r}",
                where,
                "the save is no checkpoint yet; committed steps do not depend on it",
                "save again",
            ) from error
        return draft


def merged(places: Iterable[Place | None]) -> tuple[Place, ...]:
    """One place for each folder of each node, in order; those that are None are left out."""
    files: dict[tuple[Node, str], dict[str, None]] = {}
    for place in places:
        if place is not None:
            files.setdefault((place.node, place.folder), {}).update(dict.fromkeys(place.files))
    return tuple(
        Place(node=node, folder=folder, files=tuple(sorted(found)))
        for (node, folder), found in files.items()
    )


def _place(document: dict[str, Any]) -> Place:
    return replace(Place(**document), node=Node(**document["node"]), files=tuple(document["files"]))
