"""Where pictures lie: names, and the walk over folders, one listing a folder. Standard library only.

Links are followed, and a folder that was met before, by whatever name, is not entered again. A walk over folders that
are known by their digest keeps nothing but that: doing nothing over 100,000 files costs their stats and little more.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qvsplit.errors import UsageError

# What a walk takes for a picture, by the end of its name. A file named on the command line is tried whatever its name.
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".mpo",
})  # fmt: skip
SHARD_NAME = re.compile(r"shard-(\d{6,})\.parquet")  # what marks a folder as an album

_BYTES_BEYOND_UTF8 = re.compile(r"[\udc80-\udcff]")
_ESCAPED_BYTE = re.compile(r"//x([0-9a-f]{2})")
_UNKNOWN = "-1\0-1"  # in place of size and mtime: a dangling link, or gone since. Reading it will say what is wrong


@dataclass(frozen=True, slots=True)
class Found:
    """One file of a walk. `root` and `path` as stored: see `stored_name`."""

    root: str
    path: str  # relative to root, POSIX separators
    size: int  # -1 where the walk could not tell
    mtime_ns: int

    @property
    def file(self) -> str:
        """The path to open, as the file system has it."""
        return file_on_disk(self.root, self.path)


@dataclass(frozen=True, slots=True)
class Listing:
    """The pictures of one folder as the walk saw them. `root` and `path`, that of the folder below it, as stored."""

    root: str
    path: str
    lines: tuple[str, ...]  # name, size and mtime_ns of each picture, sorted, with a NUL between them
    whole: bool  # False: only such files as were named one by one

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and modification times, in hex."""
        return _digest(self.lines)

    def found(self) -> Iterator[Found]:
        """Each picture, sorted by name."""
        prefix = self.path + "/" if self.path else ""
        for line in self.lines:
            name, size, mtime_ns = line.split("\0")
            yield Found(self.root, prefix + stored_name(name), int(size), storable(int(mtime_ns)))


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk saw: `known` folders, by nothing but their names, and the listings of all others."""

    known: list[tuple[str, str]]  # root and path, as stored
    listings: list[Listing]
    empty: list[str]  # those of the paths in which no picture was found, as the file system has them
    starts: list[str]  # where it began: every path, as the file system has it
    pictures: int  # found in all

    def covers(self, root: str, path: str) -> bool:
        """Whether the folder `path` below `root`, both as stored, is at or below a path in which there is something."""
        folder = file_on_disk(root, path).rstrip("/") or "/"
        return any(is_within(folder, start) for start in self.starts if start not in self.empty)


# ---------------------------------------------------------------------------------------------------------- names


def stored_name(name: str) -> str:
    """`name` as it goes into a row: bytes that are not UTF-8 (surrogates, in Python) become `//x` and two hex digits.

    Reversible, as no normalised path holds two slashes in a row.
    """
    return name if name.isascii() else _BYTES_BEYOND_UTF8.sub(lambda m: f"//x{ord(m[0]) - 0xDC00:02x}", name)


def name_on_disk(stored: str) -> str:
    """The inverse of `stored_name`."""
    return _ESCAPED_BYTE.sub(lambda m: chr(0xDC00 + int(m[1], 16)), stored) if "//x" in stored else stored


def file_on_disk(root: str, path: str) -> str:
    """Where `path` below `root` lies, both as stored."""
    return os.path.join(name_on_disk(root), name_on_disk(path))


def storable(mtime_ns: int) -> int:
    """A file's time as 64 bits hold it: some file systems keep times beyond."""
    return max(-(1 << 63), min(mtime_ns, (1 << 63) - 1))


def is_within(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or below it, by name alone; both absolute and normalised."""
    return path == folder or path.startswith(folder if folder.endswith("/") else folder + "/")


def open_anyhow(path: str, flags: int) -> int:
    """`os.open`, also where the path is longer than the system takes in one piece. OSError as from os.open."""
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


# ----------------------------------------------------------------------------------------------------------- walk


def walk(
    paths: Sequence[str | os.PathLike[str]],
    on_note: Callable[[str], None] = lambda line: None,
    *,
    out: str = "",
    roots: frozenset[str] = frozenset(),
    known: Mapping[tuple[str, str], str] | None = None,
) -> Walked:
    """Every picture under `paths`, each file and each folder once; folders and files sorted by name.

    Hidden files and folders and qvsplit's own albums are left out. `roots` are those that an album has already, as
    the file system has them: what lies within one is stored under it, so that a picture has one name however it was
    come by. Else a folder is the root of what is below it, and a single file's parent is that file's. Folders whose
    digest is `known` are only counted. UsageError for a path that is not there. `on_note` hears of folders that
    cannot be read, and of albums other than `out` that are left out.
    """
    starts = starts_of(paths)
    listings: list[Listing] = []
    walker = _Walker(on_note, out, roots, known or {})
    files, empty = [], []
    for start in starts:
        if not os.path.isdir(start):
            files.append(start)
            continue
        before, walker.met_again = walker.pictures, False
        listings += walker.below(start)
        if walker.pictures == before and not walker.met_again:
            empty.append(start)
    roots |= {start for start in starts if start not in files}
    single: dict[tuple[str, str], list[str]] = {}
    for file in dict.fromkeys(files):
        folder, name = os.path.split(file)
        root = root_of(folder, roots) or folder
        if not walker.has_seen(folder, name):
            single.setdefault((root, folder[len(root) :].strip("/")), []).append(_line(name, _stat(file)))
            walker.pictures += 1
    listings += [
        Listing(stored_name(root), stored_name(path), tuple(sorted(lines)), whole=False)
        for (root, path), lines in single.items()
    ]
    return Walked(walker.known, listings, empty, starts, walker.pictures)


def starts_of(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Each path as the file system has it; of a file, its folder's links are resolved, its own name is kept.

    UsageError for a missing one.
    """
    starts = []
    for path in [os.fspath(path) for path in paths]:
        if not os.path.exists(path):
            raise UsageError(f"no file or folder at {path}")
        if os.path.isdir(path):
            starts.append(os.path.realpath(path))
        else:
            folder, name = os.path.split(os.path.abspath(path))
            starts.append(os.path.join(os.path.realpath(folder), name))
    return starts


def root_of(folder: str, roots: frozenset[str]) -> str | None:
    """The deepest of `roots` that holds `folder`."""
    return max((root for root in roots if is_within(folder, root)), key=len, default=None)


class _Walker:
    """The folders entered so far, and what was seen in them."""

    def __init__(
        self,
        on_note: Callable[[str], None],
        out: str,
        roots: frozenset[str],
        known: Mapping[tuple[str, str], str],
    ) -> None:
        self.on_note = on_note
        self.out = out
        self.roots = roots
        self.digests = known
        self.met: set[tuple[int, int]] = set()
        self.met_again = False
        self.known: list[tuple[str, str]] = []
        self.pictures = 0

    def below(self, start: str) -> Iterator[Listing]:
        """Depth first with a stack of our own: folders may be nested deeper than Python recurses."""
        stack = [(start, root_of(start, self.roots) or start)]
        while stack:
            folder, root = stack.pop()
            if folder in self.roots:
                root = folder
            try:
                at = open_anyhow(folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                self.on_note(f"{folder} cannot be read ({error.strerror}): its pictures are left as they are")
                continue
            try:
                own = os.fstat(at)
                if (own.st_dev, own.st_ino) in self.met:
                    self.met_again = True
                    continue
                self.met.add((own.st_dev, own.st_ino))
                folders, lines = _entries(at)
            except OSError as error:
                self.on_note(f"{folder} cannot be read ({error.strerror}): its pictures are left as they are")
                continue
            finally:
                os.close(at)
            if folders is None:
                if folder != self.out:
                    self.on_note(f"{folder} is an album: it is left out")
                continue
            stack += [(os.path.join(folder, name), root) for name in sorted(folders, reverse=True)]
            path = folder[len(root) :].strip("/")
            yield from self._listing(root, path, tuple(sorted(lines)))

    def _listing(self, root: str, path: str, lines: tuple[str, ...]) -> Iterator[Listing]:
        self.pictures += len(lines)
        stored = stored_name(root), stored_name(path)
        if self.digests.get(stored) == _digest(lines):
            self.known.append(stored)
        else:
            yield Listing(*stored, lines, whole=True)

    def has_seen(self, folder: str, name: str) -> bool:
        """Whether the picture `name` was among those of `folder` when that was walked."""
        try:
            own = os.stat(folder)
        except OSError:
            return False
        taken = not name.startswith(".") and name[name.rfind(".") :].lower() in SUFFIXES
        return taken and (own.st_dev, own.st_ino) in self.met


def _entries(at: int) -> tuple[list[str] | None, list[str]]:
    """The names of the folders in the folder open as `at`, None where it is an album, and a line for each picture."""
    folders: list[str] = []
    lines: list[str] = []
    with os.scandir(at) as scan:
        for entry in scan:
            name = entry.name
            if name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(name)
                    continue
            except OSError:  # a link that leads to itself counts by its name
                pass
            if name[name.rfind(".") :].lower() in SUFFIXES:
                try:
                    status = entry.stat()
                    lines.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
                except OSError:
                    lines.append(f"{name}\0{_UNKNOWN}")
            elif name.startswith("shard-") and SHARD_NAME.fullmatch(name):
                return None, []
    return folders, lines


def _stat(file: str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None


def _line(name: str, status: os.stat_result | None) -> str:
    return f"{name}\0{_UNKNOWN}" if status is None else f"{name}\0{status.st_size}\0{status.st_mtime_ns}"


def _digest(lines: Sequence[str]) -> str:
    """A name holds no NUL, a number no newline: no two listings are joined alike."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]
