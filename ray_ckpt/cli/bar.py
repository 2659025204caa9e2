"""How far a verb is that reads for long: a bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ray_ckpt.storage.progress import UNTOLD, Progress


class _Shown(Progress):
    def __init__(self, bar: RichProgress) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task("begins", total=None)

    def begin(self, doing: str, total_bytes: int | None = None) -> None:
        super().begin(doing, total_bytes)
        self._bar.reset(self._task, description=doing, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        super().advance(num_bytes)
        self._bar.advance(self._task, num_bytes)


@contextmanager
def byte_bar() -> Generator[Progress]:
    """What is told to it is shown, as long as the block lasts."""
    if not sys.stderr.isatty():
        yield UNTOLD
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Shown(bar)
