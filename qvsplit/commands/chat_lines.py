"""Lines that somebody types, or that come from a pipe: edited where the terminal can do that, else plain."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from qvsplit.errors import UsageError
from qvsplit.runtime import interrupts
from qvsplit.runtime.streams import is_terminal

if TYPE_CHECKING:
    from qvsplit.commands.line_editor import Names

NO_EDITING = frozenset({"", "dumb", "unknown"})  # of TERM


class Lines(Protocol):
    """Where lines come from.

    Attributes:
        are_typed: Whether somebody types them, and is shown a prompt.
        are_edited: Whether with more than what a terminal itself does.
        discarded: What was typed when the last KeyboardInterrupt came, as far as that is known.
    """

    are_typed: bool
    are_edited: bool
    discarded: str

    def read(self, prompt: str) -> str | None:
        """Give the next line, which may be of several; None at the end. KeyboardInterrupt for Ctrl-C."""


def open_lines(names: Names, *, remembers: bool) -> Lines:
    """Give the lines of stdin, with what completes them: `names`."""
    if not is_terminal(sys.stdin):
        return PipedLines()
    if not is_terminal(sys.stderr) or os.environ.get("TERM", "") in NO_EDITING:
        return PlainLines()
    from qvsplit.commands.line_editor import EditedLines

    return EditedLines(names, remembers=remembers)


class PlainLines:
    """Lines that the terminal itself lets the user edit: no escape code is written."""

    are_typed, are_edited, discarded = True, False, ""

    def read(self, prompt: str) -> str | None:
        """Show the prompt on stderr, and give the next line, as Python gives words of the command line."""
        shown = prompt.encode(sys.stderr.encoding, "backslashreplace")

        def show(*_: object) -> None:
            with suppress(OSError):  # nobody may be listening
                os.write(2, shown)  # not by print(), which must not be called again by a signal that interrupts it

        before = signal.signal(signal.SIGCONT, show)  # stopped by Ctrl-Z, it comes back below the shell's lines
        try:
            show()
            line = _line(sys.stdin.fileno())
        except OSError as error:
            raise UsageError(f"no question can be read from the terminal ({error.strerror})") from None
        finally:
            signal.signal(signal.SIGCONT, before)
        if not line:
            print(file=sys.stderr)
        return os.fsdecode(line).rstrip("\n") if line else None


def _line(terminal: int) -> bytes:
    """Read a line; never for longer than there is something to read."""
    line = b""
    while not line.endswith(b"\n"):
        interrupts.wait_for_input(terminal)
        part = os.read(terminal, 4096)
        if not part:
            break
        line += part
    return line


class PipedLines:
    """Lines of a pipe or a file, each read when it is wanted; nothing is shown."""

    are_typed, are_edited, discarded = False, False, ""

    def read(self, prompt: str) -> str | None:
        """Give the next line, as Python gives words of the command line."""
        buffer = getattr(sys.stdin, "buffer", None)
        try:
            line: bytes | str = sys.stdin.readline() if buffer is None else buffer.readline()
        except OSError as error:
            raise UsageError(f"no question can be read from the pipe ({error.strerror})") from None
        text = line if isinstance(line, str) else os.fsdecode(line.removeprefix(b"\xef\xbb\xbf"))
        return text.rstrip("\r\n") if text else None
