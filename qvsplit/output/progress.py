"""A progress bar with rate and time left, on a terminal; failures and notes as lines, with or without a bar.

Where no bar is shown, nothing of rich is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvsplit.errors import printable
from qvsplit.output.text import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressBar:
    """Counts one thing after another. Use it in a `with` block: the end takes the bar away."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, what: str, total: int) -> None:
        """Count `total` of `what` from here on."""
        if not self._shown or not total:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.stop()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task(what, total=total, rate="")

    def stop(self) -> None:
        """Take the bar away, so that other output can follow."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def advance(self, name: str = "") -> None:
        """Count one more; `name` says which, and is not shown."""
        if self._progress is not None and self._task is not None:
            speed = self._progress.tasks[0].speed
            self._progress.update(self._task, advance=1, rate=f"{speed:.1f}/s" if speed else "")

    def failure(self, path: str, reason: str) -> None:
        """Print that one item failed, and why."""
        self.note(f"failed: {path} {reason}")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            text = f"qvsplit: {printable(line)}"
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)
