"""Real processes that train together over gloo, and the way to kill one.

with RankGroup(function, root, num_ranks=2) as group:
    os.kill(group.pids[1], signal.SIGKILL)
"""

import contextlib
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.forks import fork_server

POLL_S = 0.005
TIMEOUT_S = 240.0


class RankGroup:
    """`function(*args)` in `num_ranks` processes; torch.distributed knows rank and world size."""

    def __init__(self, function: Callable[..., Any], *args: Any, num_ranks: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes = [
            fork_server().Process(
                target=_main,
                args=(self._folder, rank, num_ranks, function, args),
                kwargs={"environment": dict(os.environ)},
            )
            for rank in range(num_ranks)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def exit_codes(self) -> list[int | None]:
        """Of each rank; None while it runs, below 0 for one that a signal ended."""
        return [process.exitcode for process in self._processes]

    def kill(self, *ranks: int) -> None:
        """These ranks, or all, are dead and reaped."""
        for rank in ranks or range(len(self._processes)):
            self._processes[rank].kill()
            self._processes[rank].join()

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[bool]:
        """Every process has ended; for each whether it ended by returning."""
        wait_until(lambda: not any(p.is_alive() for p in self._processes), timeout_s)
        return [process.exitcode == 0 for process in self._processes]

    def results(self, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """What each rank returned; an AssertionError with all tracebacks if one did not."""
        if not all(self.wait(timeout_s)):
            raise AssertionError("\n".join(str(self._outcome(r)) for r in range(len(self.pids))))
        return [self._outcome(rank) for rank in range(len(self.pids))]

    def _outcome(self, rank: int) -> Any:
        path = self._folder / f"{rank}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else f"rank {rank} was killed"


def run(function: Callable[..., Any], *args: Any, num_ranks: int = 2) -> list[Any]:
    """What `function(*args)` returned on each rank."""
    with RankGroup(function, *args, num_ranks=num_ranks) as group:
        return group.results()


def wait_until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    """Returns as soon as `condition()` is true; an AssertionError if it never is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s: {condition}"
        time.sleep(POLL_S)


@contextlib.contextmanager
def stopped(pid: int) -> Generator[None]:
    """The process stands still inside the block, as on a machine that hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _main(
    folder: Path,
    rank: int,
    num_ranks: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    environment: dict[str, str],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)  # the server may be older than what a test has set since
    torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        outcome = function(*args)
    except BaseException:  # noqa: BLE001  told by the process that waits
        _write(folder, rank, f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # a save's thread may hang on a rank that is dead
    _write(folder, rank, outcome)
    dist.destroy_process_group()


def _write(folder: Path, rank: int, outcome: Any) -> None:
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
