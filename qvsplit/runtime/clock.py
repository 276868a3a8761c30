"""A clock that does not count what a process was stopped for: by Ctrl-Z, by SIGSTOP, with its machine suspended.

Nothing tells a process how long it was stopped. So a thread looks at the monotonic clock a few times a second; a gap
between two looks that is much longer than that was a pause, and counts as one beat. On a machine so busy that the
thread is not heard for a second, too little is counted: a limit strikes late then, and never early.
Standard library only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

BEAT_SECONDS = 0.25  # also how long a wait may be before it looks at this clock again
_PAUSE_SECONDS = 1.0

T = TypeVar("T")


class _Clock:
    """The monotonic clock, less the pauses since it was first read."""

    def __init__(self, paused: float = 0.0) -> None:
        self.paused = paused
        self._last = 0.0
        self._beats = False
        self._lock = threading.Lock()

    def read(self) -> float:
        with self._lock:
            if not self._beats:
                self._beats, self._last = True, time.monotonic()
                threading.Thread(target=self._beat, name="qvsplit-clock", daemon=True).start()
            now = time.monotonic()
            if now - self._last > _PAUSE_SECONDS:
                self.paused += now - self._last - BEAT_SECONDS
            self._last = now
            return now - self.paused

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.read()


_clock = _Clock()


def active_seconds() -> float:
    """Give a time in seconds of which only differences mean something, like `time.monotonic`, without pauses."""
    return _clock.read()


def wait_until(deadline: float, wait: Callable[[float], T]) -> T:
    """Wait until `deadline`, by `active_seconds`, for what `wait` gives.

    Args:
        deadline: Until when. `wait` is called at least once, also where that has passed.
        wait: Waits for so many seconds, and raises TimeoutError where they were not enough.

    Raises:
        TimeoutError: The deadline has passed.
    """
    while True:
        try:
            return wait(max(0.001, min(BEAT_SECONDS, deadline - active_seconds())))
        except TimeoutError:
            if active_seconds() >= deadline:
                raise


def _begin_again() -> None:
    """Have a clock that beats in a forked child, too: threads do not come along."""
    global _clock
    _clock = _Clock(_clock.paused)


os.register_at_fork(after_in_child=_begin_again)
