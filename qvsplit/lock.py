"""One writer at a time: the kernel's lock on an album, who holds it, and what a dead writer left behind.

The lock is flock's, so it ends with the process that holds it, however that dies. Readers take none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qvsplit.errors import AlbumInUse, DiskError
from qvsplit.store import disk_errors

LOCK_FILE = ".qvsplit.lock"
POLL_SECONDS = 0.5
_TEMPORARY = re.compile(r"\.(shard-\d{6,}\.parquet|qvsplit-[a-z]+\.jsonl?)\.\d+\.tmp")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Lock:
    """A lock that is held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def announce(self) -> None:
        """Write down who we are, for those who find the album locked. A run with nothing to do writes nothing."""
        told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk is met, and said, where it matters
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(told).encode(), 0)


@contextmanager
def locked(folder: Path, *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None) -> Iterator[Lock]:
    """Hold `folder` as its only writer, made if need be; what a killed run left half-written is removed.

    AlbumInUse, naming the holder, if another has it, unless we are to `wait`. DiskError where the folder cannot be
    written or has no locks.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(descriptor, folder, wait, on_note)
        clear_leftovers(folder)
        yield Lock(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written. Only for whoever holds the lock."""
    with disk_errors(folder):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                (folder / name).unlink()


def _take(descriptor: int, folder: Path, wait: bool, on_note: Callable[[str], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(descriptor)
            if not wait:
                raise AlbumInUse(
                    f"{folder} is being written by {holder}; wait for it with --wait, or choose another album"
                ) from None
            if not told:
                on_note(f"waiting for {holder}, which is writing {folder}")
                told = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise DiskError(
                    f"{folder} is on a file system without locks, where two runs could spoil each other's work; "
                    "choose an album on a local disk, or mount it with locks"
                ) from None
            raise


def _holder(descriptor: int) -> str:
    """Who holds the lock: the kernel's word where it has one, else what the holder wrote down."""
    pid = _told_by_kernel(descriptor)
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        written, host, since = int(told["pid"]), str(told["host"]), str(told["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"process {pid}" if pid else "another process"
    if pid is not None and pid != written and host == socket.gethostname():
        return f"process {pid}"  # which has not begun to write, or not yet said who it is
    return f"process {written} on {host} since {since}"


def _told_by_kernel(descriptor: int) -> int | None:
    """The process that Linux names as the holder; none where it is another machine's, or in another container."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # number, kind, advisory, access, pid, device:inode, …
            if fields[1] == "FLOCK" and fields[5] == place and int(fields[4]) > 0:
                return int(fields[4])
    return None
