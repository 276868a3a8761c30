"""Local folders as a source: the walk, one listing a folder. Standard library only.

A walk takes a file by its name alone, but for those that are named as TypeScript's are: those it takes if they begin as
MPEG transport streams do, so that a source tree is no list of failed videos. Links are followed, and a folder that was
met before, by whatever name, is not entered again. exclusions.py says what is left out. A walk over folders that are
known by their digest keeps nothing but their numbers: doing nothing over 100,000 files costs their stats and little
more.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from qvsplit.errors import UsageError, escaped
from qvsplit.runtime.names import absolute, file_on_disk, is_within, storable_mtime, stored_name
from qvsplit.sources.exclusions import IGNORE_FILE, Exclusions, PatternError, State
from qvsplit.sources.files import open_long_path
from qvsplit.sources.source import (
    UNKNOWN_LINE,
    UNREADABLE,
    Entry,
    Folder,
    Key,
    LeftOut,
    Listing,
    Presence,
    Scope,
    listing_digest,
    local_file,
)
from qvsplit.sources.videos import HEAD_BYTES, is_transport_stream

# What a walk takes for an image or a video, by the end of its name. A file named on the command line is tried whatever
# its name.
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".mpo",
})  # fmt: skip
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".flv", ".mpg",
    ".mpeg", ".vob", ".wmv", ".asf", ".ogv", ".mxf",
})  # fmt: skip
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
# What an album means as well and no reader here takes: it is counted
_OTHER_SUFFIXES = frozenset({
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mef",
    ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".ptx", ".raf", ".raw", ".rw2", ".rwl", ".rwz", ".sr2", ".srf",
    ".srw", ".x3f",  # as cameras write it
    ".jxl", ".jxr", ".hdp", ".wdp", ".bpg", ".flif", ".exr", ".hdr", ".dds", ".pcx", ".djvu", ".djv", ".heics",
    ".psd", ".psb", ".xcf", ".kra", ".ora", ".afphoto", ".svg", ".svgz", ".eps", ".ai", ".pdf", ".wmf", ".emf",
    ".braw", ".r3d", ".insv", ".lrv", ".dv", ".divx", ".f4v", ".m1v", ".m2v", ".mpe", ".mod", ".tod", ".ogm", ".rm",
    ".rmvb", ".wtv", ".mj2",
})  # fmt: skip
# Those of TypeScript, too. To look into such a file takes as long as a few stats; there are thousands in a source tree
# and few among videos, so that it costs nothing where there are none.
_TYPESCRIPT_SUFFIXES = frozenset({".ts", ".mts"})
# What the system says of everything on a disk that is not there any more
_DISK_GONE = frozenset({
    errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT,
})  # fmt: skip
STORE_FILE = re.compile(r"shard-\d{6,}\.parquet")  # what marks a folder as a store


class LocalFolders:
    """Folders and files of a local disk.

    Args:
        paths: What is walked. Hidden files and folders, and qvsplit's own stores, are left out.
        out: The store that is written, whose folder needs no note where it is left out.
        roots: Those that the store has already, as the file system has them: what lies within one is stored under it,
            so that an item has one name however it was come by. Else a folder is the root of what is below it, and a
            single file's parent is that file's.
        suffixes: The ends of the names, in lower case, of what is taken in a walk.
        exclude: Patterns of what is left out, as gitignore has them, relative to each folder of `paths`.
        on_note: Called with a line for each folder that cannot be read, and each other store that is left out.

    Raises:
        UsageError: A path does not exist, or a pattern is none.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        out: str = "",
        roots: frozenset[str] = frozenset(),
        suffixes: Set[str] = SUFFIXES,
        exclude: Sequence[str] = (),
        on_note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._starts = starts_of(paths)
        self._folders = [start for start in self._starts if os.path.isdir(start)]
        self._unreadable: dict[str, str] = {}
        self._out = out
        self._roots = roots
        self._suffixes = suffixes
        self._on_note = on_note
        self._exclusions = Exclusions(self._starts, exclude)
        self._empty: list[str] = []
        self._left_out = LeftOut()

    @property
    def scope(self) -> Scope:
        """What has been listed."""
        return Scope(tuple(self._starts), tuple(self._empty), self._left_out)

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The folders that could not be listed → why; valid once `list` has come to its end."""
        return self._unreadable

    def list(self, known_digests: Mapping[Folder, str]) -> Iterator[Listing]:
        """Walk; folders and files are sorted by name, each is met once."""
        walk = _Walk(self._roots, known_digests, self._out, self._suffixes, self._exclusions, self._on_note)
        self._empty, self._unreadable = [], walk.unreadable
        for start in self._folders:
            found, walk.met_again, excluded = 0, False, walk.excluded
            for listing in walk.below(start):
                found += listing.number
                yield listing
            if not found and not walk.met_again and walk.excluded == excluded:
                self._empty.append(start)
        yield from self._single_files(walk)
        self._left_out = walk.left_out()

    def _single_files(self, walk: _Walk) -> Iterator[Listing]:
        """List the files that were named one by one and that no walked folder has listed."""
        roots = self._roots | set(self._folders)
        single: dict[Folder, list[str]] = {}
        for file in dict.fromkeys(start for start in self._starts if start not in self._folders):
            folder, name = os.path.split(file)
            root = root_of(folder, roots) or folder
            if not walk.has_listed(folder, name):
                single.setdefault((root, folder[len(root) :].strip("/")), []).append(_line(name, file))
                walk.take(folder, name)
        for (root, path), lines in single.items():
            yield Listing(stored_name(root), stored_name(path), tuple(sorted(lines)), len(lines), complete=False)

    def stat(self, keys: Sequence[Key]) -> Mapping[Key, Presence]:
        """Look for stored items.

        One below a folder that is there and wholly empty is unknown, not absent. So is one below a folder that could
        not be listed, or that was given and exists no longer: its disk may have gone meanwhile.
        """
        gone = [start for start in self._folders if not os.path.isdir(start)] + [*self._unreadable]
        nearest: dict[str, str | None] = {}  # folder → the nearest one that exists, if that is empty
        found = {}
        for key in keys:
            file = file_on_disk(*key)
            found[key] = presence = presence_of(key)
            if presence.state == "present" and self._exclusions.exclude(file):
                found[key] = replace(presence, is_excluded=True)
            elif presence.state == "absent" and any(is_within(file, folder) for folder in gone):
                found[key] = Presence("unknown")
            elif presence.state == "absent":
                folder = os.path.dirname(file)
                if folder not in nearest:
                    nearest[folder] = _empty_folder_above(folder)
                if nearest[folder] is not None:
                    found[key] = Presence("unknown", empty_folder=nearest[folder])
        return found

    @staticmethod
    def fetch(entry: Entry) -> Path:
        """Give the file itself. A static method: stages that hold it are picklable."""
        return local_file(entry)


def starts_of(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Give each path as the file system has it; of a file, its folder's links are resolved, its own name is kept.

    Raises:
        UsageError: A path does not exist, or cannot be looked at.
    """
    starts = []
    for path in [os.fspath(path) for path in paths]:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise UsageError(f"no file or folder at {path}") from None
        except OSError as error:
            raise UsageError(
                f"{path} cannot be looked at ({error.strerror}); mount its disk again, or change its permissions"
            ) from None
        if os.path.isdir(path):
            starts.append(os.path.realpath(path))
        else:
            folder, name = os.path.split(absolute(path))
            starts.append(os.path.join(os.path.realpath(folder), name))
    return starts


def root_of(folder: str, roots: frozenset[str]) -> str | None:
    """Give the deepest of `roots` that holds `folder`."""
    return max((root for root in roots if is_within(folder, root)), key=len, default=None)


class _Walk:
    """The folders entered so far, and what was met in them."""

    def __init__(
        self,
        roots: frozenset[str],
        digests: Mapping[Folder, str],
        out: str,
        suffixes: Set[str],
        exclusions: Exclusions,
        on_note: Callable[[str], None],
    ) -> None:
        self.met_again = False
        self.unreadable: dict[str, str] = {}
        self.excluded: tuple[int, int] = (0, 0)  # files, and folders
        self._others: Counter[str] = Counter()  # suffix → files that nothing here reads
        self._other_suffixes = (_OTHER_SUFFIXES | SUFFIXES) - suffixes - _TYPESCRIPT_SUFFIXES
        self._exclusions = exclusions
        self._roots = roots
        self._digests = digests
        self._out = out
        self._suffixes = suffixes
        self._on_note = on_note
        self._met: set[tuple[int, int]] = set()

    def below(self, start: str) -> Iterator[Listing]:
        """Walk depth first with a stack of our own: folders may be nested deeper than Python recurses."""
        stack = [(start, root_of(start, self._roots) or start, self._exclusions.at(start))]
        while stack:
            folder, root, state = stack.pop()
            if folder in self._roots:
                root = folder
            content = self._content(folder, state)
            if content is None:
                continue
            folders, lines, state = content
            stack += [(os.path.join(folder, name), root, state) for name in sorted(folders, reverse=True)]
            path = stored_name(folder[len(root) :].strip("/"))
            yield self._listing(stored_name(root), path, tuple(sorted(lines)), state.identity)

    def _content(self, folder: str, state: State) -> tuple[list[str], list[str], State] | None:
        """Read a folder: the names of those in it, a line for each item, and what holds in it. None: it is left out."""
        try:
            at = open_long_path(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._note_unreadable(folder, error)
            return None
        try:
            own = os.fstat(at)
            if (own.st_dev, own.st_ino) in self._met:
                self.met_again = True
                return None
            self._met.add((own.st_dev, own.st_ino))
            found = _entries(at, self._suffixes, self._other_suffixes)
            if found is not None and found.has_ignore_file:
                state = state.entered(folder, at)
        except (OSError, PatternError) as error:
            self._note_unreadable(folder, error)
            return None
        finally:
            os.close(at)
        if found is None:
            if folder != self._out:
                self._on_note(f"{escaped(folder)} is a store: it is left out")
            return None
        return *self._kept(folder, found, state), state

    def _kept(self, folder: str, found: _Found, state: State) -> tuple[list[str], list[str]]:
        """Leave out what is excluded, and count it; count what nothing here reads."""
        folders = [name for name in found.folders if not state.excludes(f"{folder}/{name}", is_folder=True)]
        lines, others = found.lines, found.others
        if state.has_patterns:
            lines = [one for one in lines if not self._is_excluded(folder, one.partition("\0")[0], state)]
            others = [name for name in others if not self._is_excluded(folder, name, state)]
        files = self.excluded[0] + len(found.lines) - len(lines)
        self.excluded = files, self.excluded[1] + len(found.folders) - len(folders)
        self._others.update(map(_suffix, others))
        return folders, lines

    @staticmethod
    def _is_excluded(folder: str, name: str, state: State) -> bool:
        return state.excludes(f"{folder}/{name}", is_folder=False)

    def left_out(self) -> LeftOut:
        """Say what has been left out so far."""
        kinds = sorted(self._others.items(), key=lambda one: (-one[1], one[0]))
        return LeftOut({suffix: number for suffix, number in kinds if number > 0}, *self.excluded)

    def take(self, folder: str, name: str) -> None:
        """Count a file no more that was named by itself, if it was left out for its name."""
        if self._is_met(folder) and not name.startswith(".") and _suffix(name) in self._other_suffixes:
            self._others[_suffix(name)] -= not self._exclusions.are_in_the_way_of(os.path.join(folder, name))

    def _note_unreadable(self, folder: str, error: OSError | PatternError) -> None:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else f"its {IGNORE_FILE}: {error}"
        self.unreadable[folder] = why
        self._on_note(f"{escaped(folder)} cannot be read ({why}): its items are left as they are")

    def _listing(self, root: str, path: str, lines: tuple[str, ...], exclusions: str) -> Listing:
        if self._digests.get((root, path)) == listing_digest(lines, exclusions):
            return Listing(root, path, (), len(lines), known=True)
        return Listing(root, path, lines, len(lines), exclusions=exclusions)

    def _is_met(self, folder: str) -> bool:
        try:
            own = os.stat(folder)
        except OSError:
            return False
        return (own.st_dev, own.st_ino) in self._met

    def has_listed(self, folder: str, name: str) -> bool:
        """Say whether the file `name` was among those of `folder` when that was walked."""
        suffix, file = _suffix(name), os.path.join(folder, name)
        if name.startswith(".") or suffix not in self._suffixes or not self._is_met(folder):
            return False
        if self._exclusions.are_in_the_way_of(file):
            return False
        return suffix not in _TYPESCRIPT_SUFFIXES or _may_be_video(file)


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()


def _may_be_video(file: str, at: int | None = None) -> bool:
    """Tell whether a file begins as a transport stream does; so does one that cannot be read: reading will tell."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=at)
    except OSError:
        return True
    try:
        return is_transport_stream(os.read(descriptor, HEAD_BYTES))
    except OSError:
        return True
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is in one folder: names of folders, a line for each item, names of files that nothing here reads."""

    folders: list[str]
    lines: list[str]
    others: list[str]
    has_ignore_file: bool


def _entries(at: int, suffixes: Set[str], other_suffixes: Set[str]) -> _Found | None:
    """Read the folder open as `at`; None where it is a store."""
    folders: list[str] = []
    lines: list[str] = []
    others: list[str] = []
    has_ignore_file = False
    with os.scandir(at) as scan:
        for entry in scan:
            name = entry.name
            if name.startswith("."):
                has_ignore_file |= name == IGNORE_FILE
                continue
            try:
                if entry.is_dir():
                    folders.append(name)
                    continue
            except OSError:  # a link that leads to itself counts by its name
                pass
            if (suffix := _suffix(name)) in suffixes:
                try:
                    status = entry.stat()
                except OSError as error:
                    if error.errno in _DISK_GONE:
                        raise  # no item's fault
                    if _exists(name, at):
                        lines.append(f"{name}\0{UNKNOWN_LINE}")
                    continue
                if suffix in _TYPESCRIPT_SUFFIXES and stat.S_ISREG(status.st_mode) and not _may_be_video(name, at):
                    continue
                line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}"
                lines.append(line if _is_readable(status, name, at) else line + UNREADABLE)
            elif suffix in other_suffixes:
                others.append(name)
            elif name.startswith("shard-") and STORE_FILE.fullmatch(name):
                return None
    return _Found(folders, lines, others, has_ignore_file)


def presence_of(key: Key) -> Presence:
    """Look for the file of one item; one that merely cannot be looked at is not absent."""
    file = file_on_disk(*key)
    try:
        os.lstat(file)
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return Presence("unknown" if os.path.islink(file) else "absent")
    except OSError:
        return Presence("unknown")
    mtime_ns = storable_mtime(status.st_mtime_ns)
    return Presence("present", Entry(*key, status.st_size, str(mtime_ns), mtime_ns, _is_readable(status, file)))


def _empty_folder_above(folder: str) -> str | None:
    """Give the nearest folder above that exists, if it is empty."""
    while True:
        try:
            return None if os.listdir(folder) else folder
        except (FileNotFoundError, NotADirectoryError):
            folder = os.path.dirname(folder)
        except OSError:
            return None


def _line(name: str, file: str) -> str:
    try:
        status = os.stat(file)
    except OSError:
        return f"{name}\0{UNKNOWN_LINE}"
    line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}"
    return line if _is_readable(status, file) else line + UNREADABLE


def _exists(name: str, at: int) -> bool:
    """Say whether a name that could not be looked at is there: it may have been deleted since the folder was read."""
    try:
        os.lstat(name, dir_fd=at)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def _is_readable(status: os.stat_result, file: str, at: int | None = None) -> bool:
    """Say whether this process may read a file. The system is not asked where everybody may: most files are so."""
    if status.st_mode & 0o444 == 0o444:
        return True
    try:
        return os.access(file, os.R_OK, dir_fd=at, effective_ids=os.access in os.supports_effective_ids)
    except OSError:
        return True  # to read it will tell
