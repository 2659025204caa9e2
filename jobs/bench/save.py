"""Ranks save a training state and load it again: ours, DCP's own, and the machine's limit.

The state is a decoder under FSDP2 and its AdamW, three times the size of the weights. A save ends
when all bytes are on the disk; ours has digested them and committed the step by then. Loads find
the files in the page cache (warm) or on the disk alone (cold); ours compares every digest. Below a
root that is no path both go to that store, DCP's through fsspec, and nobody knows the limit.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist

from jobs.bench.at import At
from jobs.bench.ranks import DEVICE, on_ranks
from jobs.bench.rows import OURS, Compared, compared
from jobs.bench.timing import Taken, Timing, in_turn, interleaved, stopwatch, timing_of
from jobs.bench.trained import Trained

_RAW, _COPY = "raw write", "copy in memory"
_SAVE, _ASYNC_SAVE, _LOAD = "dcp.save", "dcp.async_save", "dcp.load"
_STILL, _DURABLE = "stands still", "until durable"
_WARM, _COLD, _READ = "warm", "cold", "raw read"


def measure_saves(at: At, *, size_mb: int, repeats: int) -> list[Compared]:
    """Rank 0's times; the state has about `size_mb` megabytes on all ranks together."""
    timings = on_ranks(partial(_saves, size_mb, repeats, at.root), below=at.folder, device=DEVICE)
    return compared(timings, limit=_RAW, peer=_SAVE)


def measure_async_saves(at: At, *, size_mb: int, repeats: int) -> list[Compared]:
    """The same of saves beside training: how long it stands still, and until the step is safe."""
    timings = on_ranks(
        partial(_async_saves, size_mb, repeats, at.root), below=at.folder, device=DEVICE
    )
    rows: list[Compared] = []
    for half, limit, other in ((_STILL, _COPY, _RAW), (_DURABLE, _RAW, _COPY)):
        its = [t for t in timings if t.what.endswith(half) and not t.what.startswith(other)]
        rows += compared(its, limit=f"{limit}: {half}", peer=f"{_ASYNC_SAVE}: {half}")
    return rows


def measure_loads(at: At, *, size_mb: int, repeats: int) -> list[Compared]:
    """The same of loading it."""
    timings = on_ranks(partial(_loads, size_mb, repeats, at.root), below=at.folder, device=DEVICE)
    rows: list[Compared] = []
    for where, limit in ((_WARM, _COPY), (_COLD, _READ)):
        its = [timing for timing in timings if timing.what.endswith(where)]
        if its:
            rows += compared(its, limit=f"{limit}: {where}", peer=f"{_LOAD}: {where}")
    return rows


def _saves(size_mb: int, repeats: int, root: str, _: Path) -> list[Timing]:
    trained = Trained(size_mb, root)
    ways: dict[str, Callable[[], object]] = {OURS: trained.save, _SAVE: trained.save_with_dcp}
    if trained.is_on_disk:
        ways = {_RAW: trained.write_raw, **ways}
    with trained:
        return interleaved(ways, repeats, prepare=trained.clear)


def _async_saves(size_mb: int, repeats: int, root: str, _: Path) -> list[Timing]:
    trained = Trained(size_mb, root, mode="async")
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        _COPY: trained.begin_copy,
        OURS: trained.begin_save,
        _ASYNC_SAVE: trained.begin_save_with_dcp,
    }
    if trained.is_on_disk:
        ways[_RAW] = trained.begin_raw_write
    with trained:
        taken = in_turn({w: partial(_halves, b, trained.clear) for w, b in ways.items()}, repeats)
    return [
        timing_of(f"{what}: {half}", [both[number] for both in halves])
        for number, half in enumerate((_STILL, _DURABLE))
        for what, halves in taken.items()
    ]


def _halves(
    begin: Callable[[], Callable[[], object]], prepare: Callable[[], object]
) -> tuple[Taken, Taken]:
    """What `begin` takes, and what it takes until what it returned has returned."""
    prepare()
    taken = stopwatch()
    wait = begin()
    begun = taken()
    wait()
    return begun, taken()


def _loads(size_mb: int, repeats: int, root: str, _: Path) -> list[Timing]:
    trained = Trained(size_mb, root)
    with trained:
        trained.save()
        trained.save_with_dcp()
        ways: dict[str, Callable[[], object]] = {
            _COPY: trained.copy_back,
            OURS: trained.manager.load,
            _LOAD: trained.load_with_dcp,
        }
        warm = interleaved(_named(ways, _WARM), repeats, prepare=dist.barrier)
        if not trained.is_on_disk:
            return warm
        ways[_READ] = trained.read_raw
        del ways[_COPY]
        return [*warm, *interleaved(_named(ways, _COLD), repeats, prepare=trained.evict)]


def _named(ways: Mapping[str, Callable[[], object]], how: str) -> dict[str, Callable[[], object]]:
    return {f"{what}: {how}": way for what, way in ways.items()}
