"""A progress bar with rate and time left, on a terminal; failures and notes as lines, with or without a bar.

On a terminal without escape codes (`TERM=dumb`, NO_COLOR) it is a line now and then. Where nothing is shown, nothing of
rich is imported.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from qvsplit.errors import escaped, printable
from qvsplit.output.text import say
from qvsplit.runtime.streams import shows_escape_codes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 10.0  # between two lines in place of a bar


class ProgressBar:
    """Counts one thing after another. Use it in a `with` block: the end takes the bar away."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lines: _Lines | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, what: str, total: int) -> None:
        """Count `total` of `what` from here on."""
        if not self._shown or not total:
            return
        self.stop()
        if shows_escape_codes(sys.stderr):
            self._progress = _progress()
            self._progress.start()
            self._task = self._progress.add_task(what, total=total, rate="")
        else:
            self._lines = _Lines(what, total)

    def stop(self) -> None:
        """Take the bar away, so that other output can follow."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._lines = None

    def advance(self, name: str = "") -> None:
        """Count one more; `name` says which, and is not shown."""
        if self._progress is not None and self._task is not None:
            speed = self._progress.tasks[0].speed
            self._progress.update(self._task, advance=1, rate=f"{speed:.1f}/s" if speed else "")
        elif self._lines is not None:
            self._lines.advance()

    def failure(self, path: str, reason: str) -> None:
        """Print that one item failed, and why."""
        self.note(f"failed: {escaped(path)} {reason}")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            text = f"qvsplit: {printable(line)}"
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)


class _Lines:
    """Says how far it is, in a line every LINE_SECONDS at the most."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.said = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS:
            self.said = now
            say(f"{self.done:,} of {self.total:,} {self.what}")


def _progress() -> Progress:
    """Make a bar of rich's that a user may stop and continue.

    The cursor stays visible: nobody would show it again where the process is stopped or killed. And nothing is drawn
    while the process is in the background: the line it would draw on is the one that the user types on.
    """
    from rich.console import Console, ConsoleRenderable
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    class ForegroundLive(Live):
        def refresh(self) -> None:
            if _in_foreground():
                super().refresh()

        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return super().process_renderables(renderables) if _in_foreground() else renderables

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    progress = Progress(*columns, TimeRemainingColumn(), console=VisibleCursor(file=sys.stderr))
    progress.live = ForegroundLive(
        console=progress.console, refresh_per_second=10, get_renderable=progress.get_renderable
    )
    return progress


def _in_foreground() -> bool:
    """Say whether this process may draw on the terminal that stderr is."""
    with suppress(OSError):  # it is not our terminal: nobody else controls what is on it
        return os.tcgetpgrp(2) == os.getpgrp()
    return True
