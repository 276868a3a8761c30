"""Commands on a pseudo-terminal, and what they say in one line."""

from __future__ import annotations

import errno
import os
import pty
import select
import sys
import time


def one_line(text: str) -> str:
    """The only line of `text`, which is the program's own."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("qvsplit: ")
    return lines[0]


def on_terminal(words: list[str], typed: str = "", **environment: str) -> str:
    """Run a command on a pseudo-terminal, type `typed` once it asks, and give all that it showed."""
    pid, terminal = start_on_terminal(words, **environment)
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
        if remaining and shown.rstrip().endswith(b"?"):
            line, _, rest = remaining.partition(b"\n")
            os.write(terminal, line + b"\n")
            remaining = rest
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode("utf-8", "replace")


def start_on_terminal(words: list[str], **environment: str) -> tuple[int, int]:
    """Start a command on a pseudo-terminal; gives its process and the descriptor of the terminal's other side."""
    return _start(["-m", "qvsplit", *words], environment)


def python_on_terminal(code: str, **environment: str) -> tuple[int, int]:
    """Start Python with this code on a pseudo-terminal, as `start_on_terminal`."""
    return _start(["-c", code], environment)


def _start(words: list[str], environment: dict[str, str]) -> tuple[int, int]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"OMP_NUM_THREADS": "1"} | environment)  # such small models gain nothing from more
        os.execv(sys.executable, [sys.executable, *words])
    return pid, terminal


def read_until(terminal: int, text: str | None, seconds: float = 60.0) -> str:
    """Give what a terminal shows until there is `text` in it, or, without one, until the other side has closed."""
    shown, end = b"", time.monotonic() + seconds
    while text is None or text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], end - time.monotonic())
        assert ready, shown
        try:
            shown += os.read(terminal, 4096)
        except OSError as error:
            assert (error.errno, text) == (errno.EIO, None), shown
            break
    return shown.decode("utf-8", "replace")
