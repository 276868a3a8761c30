"""Handle Ctrl-C, SIGTERM and SIGHUP: they unwind a run like an exception, but never in the middle of a write.

An exception raised by a signal can be lost: Python drops it where it arises inside a callback or a destructor, of
which importing libraries has many. So what arrived is also remembered, and `check` raises it again at the next safe
point; and while nothing is at stake (`at_once`: loading) the process ends on the spot.

A signal that was ignored when the process began, as `nohup` and shells do for their background jobs, is left alone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qvsplit.errors import INTERRUPTED, TERMINATED
from qvsplit.runtime.streams import shows_escape_codes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would raise KeyboardInterrupt."""


_arrived: list[int] = []
_undo: list[Callable[[], None]] = []
_installed = False


def install() -> None:
    """Make each of SIGNALS that is not ignored raise in the main thread from now on, and be remembered for `check`."""
    global _installed
    _installed = True
    _handle(_raise)


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
    before = _handle(_leave)
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
    before = _handle(lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            os.kill(os.getpid(), arrived[0])


@contextmanager
def passed_to(hear: Callable[[], None]) -> Iterator[None]:
    """Have `hear` called on a signal inside the block, in place of raising there; `check` raises it behind the block.

    For the event loop of a library, which `hear` is to end: an exception from anywhere would leave it in disorder.
    """

    def remember(number: int, frame: FrameType | None) -> None:
        _arrived.append(number)
        hear()

    before = _handle(remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arrived() -> bool:
    """Say whether `check` would raise."""
    return bool(_arrived)


def wait_for_input(descriptor: int) -> None:
    """Wait in the main thread until there is something to read.

    Raises what arrives meanwhile, and what arrives just before: a handler runs between two steps of Python, so a signal
    behind the last of them would wait for the read that follows to end. Here its number wakes the wait.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        check()
        select.select([descriptor, reader], [], [])
        check()
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def _handle(handler: Handler) -> dict[signal.Signals, Any]:
    """Set `handler` for each of SIGNALS that is heard; gives the handlers before."""
    heard = [number for number in SIGNALS if signal.getsignal(number) not in {signal.SIG_IGN, None}]
    return {number: signal.signal(number, handler) for number in heard}


def _interruption(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def _raise(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    raise _interruption(number)


def _leave(number: int, frame: FrameType | None) -> None:
    bar = b"\r\x1b[2K" if shows_escape_codes(sys.stderr) else b""  # nobody else is left to take it away
    with suppress(OSError):  # nobody may be listening
        os.write(2, bar + b"qvsplit: interrupted\n")
    try:
        for undo in reversed(_undo):
            undo()
    finally:
        os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)
