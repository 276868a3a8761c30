"""The Storage door: how a store's files are listed, read, written whole, moved, deleted and locked.

Everything in store/ goes through it. A name is relative to the store's folder, with `/` between its parts. The only
implementation is the local disk, by the standard library: a run with nothing to do must import nothing heavy.
"""

from __future__ import annotations

import errno
import functools
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from qvsplit.errors import DiskError
from qvsplit.runtime.atomic_files import disk_errors, remove_folder, sync_folder, written_whole
from qvsplit.runtime.interrupts import on_leaving
from qvsplit.store import layout
from qvsplit.store.lock import Lock, locked

# What vfat, exFAT, some SMB shares and some of FUSE's file systems say of a hard link
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing. `version` changes whenever the content does: an etag, or times and inode on a disk."""

    name: str
    size: int
    version: str


class Writable(Protocol):
    """What a shard is written to: a storage, or a folder of staged shards."""

    @property
    def location(self) -> str:
        """The place as a person would name it."""

    def put_whole(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        """Give a local stream, for writing and reading, whose content is there as `name` at the end of the block."""


class Storage(Protocol):
    """Where a store lies.

    Reading raises OSError (FileNotFoundError for a name that does not exist); writing raises DiskError.
    """

    @property
    def location(self) -> str:
        """The place as a person would name it."""

    def where(self, name: str) -> str:
        """Give the place of one file as a person would name it."""

    def list(self, folder: str = "") -> list[StoredFile]:
        """List the files in `folder`, not those below it; none where it does not exist."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; seekable."""

    def local_path(self, name: str) -> Path | None:
        """Give the file of this name for libraries that take a path, such as SQLite; None where it is not local."""

    def put_whole(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        """Give a local stream, for writing and reading, whose content appears as `name` at the end of the block.

        Whole or not at all, over what was there. `durable`: it survives a power loss from then on; without, it may be
        lost, but is never seen in part.
        """

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Create a small file; False, and nothing changed, where it exists."""

    def move(self, name: str, to: str) -> None:
        """Rename a file, over what was there. A crash leaves it under one of the two names, or whole under both."""

    def delete(self, *names: str) -> None:
        """Delete files; a name that does not exist is no error."""

    def below(self, folder: str) -> Storage:
        """Give the storage of what lies in `folder`: a rebuilt store grows there."""

    def delete_below(self, folder: str, *, last: str = "") -> bool:
        """Delete everything in `folder`, the file `last` after all else; says whether there was anything."""

    def lock(
        self, *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None
    ) -> AbstractContextManager[Lock]:
        """Hold the store as its only writer; create it if need be. StoreInUse where another process holds it."""


class LocalStorage:
    """A store in a folder of a local disk, or of one mounted like a local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.folder)

    def where(self, name: str) -> str:
        """Give the path of one file."""
        return str(self.folder / name)

    def list(self, folder: str = "") -> list[StoredFile]:
        """List the files in `folder`, sorted by name."""
        try:
            with os.scandir(self.folder / folder) as scan:
                entries = [entry for entry in scan if not entry.is_dir()]
        except FileNotFoundError:
            return []
        files = []
        for entry in entries:
            with suppress(FileNotFoundError):  # deleted meanwhile: no reason to leave out those behind it
                status = entry.stat(follow_symlinks=False)
                version = f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
                files.append(StoredFile(entry.name, status.st_size, version))
        return sorted(files, key=lambda file: file.name)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading, unbuffered. ValueError for what is no regular file: a pipe would make us wait."""
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError("it is not a regular file")
        return os.fdopen(descriptor, "rb", buffering=0)

    def local_path(self, name: str) -> Path | None:
        """Give the file itself."""
        return self.folder / name

    @contextmanager
    def put_whole(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Write in `.qvsplit/staging`, sync, rename, sync the folder."""
        with disk_errors(self.folder):
            staging = self._folder(layout.STAGING)
            self._folder(os.path.dirname(name))
            with written_whole(self.folder / name, staging=staging, durable=durable) as stream:
                yield stream

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Write the content aside, then link it under `name`, which the kernel refuses where that exists.

        Where the file system has no hard links it is written in place, which a crash may leave empty.
        """
        target = self.folder / name
        with disk_errors(self.folder):
            self._folder(os.path.dirname(name))
            # not by the process id: two threads, or two machines, may claim the same name at once
            aside = self._folder(layout.STAGING) / f".{target.name}.{secrets.token_hex(8)}.tmp"
            try:
                _write_new(aside, content)
                try:
                    os.link(aside, target)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    _write_new(target, content)
                sync_folder(target.parent)
            except FileExistsError:
                return False
            finally:
                with suppress(OSError):
                    aside.unlink()
        return True

    def move(self, name: str, to: str) -> None:
        """Rename, and sync both folders."""
        with disk_errors(self.folder):
            self._folder(os.path.dirname(to))
            os.rename(self.folder / name, self.folder / to)
            for folder in {(self.folder / to).parent, (self.folder / name).parent}:
                sync_folder(folder)

    def delete(self, *names: str) -> None:
        """Unlink, then sync the folders once each."""
        with disk_errors(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            for folder in {(self.folder / name).parent for name in names}:
                if folder.exists():
                    sync_folder(folder)

    def below(self, folder: str) -> LocalStorage:
        """Give the storage of a folder in this one; it is created when something is written there."""
        return LocalStorage(self.folder / folder)

    def delete_below(self, folder: str, *, last: str = "") -> bool:
        """Remove the folder and all in it; the file `last` goes when nothing else is left."""
        place = self.folder / folder
        if not place.exists():
            return False
        with disk_errors(self.folder):
            for path in place.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != last:
                    path.unlink()
            if last:
                (place / last).unlink(missing_ok=True)
            place.rmdir()
            sync_folder(place.parent)
        return True

    @contextmanager
    def lock(self, *, wait: bool = False, on_note: Callable[[str], None] = lambda line: None) -> Iterator[Lock]:
        """Take the kernel's lock on `.qvsplit/lock`; delete what a killed run left half-written.

        A store that was created for it and got no shard is gone again at the end.
        """
        created: MutableSequence[Path] = []
        file = self.folder / layout.LOCK
        make_folder = functools.partial(self._folder, layout.OWN_FOLDER, created)
        with locked(file, self.location, make_folder, wait=wait, on_note=on_note) as lock:
            remove = functools.partial(self._remove_again, created)
            try:
                with on_leaving(remove):
                    self._clear_staging()
                    yield lock
            finally:
                remove()

    def _clear_staging(self) -> None:
        """Delete files that a killed run left half-written, and folders of shards that it did not commit."""
        self.delete(*(f"{layout.STAGING}/{file.name}" for file in self.list(layout.STAGING)))
        with disk_errors(self.folder), suppress(FileNotFoundError):
            for folder in sorted((self.folder / layout.STAGING).iterdir()):
                remove_folder(folder)

    def _remove_again(self, created: Sequence[Path]) -> None:
        """Remove the folders that were created for the lock if no shard came of it. The lock is still held.

        The lock's file goes last: whoever waits for it then finds that it is no longer there, and begins anew.
        """
        own = self.folder / layout.OWN_FOLDER
        if own not in created:
            return
        with suppress(OSError, DiskError):  # nothing depends on it, and it must not hide why the run ended
            if any(layout.shard_number(file.name) is not None for file in self.list()):
                return
            self.delete_below(layout.OWN_FOLDER, last=Path(layout.LOCK).name)
            for folder in reversed(created):
                if folder != own:
                    folder.rmdir()  # refused where another process has put something in it

    def _folder(self, name: str, created: MutableSequence[Path] | None = None) -> Path:
        """Create a folder, and its parents; each one's entry is synced, so that a power loss cannot take it away.

        Those that did not exist are added to `created`.
        """
        folder = self.folder / name
        missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
        for one in reversed(missing):
            try:
                one.mkdir()
            except FileExistsError:
                if not one.is_dir():
                    raise  # else another process was faster
            else:
                if created is not None:
                    created.append(one)
            sync_folder(one.parent)
        return folder


def _write_new(file: Path, content: bytes) -> None:
    """Write and sync a file that must not exist. Raises OSError."""
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
