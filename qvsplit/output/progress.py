"""How far a run is, on stderr: a bar on a terminal, elsewhere a line now and then; failures and notes as lines.

A terminal without escape codes (`TERM=dumb`, NO_COLOR) is an elsewhere. Where no bar is drawn, nothing of rich is
imported.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from qvsplit.errors import escaped, printable
from qvsplit.output.meter import BYTES, Meter
from qvsplit.output.text import say
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.loading import READY
from qvsplit.runtime.streams import is_terminal, shows_escape_codes

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 60.0  # before the first line, and between two: what is done sooner says nothing, as cron mails it
JSON_SECONDS = 1.0
LOADING = "loading model"


class ProgressBar:
    """Counts one phase after another. Use it in a `with` block: the end takes the bar away.

    Args:
        mode: `bar`, `plain` (a line a minute), `json` (an object a second), `none`, or `auto`: a bar where stderr is a
            terminal that can show one, else plain lines. A `bar` that cannot be shown is plain lines, too.
        shown: If not, it is `none`.
        prints: Results go to stdout meanwhile: where that is the terminal, they show how far it is, and a bar would be
            in their way.
    """

    def __init__(self, mode: str = "auto", *, shown: bool = True, prints: bool = False) -> None:
        self._display = _display(mode if shown else "none")
        self._counts = not (prints and isinstance(self._display, _Bar) and is_terminal(sys.stdout))
        self._counting: Meter | None = None
        self._loading: tuple[Meter, float] | None = None  # since when

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, what: str, total: int, *, unit: str = "") -> None:
        """Count `total` of `what` from here on; in `bytes` if that is the unit."""
        self.stop()
        if total and self._counts:
            self._counting = Meter(what, total, unit=unit)
            self._display.begin(self._counting)

    def stop(self) -> None:
        """End the phase, and take the bar away, so that other output can follow."""
        self._display.end(keep=self._loading is None)
        self._counting = self._loading = None

    def advance(self, name: str = "", number: int = 1) -> None:
        """Count one more, or so many; `name` says which, and is not shown."""
        if self._counting is not None:
            self._counting.advance(number)

    def skip(self) -> None:
        """Count one more that took no time, as it was known already."""
        if self._counting is not None:
            self._counting.skip()

    def loading(self, part: str, done: int, total: int) -> None:
        """Show a part of loading the model (see runtime/loading.py); what is being counted goes on behind it."""
        if part == READY:
            self._loaded()
            return
        if self._loading is None:
            self._display.end(keep=False)
            self._loading = Meter(LOADING, unit=BYTES), active_seconds()
            self._loading[0].set(part, done, total)
            self._display.begin(self._loading[0])
        else:
            self._loading[0].set(part, done, total)

    def _loaded(self) -> None:
        if self._loading is None:
            return
        self._display.end(keep=False)
        _, since = self._loading
        self._loading = None
        if self._counting is not None:
            self._counting.leave_out(active_seconds() - since)
            self._display.begin(self._counting)

    def failure(self, path: str, reason: str) -> None:
        """Print that one item failed, and why."""
        self.note(f"failed: {escaped(path)} {reason}")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._display.note(line)


# -------------------------------------------------------------------------------------------------------- displays


class _Display(Protocol):
    """What shows a meter, from its beginning to its end."""

    def begin(self, meter: Meter) -> None:
        """Show this meter, and whatever it will say, until the end."""

    def end(self, *, keep: bool = True) -> None:
        """Show it no more; `keep` what it says then on the screen."""

    def note(self, line: str) -> None:
        """Print a line beside it."""


def _display(mode: str) -> _Display:
    if mode == "none":
        return _Nothing()
    if mode == "json":
        return _Lines(JSON_SECONDS, _as_json, edges=True)
    drawn = shows_escape_codes(sys.stderr) or (
        mode == "bar" and is_terminal(sys.stderr) and os.environ.get("TERM", "") not in {"", "dumb", "unknown"}
    )
    return _Bar() if mode != "plain" and drawn else _Lines(LINE_SECONDS, _as_line)


class _Nothing:
    def begin(self, meter: Meter) -> None: ...

    def end(self, *, keep: bool = True) -> None: ...

    def note(self, line: str) -> None:
        say(line)


class _Lines:
    """Prints a line every so many seconds, from a thread of its own: also where nothing comes to an end meanwhile.

    Args:
        seconds: Before the first line, and between two.
        text: A meter and the time of day, as a line.
        edges: Print where each meter begins and ends, too.
        clock: Whose seconds.
    """

    def __init__(
        self,
        seconds: float,
        text: Callable[[Meter, str], str],
        *,
        edges: bool = False,
        clock: Callable[[], float] = active_seconds,
    ) -> None:
        self._seconds = seconds
        self._text = text
        self._edges = edges
        self._clock = clock
        self._due = clock() + seconds  # over all meters
        self._meter: Meter | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def begin(self, meter: Meter) -> None:
        self.end()
        self._meter = meter
        if self._edges:
            self._print(meter)
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="qvsplit-progress", daemon=True)
        self._thread.start()

    def end(self, *, keep: bool = True) -> None:
        meter, self._meter = self._meter, None
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if meter is not None and self._edges:
            self._print(meter)

    def note(self, line: str) -> None:
        say(line)

    def _run(self) -> None:
        while not self._ended.wait(max(0.01, self._due - self._clock())):
            self.tick()

    def tick(self) -> None:
        """Print a line, if it is time for one."""
        meter = self._meter
        if meter is not None and self._clock() >= self._due:
            self._due = self._clock() + self._seconds
            self._print(meter)

    def _print(self, meter: Meter) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        sys.stderr.write(self._text(meter, now) + "\n")
        sys.stderr.flush()


def _as_line(meter: Meter, now: str) -> str:
    return f"{now} {meter.line}"


def _as_json(meter: Meter, now: str) -> str:
    rate, left = meter.rate, meter.seconds_left
    progress: dict[str, Any] = {"type": "progress", "phase": meter.phase}
    if meter.part:
        progress["part"] = meter.part
    progress |= {
        "done": meter.done, "total": meter.total or None, "unit": meter.unit,
        "rate": None if rate is None else round(rate, 4), "seconds_left": None if left is None else round(left, 1),
        "time": now,
    }  # fmt: skip
    return json.dumps(progress)


class _Bar:
    """A bar of rich's, as wide as the terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def begin(self, meter: Meter) -> None:
        self.end()
        self._progress = _progress(meter)
        self._progress.start()

    def end(self, *, keep: bool = True) -> None:
        if self._progress is not None:
            self._progress.live.transient = not keep
            self._progress.stop()
        self._progress = None

    def note(self, line: str) -> None:
        if self._progress is None:
            say(line)
            return
        text = f"qvsplit: {printable(line)}"
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _progress(meter: Meter) -> Progress:
    """Make a bar of rich's that a user may stop and continue.

    The cursor stays visible: nobody would show it again where the process is stopped or killed. Nothing is drawn while
    the process is in the background: the line it would draw on is the one that the user types on. And what goes to
    stdout goes there: rich would have it on the terminal, also where stdout is a file.
    """
    from rich.console import Console, ConsoleRenderable
    from rich.live import Live
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    class ForegroundLive(Live):
        def refresh(self) -> None:
            if _in_foreground():
                super().refresh()

        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return super().process_renderables(renderables) if _in_foreground() else renderables

    class Words(ProgressColumn):
        """What the meter says at the moment of drawing."""

        def __init__(self, words: Callable[[], str], style: str = "") -> None:
            super().__init__()
            self._words, self._style = words, style

        def render(self, task: Task) -> Text:
            return Text(self._words(), style=self._style, no_wrap=True)

    class MeterBar(BarColumn):
        def render(self, task: Task) -> Any:
            task.total, task.completed = meter.total or None, meter.done
            return super().render(task)

    def count() -> str:
        counted = meter.total and meter.unit != BYTES
        return f"{meter.done:,}/{meter.total:,}" if counted else meter.count

    progress = Progress(
        Words(lambda: meter.name), MeterBar(bar_width=None), Words(count, "progress.download"),
        Words(lambda: meter.speed), Words(lambda: meter.left, "progress.remaining"),
        console=VisibleCursor(file=sys.stderr), expand=True,
    )  # fmt: skip
    progress.live = ForegroundLive(
        console=progress.console,
        refresh_per_second=10,
        get_renderable=progress.get_renderable,
        redirect_stdout=False,
    )
    progress.add_task("")
    return progress


def _in_foreground() -> bool:
    """Say whether this process may draw on the terminal that stderr is."""
    with suppress(OSError):  # it is not our terminal: nobody else controls what is on it
        return os.tcgetpgrp(2) == os.getpgrp()
    return True
