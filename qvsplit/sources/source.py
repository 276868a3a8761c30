"""The Source door: what items there are, whether those that are stored still exist, and their bytes as a local file.

Standard library only: a run with nothing to do comes no further than this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from qvsplit.runtime.names import file_on_disk, is_within, storable_mtime, stored_name

Folder = tuple[str, str]  # root, and the folder below it, both as stored
Key = tuple[str, str]  # root, and the item below it, both as stored

UNKNOWN_LINE = "-1\0"  # in place of size and version: the listing could not tell; reading will say what is wrong
UNREADABLE = "\0unreadable"  # behind size and version: this process may not read the file


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a listing.

    Attributes:
        root: The folder that was listed, as stored (see runtime/names.py).
        path: The item below it, as stored.
        size: Bytes; -1 where the listing could not tell.
        version: What changes with the content: a modification time or an etag, as text. None where it is not trusted.
        mtime_ns: The modification time; None where there is none.
        readable: False where it is known that this process may not read it.
    """

    root: str
    path: str
    size: int
    version: str | None
    mtime_ns: int | None
    readable: bool = True

    @property
    def key(self) -> Key:
        """What names the item in a store."""
        return self.root, self.path

    @property
    def file(self) -> str:
        """The path to open, as the file system has it."""
        return file_on_disk(self.root, self.path)


@dataclass(frozen=True, slots=True)
class Listing:
    """The items of one folder.

    Attributes:
        root: As stored.
        path: The folder below it, as stored.
        lines: Name, size and version of each item, sorted, with a NUL between them, and behind them UNREADABLE where
            this process may not read it; empty where the listing is `known`.
        number: Items in the folder.
        complete: False where only some files of the folder were looked at, those that were named one by one.
        known: Whether its digest is the one that the caller knew, so that it was not listed out.
        exclusions: What changes with the patterns by which something in the folder may have been left out.
    """

    root: str
    path: str
    lines: tuple[str, ...]
    number: int
    complete: bool = True
    known: bool = False
    exclusions: str = ""

    @property
    def folder(self) -> Folder:
        """Root and path."""
        return self.root, self.path

    @property
    def digest(self) -> str:
        """32 hex digits over names, sizes and versions, and over the patterns."""
        return listing_digest(self.lines, self.exclusions)

    def entries(self) -> Iterator[Entry]:
        """Give each item, sorted by name."""
        prefix = self.path + "/" if self.path else ""
        for line in self.lines:
            name, size, version, *unreadable = line.split("\0")
            mtime_ns = _mtime_of(version)
            if mtime_ns is not None:
                version = str(mtime_ns)
            yield Entry(self.root, prefix + stored_name(name), int(size), version or None, mtime_ns, not unreadable)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a walk has left out.

    Attributes:
        kinds: Files that look like images or videos and that nothing here reads, by the end of their names.
        files: Images and videos that are excluded by a pattern, but for those in excluded folders.
        folders: That are excluded, by a pattern or by default.
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    files: int = 0
    folders: int = 0


@dataclass(frozen=True, slots=True)
class Scope:
    """What a source has listed: every path that was given, those of them in which nothing was found, what was left out.

    Paths are as the file system has them.
    """

    starts: tuple[str, ...]
    empty: tuple[str, ...]
    left_out: LeftOut = LeftOut()

    def covers(self, folder: Folder) -> bool:
        """Say whether a folder is at or below a path in which something was found."""
        place = file_on_disk(*folder).rstrip("/") or "/"
        return any(is_within(place, start) for start in self.starts if start not in self.empty)


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether a stored item still exists.

    Attributes:
        state: Only `absent` may become deleted. `unknown`: it cannot be looked at, or its disk may not be mounted.
        entry: The item as it is now, where it is present.
        empty_folder: The folder above it that is there and holds nothing at all, as a mount point does.
        is_excluded: Whether it is present and every walk leaves it out.
    """

    state: Literal["present", "absent", "unknown"]
    entry: Entry | None = None
    empty_folder: str | None = None
    is_excluded: bool = False


def local_file(entry: Entry) -> Path:
    """Give the file itself of an entry of a local folder; picklable, as every function of a module is."""
    return Path(entry.file)


class Source(Protocol):
    """Where items come from."""

    def list(self, known_digests: Mapping[Folder, str]) -> Iterator[Listing]:
        """List every folder once. One whose digest is the known one need not be listed out."""

    @property
    def scope(self) -> Scope:
        """What has been listed; valid once `list` has come to its end."""

    def stat(self, keys: Sequence[Key]) -> Mapping[Key, Presence]:
        """Look for stored items that no listing has."""

    def fetch(self, entry: Entry) -> Path:
        """Give the item as a local file; raises OSError. Bytes would not do: videos do not fit into memory.

        Picklable where the stages are to run in other processes.
        """


def _mtime_of(version: str) -> int | None:
    """Give the modification time that a local file's version is; None for an etag, or where it is not known."""
    try:
        return storable_mtime(int(version))
    except ValueError:
        return None


def listing_digest(lines: Sequence[str], exclusions: str = "") -> str:
    """Digest a listing. A name holds no NUL, a number no newline: no two listings are joined alike."""
    if exclusions:
        lines = [f"\0{exclusions}", *lines]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]
