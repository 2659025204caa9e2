"""What a restart waits for: the state of the newest step comes from the host's memory or a disk.

The state is that of `save`. Copies are kept by a trainer in its host's memory; the same state in
another root has none, and is read from the disk, where the page cache has been emptied.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs.bench.ranks import DEVICE, on_ranks
from jobs.bench.rows import OURS, Compared, compared
from jobs.bench.timing import Timing, interleaved
from jobs.bench.trained import Trained

_COPY, _DCP = "copy in memory", "dcp.load, from the disk"
_KEPT_S = 600.0


def measure_restarts(folder: Path, *, size_mb: int, repeats: int) -> list[Compared]:
    """Rank 0's times; the state has about `size_mb` megabytes on all ranks together."""
    timings = on_ranks(partial(_restarts, size_mb, repeats), below=folder, device=DEVICE)
    return compared(timings, limit=_COPY, peer=_DCP)


def _restarts(size_mb: int, repeats: int, folder: Path) -> list[Timing]:
    with (
        Trained(size_mb, folder / "kept", mode="async", keep_in_memory_s=_KEPT_S) as kept,
        Trained(size_mb, folder / "stored") as stored,
    ):
        kept.begin_save()()
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
            f"{OURS}, from the disk": stored.manager.load,
            _DCP: stored.load_with_dcp,
        }
        return interleaved(ways, repeats, prepare=evict)
