"""The files a source consists of: whether they are whole, and which folder they are.

    a folder with our manifest    sizes are as it says; shards are digested as they are read (proof)
    a foreign DCP folder          every file that its index names is there and long enough
    a Hugging Face folder         was looked at when its headers were read

A folder's identity is a digest over names, sizes and digests of the files that hold tensors: a copy
has the same, a fine-tuned model of the same shapes has another. Ranks share the reading.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import (
    SHARD_ALGORITHM,
    STRONG_ALGORITHM,
    describe_object,
    find_damage_before_reading,
)
from ray_ckpt.storage.listing import manifest_in, sizes_in
from ray_ckpt.tensors.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """A folder and those of its files that hold tensors or say where these lie."""

    store: Store
    folder: str
    files: tuple[str, ...]
    """Names in the folder, sorted."""
    manifest: Manifest | None = None
    ends: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many bytes of a file its index needs, where no manifest says it."""

    def damage(self, ranks: Ranks) -> list[str]:
        """Sentences about files that are not whole, as far as can be told before they are loaded.

        The same on every rank. Collective.
        """
        return [text for share in ranks.each(lambda: self._share(ranks)) for text in share]

    def identity(self, ranks: Ranks) -> str:
        """Equal for folders of the same tensors in the same files only. Collective."""
        shares = ranks.each(lambda: self._entries(ranks))
        lines = sorted(f"{e.path} {e.size_bytes} {e.digest}\n" for share in shares for e in share)
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    def origin(self) -> tuple[str, str | None]:
        """Which folder it is, as told by its manifest or its sizes, and whose; reads no tensor."""
        with contextlib.suppress(IntegrityError):
            manifest = self.manifest or manifest_in(self.store, self.folder)
            if manifest is not None:
                return f"content:{manifest.content_id}", manifest.lineage.run_id
        sizes = sizes_in(self.store, self.folder)
        lines = [f"{name} {sizes.get(name)}\n" for name in sorted(self.files)]
        return f"sizes:{hashlib.sha256(''.join(lines).encode()).hexdigest()}", None

    def _share(self, ranks: Ranks) -> list[str]:
        own = slice(ranks.rank, None, ranks.size)
        if self.manifest is not None:
            return find_damage_before_reading(self.store, self.folder, self.manifest, part=own)
        if not ranks.is_coordinator or not self.ends:
            return []
        sizes = sizes_in(self.store, self.folder)
        return [
            f"{name} is missing"
            if name not in sizes
            else f"{name} has {sizes[name]} bytes, {names.METADATA} needs {end}"
            for name, end in sorted(self.ends.items())
            if sizes.get(name, -1) < end
        ]

    def _entries(self, ranks: Ranks) -> list[FileEntry]:
        """One rank's share of the files, described as our manifests do it."""
        own = self.files[ranks.rank :: ranks.size]
        if self.manifest is not None:
            return [entry for entry in self.manifest.files if entry.path in own]
        return [self._describe(name) for name in own]

    def _describe(self, name: str) -> FileEntry:
        algorithm = STRONG_ALGORITHM if name == names.METADATA else SHARD_ALGORITHM
        return describe_object(self.store, f"{self.folder}/{name}", name=name, algorithm=algorithm)
