"""One writer at a time: the kernel's lock on a file of the store, and who holds it.

The lock is flock's, so it ends with the process that holds it, however that dies. Readers take none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qvsplit.errors import DiskError, StoreInUse
from qvsplit.runtime.atomic_files import disk_errors

POLL_SECONDS = 0.5
_ATTEMPTS = 100
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Lock:
    """A lock that is held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def announce(self) -> None:
        """Write down who holds the lock, for those who find it taken. A run with nothing to do writes nothing."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk is reported where it matters
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)


@contextmanager
def locked(
    file: Path, store: str, make_folder: Callable[[], object], *, wait: bool, on_note: Callable[[str], None]
) -> Iterator[Lock]:
    """Hold the lock on `file`, created if need be, which stands for `store`.

    Args:
        file: The lock's.
        store: As a person would name it.
        make_folder: Creates the folder of `file` if need be. Called again where another process, which held the lock,
            has deleted file and folder meanwhile.
        wait: Wait for another process.
        on_note: Hears for whom.

    Raises:
        StoreInUse: Another process holds it, and we are not to `wait`; the message names the holder.
        DiskError: The file cannot be written, or its file system has no locks.
    """
    while True:
        descriptor = _opened(file, store, make_folder)
        try:
            _take(descriptor, store, wait, on_note)
            if _is_at(file, descriptor):  # else it is nobody's: whoever held it has deleted the file
                yield Lock(descriptor)
                return
        finally:
            os.close(descriptor)


def _opened(file: Path, store: str, make_folder: Callable[[], object]) -> int:
    """Open the file; again where its folder was deleted just when it had been created. Raises DiskError."""
    with disk_errors(store):
        for _ in range(_ATTEMPTS):
            with suppress(FileNotFoundError):
                make_folder()
                return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        make_folder()
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_at(file: Path, descriptor: int) -> bool:
    """Say whether what is open is the file that is there now."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _take(descriptor: int, store: str, wait: bool, on_note: Callable[[str], None]) -> None:
    noted = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(descriptor)
            if not wait:
                raise StoreInUse(
                    f"{store} is being written by {holder}; wait for it with `wait=True`, or choose another store"
                ) from None
            if not noted:
                on_note(f"waiting for {holder}, which is writing {store}")
                noted = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise DiskError(
                    f"{store} is on a file system without locks, where two runs could spoil each other's work; "
                    "choose a store on a local disk, or mount it with locks"
                ) from None
            raise


def _holder(descriptor: int) -> str:
    """Name who holds the lock: by the kernel where it knows, else by what the holder wrote down."""
    pid = _holder_by_kernel(descriptor)
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        written, host, since = int(holder["pid"]), str(holder["host"]), str(holder["since"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"process {pid}" if pid else "another process"
    if pid is not None and pid != written and host == socket.gethostname():
        return f"process {pid}"  # which has not begun to write, or has not said yet who it is
    return f"process {written} on {host} since {since}"


def _holder_by_kernel(descriptor: int) -> int | None:
    """Give the process that Linux names as the holder; None where it is another machine's, or in another container."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # number, kind, advisory, access, pid, device:inode, …
            if fields[1] == "FLOCK" and fields[5] == place and int(fields[4]) > 0:
                return int(fields[4])
    return None
