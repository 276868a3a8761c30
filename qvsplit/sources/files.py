"""Read a file once, whole, and say what identifies it: its hash, size, modification time and version.

Invariants: the hash is that of the very bytes that are returned, or, of a video, which need not fit into memory, of the
file that stays open; `check_unchanged` says whether that still has those bytes. Devices, pipes and sockets are never
opened. A file that cannot be read is an `ItemError` with a reason a person understands. Knows nothing of images.
Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.runtime.names import storable_mtime
from qvsplit.sources.source import Entry

MAX_FILE_BYTES = 1 << 30  # of an image
FRESH_NS = 2_000_000_000  # a file younger than this may still change within its timestamp's resolution
# A clock may be ahead of ours by as much (another machine's, on a shared disk); what is dated later still was not
# written just now, and its stat can be trusted as any other
AHEAD_NS = 24 * 3600 * 1_000_000_000
CHANGED = "was changed while it was being read"
_BLOCK_BYTES = 1 << 24
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What identifies a file that was read.

    Attributes:
        sha256: Of its bytes, 64 hex digits.
        size: Bytes that were read.
        mtime_ns: Its modification time before it was read, within 64 bits.
        version: `mtime_ns` as text; None where the file is too fresh for its stat to be trusted, or changed meanwhile.
        kind: `image` or `video`, by its first bytes.
        frames: Of an image, how many frames or pages it has, of which the first alone is looked at; None where that
            cannot be told.
    """

    sha256: str
    size: int
    mtime_ns: int
    version: str | None
    kind: str = "image"
    frames: int | None = 1


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A file's bytes, none of a video, and what identifies it; see `FileInfo`."""

    data: bytes = field(repr=False)
    sha256: str
    size: int
    mtime_ns: int
    version: str | None
    kind: str = "image"

    @property
    def info(self) -> FileInfo:
        """Give all but the bytes."""
        return FileInfo(self.sha256, self.size, self.mtime_ns, self.version, self.kind)


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A file that was hashed and is still open, with its stat from before its first byte was read."""

    stream: IO[bytes]
    status: os.stat_result

    def check_unchanged(self) -> None:
        """Raise ItemError if the file has been written to since it was hashed."""
        now = os.fstat(self.stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise ItemError(CHANGED)


def read(entry: Entry, file: str | None = None) -> FileBytes:
    """Read the file of `entry` into memory, as an image, whatever it is.

    Args:
        entry: As it was listed.
        file: Where it lies; where `entry` says unless given.

    Raises:
        ItemNotFound: The file was listed and no longer exists.
        ItemError: It cannot be opened or read, is not a regular file, or is too large.
    """
    return read_either(entry, file)[0]


def read_either(
    entry: Entry,
    file: str | None = None,
    *,
    head_bytes: int = 0,
    kind_of: Callable[[bytes], str] = lambda head: "image",
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[FileBytes, OpenVideo | None]:
    """Read the file of `entry`, whose stat is taken before its first byte is read: an image whole, a video in blocks.

    Args:
        entry: As it was listed.
        file: Where it lies; where `entry` says unless given.
        head_bytes: How many of the first bytes `kind_of` is given.
        kind_of: Says by them whether it is an image or a video.
        on_progress: Called for every block of a video.

    Returns:
        What was read; and of a video, the open file, which the caller closes.

    Raises:
        ItemNotFound: The file was listed and no longer exists.
        ItemError: It cannot be opened or read, is not a regular file, or is too large.
    """
    now = time.time_ns()  # before the first byte is read: what changes from here on must not look old
    stream = os.fdopen(_open(entry, file or entry.file), "rb", buffering=0)
    video = None
    try:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ItemError("is not a regular file")
        try:
            kind = kind_of(os.pread(stream.fileno(), head_bytes, 0) if head_bytes else b"")
            if kind == "video":
                data, size = b"", status.st_size
                digest = _hash_blocks(stream, size, on_progress)
                video = OpenVideo(stream, status)
            else:
                data = _read_whole(stream, status.st_size)
                digest, size = hashlib.sha256(data).hexdigest(), len(data)
        except OSError as error:
            raise ItemError(f"cannot be read: {error.strerror}", "permission") from None
        except MemoryError:
            raise ItemError("does not fit into memory", "memory") from None
    finally:
        if video is None:
            stream.close()
    mtime_ns = storable_mtime(status.st_mtime_ns)
    fresh = -AHEAD_NS < now - mtime_ns <= FRESH_NS
    trusted = not fresh and size == status.st_size
    return FileBytes(data, digest, size, mtime_ns, str(mtime_ns) if trusted else None, kind), video


def open_long_path(path: str, flags: int) -> int:
    """Open `path` like `os.open`, also where it is longer than the system takes in one piece.

    Raises:
        OSError: As `os.open` does.
    """
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or len(os.fsencode(path)) < 4096:
            raise
    folder, *parts = path.split("/")
    at = os.open(folder or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], flags | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def sha256_of(file: str) -> str | None:
    """Give the SHA-256 of a file as it is now; None where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _open(entry: Entry, file: str) -> int:
    """Open a regular file only: to open a device or a pipe can do something by itself, or wait for somebody."""
    with suppress(OSError):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ItemError("is not a regular file")
    try:
        return open_long_path(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and entry.size >= 0:
            raise ItemNotFound("is no longer there") from None
        raise ItemError(f"cannot be opened: {error.strerror}", "permission") from None


def _hash_blocks(stream: IO[bytes], size: int, on_progress: Callable[[], None]) -> str:
    """Give the SHA-256 of a file that had `size` when it was opened and must have it still."""
    digest, hashed = hashlib.sha256(), 0
    while hashed <= size and (block := stream.read(_HASHED_BYTES)):
        digest.update(block)
        hashed += len(block)
        on_progress()
    if hashed != size:
        raise ItemError(CHANGED)
    return digest.hexdigest()


def _read_whole(stream: IO[bytes], size: int) -> bytes:
    """Read all bytes of a file that had `size` when it was opened; stop a little beyond what is allowed."""
    data = bytearray()
    while size <= MAX_FILE_BYTES and len(data) <= MAX_FILE_BYTES:
        more = stream.read(max(1, min(size - len(data), _BLOCK_BYTES)) + 1)
        if not more:
            return bytes(data)
        data += more
    raise ItemError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
