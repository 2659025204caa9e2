"""What a restart waits for: the state of the newest step comes from the host's memory or storage.

The state is that of `save`. Copies are kept by a trainer in its host's memory; the same state in
another root has none, and is read from storage: from a disk past the page cache, or from a store.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs.bench.at import At
from jobs.bench.ranks import DEVICE, on_ranks
from jobs.bench.rows import OURS, Compared, compared
from jobs.bench.timing import Timing, interleaved
from jobs.bench.trained import Trained

_COPY, _DCP = "copy in memory", "dcp.load, from storage"
_KEPT_S = 600.0


def measure_restarts(at: At, *, size_mb: int, repeats: int) -> list[Compared]:
    """Rank 0's times; the state has about `size_mb` megabytes on all ranks together."""
    timings = on_ranks(
        partial(_restarts, size_mb, repeats, at.root), below=at.folder, device=DEVICE
    )
    return compared(timings, limit=_COPY, peer=_DCP)


def _restarts(size_mb: int, repeats: int, root: str, _: Path) -> list[Timing]:
    with (
        Trained(size_mb, f"{root}/kept", mode="async", keep_in_memory_s=_KEPT_S) as kept,
        Trained(size_mb, f"{root}/stored") as stored,
    ):
        kept.begin_save()()
        stored.train()  # who holds the same bytes would be read from memory as well
        stored.save()
        stored.save_with_dcp()

        def load_from_memory() -> None:
            report = kept.manager.load()
            assert report.memory_bytes > size_mb * 500_000, "most of it comes from memory"

        def evict() -> None:
            kept.evict()
            stored.evict()

        ways: dict[str, Callable[[], object]] = {
            _COPY: kept.copy_back,
            f"{OURS}, from memory": load_from_memory,
            f"{OURS}, from storage": stored.manager.load,
            _DCP: stored.load_with_dcp,
        }
        return interleaved(ways, repeats, prepare=evict)
