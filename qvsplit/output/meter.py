"""How far one phase of a run is, how fast it has been of late, and how long it may still take.

The rate is that of the recent past, not of the whole phase: what a run does first (a model is loaded, worker processes
start, answers are known already) is no measure of what it does next. Standard library only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from qvsplit.errors import size
from qvsplit.runtime.clock import active_seconds

WINDOW_SECONDS = 120.0  # of the past that the rate is of
LEAST_BURSTS = 10  # that it is of, however long ago: a batch, or a video, may take minutes
BURST_SECONDS = 1.0  # what is done within it counts as done at once, as batches are
BYTES = "bytes"


@dataclass
class _Burst:
    """What was done within a moment: when it began and ended, and how much was done by then in all."""

    began: float
    ended: float
    done: int


class Meter:
    """Counts what is done of one phase. May be read by another thread than counts.

    Attributes:
        phase: What is counted: images, answers.
        part: Of a phase in several parts, which.
        done, total: How many of how many; 0 of 0 where nothing is counted.
        unit: `bytes`, or the name of what is counted.
    """

    def __init__(
        self, phase: str, total: int = 0, *, unit: str = "", clock: Callable[[], float] = active_seconds
    ) -> None:
        self.phase = phase
        self.part = ""
        self.done = 0
        self.total = total
        self.unit = unit or phase
        self._clock = clock
        self._left_out = 0.0
        self._bursts: deque[_Burst] = deque()
        self._lock = threading.Lock()

    def advance(self, number: int = 1) -> None:
        """Count so many more."""
        with self._lock:
            self._count(self.done + number)

    def set(self, part: str, done: int, total: int) -> None:
        """Say how far which part is; what was measured of another part is forgotten."""
        with self._lock:
            if part != self.part or done < self.done:
                self._bursts.clear()
            self.part, self.total = part, total
            self._count(done)

    def skip(self, number: int = 1) -> None:
        """Count so many more that took no time, and say nothing of how long the others will take."""
        with self._lock:
            self.done += number
            for burst in self._bursts:
                burst.done += number

    def leave_out(self, seconds: float) -> None:
        """Have time not count that was spent on another phase."""
        with self._lock:
            self._left_out += seconds

    def _count(self, done: int) -> None:
        now = self._now()
        self.done = done
        if self._bursts and now - self._bursts[-1].began < BURST_SECONDS:
            self._bursts[-1].ended, self._bursts[-1].done = now, done
        else:
            self._bursts.append(_Burst(now, now, done))
        while len(self._bursts) > LEAST_BURSTS and self._bursts[0].ended < now - WINDOW_SECONDS:
            self._bursts.popleft()

    def _now(self) -> float:
        return self._clock() - self._left_out

    @property
    def rate(self) -> float | None:
        """How much is done a second; None before it is known."""
        with self._lock:
            return self._measured()[0]

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at that rate; None before it is known."""
        with self._lock:
            rate, since = self._measured()
            left = self.total - self.done
            return None if rate is None else max(0.0, left / rate - since)

    def _measured(self) -> tuple[float | None, float]:
        """Give the rate, and for how long the next burst has been in the making.

        What comes before the end of the first burst is no measure: that one took as long as all that had to begin.
        A phase that stalls, for longer than between any two bursts, becomes slower and slower.
        """
        now = self._now()
        whole = list(self._bursts)
        under_way = bool(whole) and now - whole[-1].began < BURST_SECONDS
        if under_way:
            del whole[-1]
        if len(whole) < 2:
            return None, 0.0
        longest = max(after.ended - before.ended for before, after in pairwise(whole))
        since = 0.0 if under_way else now - whole[-1].ended
        seconds = whole[-1].ended - whole[0].ended + max(0.0, since - longest)
        return (whole[-1].done - whole[0].done) / seconds or None, min(since, longest)

    # ----------------------------------------------------------------------------------------------------- in words

    @property
    def name(self) -> str:
        """The phase, with its part."""
        return f"{self.phase}: {self.part}" if self.part else self.phase

    @property
    def count(self) -> str:
        """`120 of 4,000`; nothing where nothing is counted."""
        return f"{self._amount(self.done)} of {self._amount(self.total)}" if self.total else ""

    @property
    def speed(self) -> str:
        """`2.1/s`; nothing before it is known."""
        rate = self.rate
        if rate is None:
            return ""
        if self.unit == BYTES:
            return f"{size(round(rate))}/s"
        for unit, seconds in (("s", 1), ("min", 60)):
            if rate * seconds >= 1:
                return f"{_two_digits(rate * seconds)}/{unit}"
        return f"{_two_digits(rate * 3600)}/h"

    @property
    def left(self) -> str:
        """`about 31 min left`; nothing before it is known."""
        seconds = self.seconds_left
        return "" if seconds is None or self.done >= self.total else f"about {duration(seconds)} left"

    @property
    def line(self) -> str:
        """`images 120 of 4,000, 2.1/s, about 31 min left`."""
        head = f"{self.name} {self.count}" if self.count else self.name
        return ", ".join(part for part in (head, self.speed, self.left) if part)

    def _amount(self, number: int) -> str:
        return size(number) if self.unit == BYTES else f"{number:,}"


def duration(seconds: float) -> str:
    """Give a time in the unit that suits it: `40 s`, `31 min`, `5 h 10 min`, `3 days`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(minutes / (24 * 60))} days"


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"
