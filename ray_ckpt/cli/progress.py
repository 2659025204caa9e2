"""What a running demo shows: a live panel on a terminal, a line for each change elsewhere."""

import sys
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_STYLES = {"saving": "yellow", "committed": "cyan", "verified": "green", "trashed": "dim"}


class Screen:
    """Says sentences, and keeps the present state in view."""

    def __init__(self, *, quiet: bool) -> None:
        stream = sys.stderr if quiet else sys.stdout
        self._console = Console(file=stream, highlight=False)
        self._live: Live | None = None
        self._last: dict[str, str] = {}
        self._last_ten = -1
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, sentence: str) -> None:
        """One line that stays."""
        self._console.print(sentence, markup=False, soft_wrap=True)

    def show(self, status: dict[str, Any], *, num_steps: int) -> None:
        """The manager's status, as it is now."""
        if self._live is not None:
            self._live.update(_panel(status, num_steps))
        else:
            self._lines(status, num_steps)

    def close(self) -> None:
        """The panel is gone; what was said stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _lines(self, status: dict[str, Any], num_steps: int) -> None:
        """A line a ten steps, and one whenever a checkpoint or an action changes."""
        progress = status.get("progress", {})
        step = progress.get("step", 0)
        if step and step // 10 != self._last_ten:
            self._last_ten = step // 10
            self.say(f"step {step}/{num_steps} loss {progress['loss']:.3f}")
        for number, state in status.get("checkpoints", {}).items():
            if self._last.get(number) != state:
                self.say(f"step-{number} is {state}")
            self._last[number] = state
        for title in (running["title"] for running in status.get("running", [])):
            if title not in self._last:
                self.say(f"running: {title}")
            self._last[title] = "running"


def _panel(status: dict[str, Any], num_steps: int) -> Group:
    progress = status.get("progress", {})
    step = progress.get("step", 0)
    head = Table.grid(padding=(0, 1))
    loss = f"loss {progress['loss']:.3f}" if "loss" in progress else "waiting for the first step"
    head.add_row("step", f"{step}/{num_steps}", ProgressBar(num_steps, step, width=30), loss)
    states = Text("checkpoints ")
    for number, state in status.get("checkpoints", {}).items():
        states.append(f" {number} {state} ", style=_STYLES.get(state, "red"))
    titles = ", ".join(map(_how_far, status.get("running", [])))
    running = Text("running     " + (titles or "nothing"))
    return Group(head, states, running)


def _how_far(running: dict[str, Any]) -> str:
    """`export step-30 hf-bf16 63 %`."""
    percent = running["percent"]
    return running["title"] if percent is None else f"{running['title']} {percent} %"
