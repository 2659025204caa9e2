"""That a folder's shards are as they were committed, shown by the very bytes that a load reads.

Each rank digests what it reads on its way into place. One rank answers for each file: the one that
wrote it, which reads nearly all of it where a run goes on as it was. It hears from the others what
they have read of the file, reads what nobody wanted, and compares. What comes from a copy in this
host's memory is compared just so.
"""

from collections.abc import Iterator

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digested_reads import DigestedReads, Range
from ray_ckpt.storage.digests import digest_damage, is_of_ranges
from ray_ckpt.storage.host_memory.nearby import Nearby
from ray_ckpt.tensors.ranks import Ranks


class DamageFoundError(IntegrityError):
    """Shards are not what the manifest says: `what` tells which. They were read, and not used."""


class Proof:
    """For one load from one folder; the sizes of its files were compared before."""

    def __init__(self, store: Store, folder: str, manifest: Manifest) -> None:
        self._uri = f"{store.uri}/{folder}"
        self._folder = folder
        files = sorted(manifest.files, key=lambda entry: entry.path)
        self._shards = [entry for entry in files if is_of_ranges(entry)]
        self.memory = Nearby(store, folder, self._shards)
        self.reads = DigestedReads(self.memory)

    def begin_without_memory(self) -> None:
        """All is to be read anew, and from the store alone."""
        self.memory.close()
        self.reads = DigestedReads(self.memory)

    def refuse_damage(self, ranks: Ranks) -> None:
        """Every byte of every shard was read by some rank, and is as it was committed. Collective.

        Raises:
            DamageFoundError: on every rank.
        """
        elsewhere = [e for number, e in enumerate(self._shards) if not _is_own(number, e, ranks)]
        told = ranks.gather({e.path: self.reads.ranges(self._key(e)) for e in elsewhere})
        found = ranks.each(lambda: list(self._own_damage(ranks, told)))
        damage = [sentence for of_rank in found for sentence in of_rank]
        if damage:
            raise DamageFoundError("; ".join(damage), self._uri)

    def _own_damage(self, ranks: Ranks, told: list[dict[str, list[Range]]]) -> Iterator[str]:
        for number, entry in enumerate(self._shards):
            if _is_own(number, entry, ranks):
                others = [r for of_rank in told for r in of_rank.get(entry.path, ())]
                found = self.reads.digest(self._key(entry), entry.size_bytes, others)
                damage = digest_damage(entry, found)
                if damage is not None:
                    yield damage

    def _key(self, entry: FileEntry) -> str:
        return f"{self._folder}/{entry.path}"


def _is_own(number: int, entry: FileEntry, ranks: Ranks) -> bool:
    """Whether this rank answers for the file."""
    writer = names.rank_of_shard(entry.path)
    return (number if writer is None else writer) % ranks.size == ranks.rank
