"""Commands on a pseudo-terminal, and what they say in one line."""

from __future__ import annotations

import errno
import os
import pty
import select
import sys
import time
from collections.abc import Callable

from tests.support.forked import Forked

Started = tuple[int | Forked, int]  # a process, and the descriptor of its terminal's other side


def one_line(text: str) -> str:
    """The only line of `text`, which is the program's own."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("qvsplit: ")
    return lines[0]


def on_terminal(
    words: list[str], typed: str = "", prompt: str = "?", *, start: Callable[..., Started] | None = None,
    **environment: str,
) -> str:  # fmt: skip
    """Run a command on a pseudo-terminal, type a line of `typed` at each `prompt`, and give all that it showed.

    It is started as by `start_on_terminal`, or otherwise.
    """
    process, terminal = (start or start_on_terminal)(words, **environment)
    shown, remaining = b"", typed.encode()
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            part = os.read(terminal, 4096)
        except OSError as error:
            assert error.errno == errno.EIO  # the other side has closed
            break
        if not part:
            break
        shown += part
        if remaining and shown.rstrip().endswith(prompt.encode()):
            line, _, rest = remaining.partition(b"\n")
            os.write(terminal, line + b"\n")
            remaining = rest
    os.close(terminal)
    exit_code(process)
    return shown.decode("utf-8", "replace")


def exit_code(process: int | Forked) -> int:
    """Wait for the end of a process; give its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) if isinstance(process, int) else process.wait()


def start_on_terminal(words: list[str], **environment: str) -> tuple[int, int]:
    """Start a command on a pseudo-terminal; gives its process and the descriptor of the terminal's other side."""
    return _start(["-m", "qvsplit", *words], environment)


def module_on_terminal(module: str, *words: str, **environment: str) -> tuple[int, int]:
    """Run a module as a program on a pseudo-terminal, as `start_on_terminal`."""
    return _start(["-m", module, *words], environment)


def python_on_terminal(code: str, **environment: str) -> tuple[int, int]:
    """Start Python with this code on a pseudo-terminal, as `start_on_terminal`."""
    return _start(["-c", code], environment)


def _start(words: list[str], environment: dict[str, str]) -> tuple[int, int]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"OMP_NUM_THREADS": "1"} | environment)  # such small models gain nothing from more
        os.execv(sys.executable, [sys.executable, *words])
    return pid, terminal


PASTING_ENDS = "\x1b[?2004l"  # the last of an edited line: from here on nothing pasted is told from what is typed


class Typist:
    """Types on a pseudo-terminal, and reads what it shows, each part once."""

    def __init__(self, started: Started) -> None:
        self.process, self.terminal = started
        self.pid = self.process if isinstance(self.process, int) else self.process.pid
        self._unread = ""

    def type(self, keys: str | bytes) -> None:
        """Type these keys."""
        os.write(self.terminal, keys if isinstance(keys, bytes) else keys.encode())

    def read(self, text: str | None) -> str:
        """Give what is shown up to `text`, or up to the end."""
        if text is None or text not in self._unread:
            self._unread += read_until(self.terminal, text, before=self._unread)
        end = len(self._unread) if text is None else self._unread.index(text) + len(text)
        read, self._unread = self._unread[:end], self._unread[end:]
        return read

    def line(self, text: str, until: str, *, is_edited: bool = True) -> str:
        """Type a line, and give what is shown behind it up to `until`: where it `is_edited`, without the line itself."""
        self.type(f"{text}\r")
        if is_edited:
            self.read(PASTING_ENDS)
        return self.read(until)

    def leave(self, prompt: str) -> int:
        """Press Ctrl-D at the next prompt, and give the exit code: before it is there the key means something else."""
        self.read(prompt)
        self.type("\x04")
        return self.ended()

    def ended(self) -> int:
        """Give the exit code, once it has ended."""
        self.read(None)
        os.close(self.terminal)
        return exit_code(self.process)


def read_until(terminal: int, text: str | None, seconds: float = 60.0, before: str = "") -> str:
    """Give what a terminal shows until there is `text` in it, or, without one, until the other side has closed.

    A part of `text` may have been shown `before`.
    """
    shown, end = b"", time.monotonic() + seconds
    while text is None or text.encode() not in before.encode() + shown:
        ready, _, _ = select.select([terminal], [], [], end - time.monotonic())
        assert ready, shown
        try:
            shown += os.read(terminal, 4096)
        except OSError as error:
            assert (error.errno, text) == (errno.EIO, None), shown
            break
    return shown.decode("utf-8", "replace")
