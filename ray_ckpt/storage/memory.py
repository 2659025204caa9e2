"""How much memory this process has held, and how much more it may take."""

import resource
import sys
from pathlib import Path

_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_GROUP = Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES


def free_memory_bytes() -> int | None:
    """What the host and the container still give, the smaller of both; None if nobody says."""
    known = [free for free in (_free_on_host(), _free_in_group()) if free is not None]
    return min(known, default=None)


def _free_on_host() -> int | None:
    """Linux counts in it what it would take back from the page cache."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_in_group() -> int | None:
    """Of a container with a limit (cgroup 2); files in its page cache can go."""
    try:
        limit = int((_GROUP / "memory.max").read_text())  # "max" without a limit
        used = int((_GROUP / "memory.current").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None
    return max(0, limit - used + cached)
