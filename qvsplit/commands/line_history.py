"""Typed lines, kept in a file of the user's for the next time. It needs prompt_toolkit; see line_editor.py."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit.history import History

from qvsplit.runtime.atomic_files import written_whole

MOST_KEPT = 1 << 18  # bytes of the newest lines


def history_file() -> str | None:
    """Give where typed lines are kept: in the user's folder for what programs remember. None where it has none."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # is to be passed over, by the specification of that folder
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "qvsplit", "history") if os.path.isabs(state) else None


class KeptHistory(History):
    """The newest typed lines, in a file that only the user can read, as prompt_toolkit's `FileHistory` has them.

    Where it can be neither read nor written, or is no regular file, they are not kept. Nobody is told of that: a home
    that is read-only takes nothing from what is asked.
    """

    def __init__(self, file: str | None) -> None:
        super().__init__()
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        """Give the lines, the newest first. Of a file of twice what is kept the older half is removed."""
        with suppress(OSError), self._opened(os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            newest = os.pread(descriptor, MOST_KEPT, max(0, size - MOST_KEPT))
            if size > MOST_KEPT:
                newest = newest[newest.find(b"\n\n") + 1 :]  # from where an entry begins
            if size > 2 * MOST_KEPT:
                self._replace(newest)
            return reversed([*_entries(newest.decode(errors="replace"))])
        return []

    def store_string(self, string: str) -> None:
        """Add a line."""
        if self._file is None:
            return
        entry = f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')}\n" + "".join(f"+{line}\n" for line in string.split("\n"))
        with suppress(OSError):
            os.makedirs(os.path.dirname(self._file), mode=0o700, exist_ok=True)
            with self._opened(os.O_CREAT | os.O_WRONLY | os.O_APPEND) as descriptor:
                os.write(descriptor, entry.encode(errors="replace"))

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        """Open the file, and make it the user's alone. OSError where it is none."""
        if self._file is None:
            raise FileNotFoundError
        descriptor = os.open(self._file, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)  # a pipe is not waited for
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("no regular file")
            if stat.S_IMODE(status.st_mode) != 0o600:
                os.fchmod(descriptor, 0o600)
            yield descriptor
        finally:
            os.close(descriptor)

    def _replace(self, content: bytes) -> None:
        assert self._file is not None
        with written_whole(Path(os.path.realpath(self._file)), durable=False) as stream:
            stream.write(content)


def _entries(text: str) -> Iterator[str]:
    """Give the typed lines: of each the rows begin with a +, and between two is a row that does not."""
    rows: list[str] = []
    for row in [*text.split("\n"), ""]:
        if row.startswith("+"):
            rows.append(row[1:])
        elif rows:
            yield "\n".join(rows)
            rows = []
