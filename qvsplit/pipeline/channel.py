"""Hand what one worker thread makes to the runner, a few pieces ahead. Standard library only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from qvsplit.sources.decoder import Closed

AHEAD = 2  # pieces that wait to be taken

T = TypeVar("T")


class Channel(Generic[T]):
    """One worker puts, one taker takes, in order. Whichever end is done says so, and the other waits no longer."""

    def __init__(self) -> None:
        self._waiting: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._changed = threading.Condition()

    def put(self, value: T) -> None:
        """Give a value; waits while enough of them have not been taken.

        Raises:
            Closed: Nobody takes any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < AHEAD)
            if self._closed:
                raise Closed
            self._waiting.append(value)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more comes; an `error` is raised in the taker, behind what it has not taken yet."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more is taken."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take values until the end. Raises what the worker ended with."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._ended or self._closed)
                if not self._waiting:
                    if self._error is not None:
                        raise self._error
                    return
                value = self._waiting.popleft()
                self._changed.notify_all()
            yield value
