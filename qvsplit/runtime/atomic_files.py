"""Files that appear whole or not at all, and the errors of the disk. Standard library only.

What is not guaranteed: that a disk which lies about syncing keeps its word.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qvsplit.errors import DiskError


@contextmanager
def written_whole(file: Path, *, staging: Path | None = None, durable: bool = True) -> Iterator[IO[bytes]]:
    """Give a stream, open for writing and reading, whose content appears as `file` when the block ends without error.

    The content is synced, renamed over what was there (whose permissions it takes) and the rename is synced; not
    `durable`, it is only renamed. Until then it lies hidden in `staging`, which must be on the same file system, or
    beside `file`. Raises OSError.
    """
    folder = staging if staging is not None else file.parent
    temporary = folder / f".{file.name}.{os.getpid()}.tmp"
    with suppress(FileNotFoundError):
        temporary.unlink()  # of a process that had our number and was killed
    try:
        with temporary.open("x+b") as stream:
            with suppress(FileNotFoundError), _where_supported():
                os.fchmod(stream.fileno(), stat.S_IMODE(file.stat().st_mode))
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, file)
        if durable:
            sync_folder(file.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename, creation or removal in `folder` survive a power loss. Raises OSError.

    A file system that does not sync folders does what it does by itself.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _where_supported():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, also beside a process that goes on writing there. Raises OSError.

    It is renamed first: under its name nothing can be created any more.
    """
    removed = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.removed")
    with suppress(FileNotFoundError):  # whoever locked the store next has removed it
        folder.rename(removed)
        shutil.rmtree(removed)


@contextmanager
def _where_supported() -> Iterator[None]:
    """Pass over what a file system says it does not have: SMB, FUSE and vfat lack permissions, or syncs of folders."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}:
            raise


@contextmanager
def disk_errors(place: Path | str, kept: str = "finished shards are kept", elsewhere: str = "") -> Iterator[None]:
    """Turn an OSError inside the block into a DiskError that names `place`, what is `kept`, and what to do.

    That is to make room, or to choose another folder; or what is said as `elsewhere` in place of that.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        room = "make room and run again" + (f", or {elsewhere}" if elsewhere else "")
        advice = room if full else f"{elsewhere or 'choose another folder'}, or change its permissions"
        raise DiskError("; ".join(part for part in (f"{place}: {what}", kept, advice) if part)) from error
