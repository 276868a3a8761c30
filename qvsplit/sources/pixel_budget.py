"""Limit how many pixels of decoded images are in memory at a time. Standard library only."""

from __future__ import annotations

import threading


class Closed(Exception):
    """`close` was called: whoever still waits for an image need not wait longer."""


class PixelBudget:
    """The pixels that may be in memory as decoded images, given out so that the first in line never waits.

    Whoever takes images in turn says with `serve` whose turn it is; that one gets its memory even over the budget,
    so that those behind it, who hold theirs until their own turn, cannot block it.
    """

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._turn = -1
        self._closed = False
        self._changed = threading.Condition()

    def take(self, number: int, pixels: int) -> None:
        """Wait until image `number` may have so many pixels.

        Raises:
            Closed: The budget was closed, before or meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number <= self._turn or pixels <= self._free)
            if self._closed:
                raise Closed
            self._free -= pixels

    def give_back(self, pixels: int) -> None:
        """Say that so many pixels are no longer in memory."""
        with self._changed:
            self._free += pixels
            self._changed.notify_all()

    def serve(self, number: int) -> None:
        """Say that it is the turn of image `number`."""
        with self._changed:
            self._turn = number
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
