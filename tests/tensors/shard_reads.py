"""How much of its shards a load reads from a store."""

from collections.abc import Sequence
from typing import Any

from ray_ckpt.storage.disk.store import LocalStore


def counted_shard_reads(kind: Any = LocalStore) -> list[int]:
    """Grows by the bytes of each buffer that such stores fill, in this process, from now on."""
    taken: list[int] = []
    read_into_each = kind.read_into_each

    def counted(self: Any, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        if key.endswith(".distcp"):
            taken.extend(buffer.nbytes for buffer in buffers)
        read_into_each(self, key, offset, buffers)

    kind.read_into_each = counted
    return taken
