"""Handle Ctrl-C, SIGTERM and SIGHUP: they unwind a run like an exception, but never in the middle of a write.

An exception raised by a signal can be lost: Python drops it where it arises inside a callback or a destructor, of
which importing libraries has many. So what arrived is also remembered, and `check` raises it again at the next safe
point; and while nothing is at stake (`at_once`: loading) the process ends on the spot.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qvsplit.errors import INTERRUPTED, TERMINATED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would raise KeyboardInterrupt."""


_arrived: list[int] = []
_undo: list[Callable[[], None]] = []
_installed = False


def install() -> None:
    """Make each of SIGNALS raise in the main thread from now on, and be remembered for `check`."""
    global _installed
    _installed = True
    for number in SIGNALS:
        signal.signal(number, _raise)


def check() -> None:
    """Raise what arrived and was lost on its way here."""
    if _arrived:
        raise _interruption(_arrived[0])


def clear() -> None:
    """Forget what arrived: it has been dealt with."""
    _arrived.clear()


@contextmanager
def at_once() -> Iterator[None]:
    """End the process at once on a signal inside the block, if `install` was called: nothing is at stake yet."""
    if not _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def on_leaving(undo: Callable[[], None]) -> Iterator[None]:
    """Have `undo` called should a signal inside the block end the process on the spot."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver signals that come inside the block at its end, of the outermost where blocks are nested.

    Outside the main thread, which alone hears signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda n, _: arrived.append(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            os.kill(os.getpid(), arrived[0])


def _interruption(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def _raise(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    raise _interruption(number)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\r\x1b[2K")  # a progress bar hides the cursor, and nobody else is left to show it
    os.write(2, b"qvsplit: interrupted\n")
    try:
        for undo in reversed(_undo):
            undo()
    finally:
        os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)
