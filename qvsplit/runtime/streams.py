"""The standard streams, whatever a process is started with: closed, full, of a narrow encoding, without a reader.

Standard library only; imported before anything else.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

from qvsplit.errors import DiskError

READER_GONE = 128 + 13  # the exit code of a program that SIGPIPE ends


class ReaderGone(Exception):
    """Whoever read stdout has enough (`qvsplit ask … | head`): the end of the command, and no error."""


def prepare() -> None:
    """Make stdin, stdout and stderr usable in any case. Call it once, before any file is opened.

    A descriptor that is closed becomes the null device: else the next file that is opened would get its number, and be
    written to by whatever prints. Characters beyond an encoding are printed as escapes.
    """
    for descriptor in range(3):
        _open_if_closed(descriptor)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
    if not sys.stdin.isatty():
        reader = io.BufferedReader(_Input())
        sys.stdin = io.TextIOWrapper(reader, encoding=sys.stdin.encoding, errors=sys.stdin.errors)
    sys.stdout = _writer(_Output(1, "wb", closefd=False), sys.stdout)
    sys.stderr = _writer(_Diagnostics(2, "wb", closefd=False), sys.stderr)


def flush() -> None:
    """Write what is still held back.

    Raises:
        ReaderGone: Nobody reads stdout any more.
        DiskError: It cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def discard_output() -> None:
    """Let what could not be written to stdout go, so that the interpreter does not try again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_terminal(stream: Any) -> bool:
    """Say whether `stream` (sys.stdin, sys.stdout or sys.stderr, which may be closed) is a terminal."""
    return stream is not None and not stream.closed and bool(stream.isatty())


def shows_escape_codes(stream: Any) -> bool:
    """Say whether `stream` is a terminal that understands escape codes, and whose user has not refused them."""
    known = os.environ.get("TERM", "") not in {"", "dumb", "unknown"}
    return known and not os.environ.get("NO_COLOR") and is_terminal(stream)


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        opened = os.open(os.devnull, os.O_RDWR)
        os.dup2(opened, descriptor)  # for children, too, who would else have it closed
        if opened != descriptor:
            os.close(opened)


def _writer(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    """Give a text stream on `raw` with the encoding and the buffering that Python chose for the stream `before`."""
    encoding, errors = ("utf-8", "strict") if before is None else (before.encoding, before.errors)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace" if errors in {"strict", "surrogateescape"} else errors,
        newline="\n",
        line_buffering=before is None or before.line_buffering,
        write_through=before is not None and before.write_through,
    )


class _Input(io.RawIOBase):
    """Reads stdin to its end also where another process, which shares it with us, has made it non-blocking."""

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0

    def readinto(self, buffer: Any, /) -> int:
        while True:
            try:
                return os.readv(0, [buffer])
            except BlockingIOError:
                select.select([0], [], [])


class _Output(io.FileIO):
    """Says what became of the output in errors of its own: an OSError could come from anywhere."""

    def write(self, data: Any, /) -> int:
        try:
            return _write(super().write, self, data)
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            why = "the disk is full: " if full else ""
            raise DiskError(f"{why}the output could not be written ({error.strerror})") from None


class _Diagnostics(io.FileIO):
    """Goes on where nobody can be told: a run must not end, nor lose anything, for want of somebody who listens."""

    def write(self, data: Any, /) -> int:
        try:
            return _write(super().write, self, data)
        except OSError:
            return len(data)


def _write(write: Any, raw: io.FileIO, data: Any) -> int:
    while (written := write(data)) is None:  # non-blocking, and full for the moment
        select.select([], [raw], [])
    return int(written)
