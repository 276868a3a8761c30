"""What a walk leaves out: folders that no album means, what the user excludes, and what ignore files do.

Patterns are gitignore's (https://git-scm.com/docs/gitignore), each with the folder that it is relative to: those of a
call with the path that was given, those of an ignore file with the folder it lies in. Of two that match one name, the
last of the call counts first, then the last of the nearest ignore file, then of those above it, then the default. What
a user names by itself is never left out.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from qvsplit.errors import UsageError, escaped
from qvsplit.runtime.names import is_within, utf8_text
from qvsplit.sources.files import open_long_path

IGNORE_FILE = ".qvsplitignore"
MAX_BYTES = 1 << 20  # of an ignore file
# Folders of thumbnails, bins, snapshots and remains, by whoever makes them; upper and lower case are not told apart.
# What begins with a dot, as .Trash-1000, .thumbnails, .@__thumb and .AppleDouble do, no walk enters anyway.
FOLDERS_LEFT_OUT = (
    "@eaDir", "#recycle", "#snapshot", "@tmp", "@sharebin",  # Synology
    "@Recycle", "@Recently-Snapshot", "@__thumb",  # QNAP
    "$RECYCLE.BIN", "RECYCLER", "System Volume Information",  # Windows
    "~snapshot",  # NetApp
    "lost+found",  # ext4
    "Network Trash Folder", "Temporary Items", "__MACOSX",  # macOS, on shares and in archives
)  # fmt: skip
_LEFT_OUT = frozenset(name.casefold() for name in FOLDERS_LEFT_OUT)
_REMAINS = re.compile(r"found\.\d{3}", re.IGNORECASE)  # of chkdsk
_CLASS = re.compile(r"(?P<not>[!^]?)(?P<members>\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*)\]", re.DOTALL)
_MEMBER = re.compile(r"\[:[a-z]+:\]|(?:\\.|[^\\])(?:-(?:\\.|[^\\]))?", re.DOTALL)
_POSIX = {
    "[:alpha:]": "a-zA-Z", "[:digit:]": "0-9", "[:alnum:]": "a-zA-Z0-9", "[:upper:]": "A-Z", "[:lower:]": "a-z",
    "[:xdigit:]": "0-9a-fA-F", "[:space:]": r"\s", "[:blank:]": r" \t", "[:punct:]": r"!-/:-@\[-`{-~",
}  # fmt: skip


class PatternError(ValueError):
    """A pattern that is none, or an ignore file that cannot be used."""


@dataclass(frozen=True)
class Pattern:
    """One pattern.

    Attributes:
        expression: Matches the whole path below the folder that it is relative to.
        includes: Whether it takes back what earlier ones exclude.
        is_folder: Whether it matches folders alone.
    """

    expression: re.Pattern[str]
    includes: bool
    is_folder: bool


@dataclass(frozen=True)
class Rules:
    """Patterns, and the folder that they are relative to.

    Attributes:
        patterns: Of two that match, the later counts.
        folder: As the file system has it.
        identity: What changes with these patterns and with those of `above`.
        above: The rules that count where these say nothing.
    """

    patterns: tuple[Pattern, ...]
    folder: str
    identity: str
    above: Rules | None

    def excludes(self, file: str, *, is_folder: bool) -> bool | None:
        """Say whether a file or folder is excluded, given that no folder above it is; None where no pattern says."""
        rules: Rules | None = self
        while rules is not None:
            below = _text(file[len(rules.folder) :].lstrip("/"))
            for pattern in reversed(rules.patterns):
                if (is_folder or not pattern.is_folder) and pattern.expression.fullmatch(below):
                    return not pattern.includes
            rules = rules.above
        return None


@dataclass(frozen=True)
class State:
    """What holds in one folder: the patterns of the call, and those of ignore files."""

    call: Rules | None
    files: Rules | None
    is_excluded: bool = False

    @property
    def identity(self) -> str:
        """What changes with any pattern that holds here; empty where none does."""
        return "".join(rules.identity for rules in (self.call, self.files) if rules is not None)

    @property
    def has_patterns(self) -> bool:
        return self.call is not None or self.files is not None

    def entered(self, folder: str, at: int | None = None) -> State:
        """Take up the ignore file of a folder, which may be open as `at`. PatternError or OSError if it cannot be."""
        return State(self.call, with_ignore_file(self.files, folder, at))

    def excludes(self, file: str, *, is_folder: bool) -> bool:
        """Say whether a file or folder in a folder in which this holds is excluded."""
        for rules in (self.call, self.files):
            if rules is not None and (said := rules.excludes(file, is_folder=is_folder)) is not None:
                return said
        return is_folder and is_left_out_by_default(os.path.basename(file))


class Exclusions:
    """What is left out of walks that begin at `starts`.

    Args:
        starts: As the file system has them.
        patterns: Of the call, relative to each of them.

    Raises:
        UsageError: A pattern is none, or an ignore file above a start cannot be used.
    """

    def __init__(self, starts: Sequence[str], patterns: Sequence[str] = ()) -> None:
        self._starts = starts
        self._patterns = [f"\\{one}" if one.startswith("#") else one for one in patterns]  # a name, no remark
        self._known: dict[tuple[str, str], State] = {}  # start and folder → what holds in the folder
        for pattern in self._patterns:
            try:
                if not pattern.strip() or not _parsed([pattern]):
                    raise PatternError("an empty pattern matches nothing")
            except PatternError as error:
                raise UsageError(f"`exclude` {pattern}: {error}") from None
        self._above = {start: self._rules_above(start) for start in dict.fromkeys(starts) if os.path.isdir(start)}

    def at(self, start: str) -> State:
        """Give what holds where a walk begins, but for an ignore file in that folder itself."""
        return self._above[start]

    def _rules_above(self, start: str) -> State:
        """Take up the ignore files of the folders above, but for those that would exclude the start itself."""
        rules: Rules | None = None
        folder = os.path.dirname(start)
        above = [folder]
        while folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
            above.append(folder)
        for folder in reversed(above if start != "/" else []):
            try:
                own = with_ignore_file(rules, folder)
            except (PatternError, OSError) as error:
                raise UsageError(f"{escaped(os.path.join(folder, IGNORE_FILE))}: {_reason(error)}") from None
            if own is not rules and not _excludes_one_of_the_way(own, start):
                rules = own
        return State(_joined(None, start, self._patterns), rules)

    def exclude(self, file: str) -> bool:
        """Say whether a stored file that no walk has listed is left out by them all, and was not named by itself."""
        return file not in self._starts and self.are_in_the_way_of(file)

    def are_in_the_way_of(self, file: str) -> bool:
        """Say whether all walks that would come to a file leave it out."""
        starts = [start for start in self._above if is_within(file, start)]
        return bool(starts) and all(self._excluded_from(start, file) for start in starts)

    def _excluded_from(self, start: str, file: str) -> bool:
        folder = os.path.dirname(file)
        way, at = [], folder
        while (start, at) not in self._known and at != start:
            way.append(at)
            at = os.path.dirname(at)
        state = self._known.get((start, at))
        if state is None:
            state = self._known[start, at] = self._entered(self.at(start), start)
        for at in reversed(way):
            if not state.is_excluded:
                gone = state.excludes(at, is_folder=True)
                state = State(None, None, is_excluded=True) if gone else self._entered(state, at)
            self._known[start, at] = state
        return state.is_excluded or state.excludes(file, is_folder=False)

    @staticmethod
    def _entered(state: State, folder: str) -> State:
        try:
            return state.entered(folder)
        except (PatternError, OSError):
            return State(None, None, is_excluded=True)  # the walk says so, and leaves what is in it as it is


def is_left_out_by_default(name: str) -> bool:
    """Say whether a folder of this name is none that an album means."""
    return name.casefold() in _LEFT_OUT or (name[:1] in "fF" and _REMAINS.fullmatch(name) is not None)


def with_ignore_file(above: Rules | None, folder: str, at: int | None = None) -> Rules | None:
    """Give the rules that hold in a folder, where `above` do in the one above it.

    Raises:
        PatternError: Its ignore file has a pattern that is none, or is no such file.
        OSError: It cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        if at is None:
            descriptor = open_long_path(os.path.join(folder, IGNORE_FILE), flags)
        else:
            descriptor = os.open(IGNORE_FILE, flags, dir_fd=at)
    except (FileNotFoundError, NotADirectoryError):
        return above
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PatternError("is no file")
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PatternError(f"is longer than {MAX_BYTES:,} bytes")
    text = content.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")
    return _joined(above, folder, [_without_blanks(line) for line in text.split("\n")])


def _joined(above: Rules | None, folder: str, lines: Sequence[str]) -> Rules | None:
    patterns = _parsed(lines)
    if not patterns:
        return above
    told = "\n".join((above.identity if above else "", folder, *lines))
    return Rules(patterns, folder, sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:32], above)


def _parsed(lines: Iterable[str]) -> tuple[Pattern, ...]:
    """Give the patterns of these lines; blank ones and remarks are none. PatternError for what is neither."""
    return tuple(_pattern(line) for line in map(_text, lines) if line and not line.startswith("#"))


def _pattern(line: str) -> Pattern:
    includes = line.startswith("!")
    glob = line[includes:]
    is_folder, glob = glob.endswith("/"), glob.removesuffix("/")
    if not glob:
        raise PatternError(f"{escaped(line)} matches nothing, as gitignore reads it")
    try:
        return Pattern(re.compile(_expression(glob), re.DOTALL), includes, is_folder)
    except (re.error, ValueError):
        raise PatternError(f"{escaped(line)} is no pattern as gitignore has them") from None


def _expression(glob: str) -> str:
    """Give the expression that matches whole paths as `glob` does. ValueError where it is none.

    Of all `**` but the last each takes as few folders as it can, for good: what follows it up to the next has a fixed
    number of folders, so that more would find no other match. Tried without end, they would take for ever.
    """
    runs: list[list[str]] = [[]]  # the names between one `**` and the next
    for folder in glob.removeprefix("/").split("/"):
        if folder != "**":
            runs[-1].append(_of_name(folder))
        elif runs[-1] or len(runs) == 1:  # several in a row are one
            runs.append([])
    if "/" not in glob and len(runs) == 1:
        runs.insert(0, [])
    first, *others = runs
    if not others:
        return "/".join(first)
    *between, last = others
    found = "".join(f"{name}/" for name in first)
    found += "".join(f"(?>(?:[^/]+/)*?{'/'.join(run)}/)" for run in between)
    return found + ("(?:.*/)?" + "/".join(last) if last else ".+")


def _of_name(glob: str) -> str:
    """Give the expression of a name. Of all `*` but the last each takes as little as it can, for good: see above."""
    runs, place = [""], 0  # between one `*` and the next
    while place < len(glob):
        character = glob[place]
        place += 1
        if character == "*":
            if runs[-1] or len(runs) == 1:
                runs.append("")
        elif character == "?":
            runs[-1] += "[^/]"
        elif character == "[":
            expression, place = _of_class(glob, place)
            runs[-1] += expression
        else:
            if character == "\\":
                character, place = glob[place : place + 1], place + 1
                if not character:
                    raise ValueError("nothing is behind the last backslash")
            runs[-1] += re.escape(character)
    first, *others = runs
    if not others:
        return first
    *between, last = others
    return first + "".join(f"(?>[^/]*?{run})" for run in between) + "[^/]*" + last


def _of_class(glob: str, place: int) -> tuple[str, int]:
    """Give the expression of a class that begins before `place`, and the place behind it. ValueError: it has no end."""
    match = _CLASS.match(glob, place)
    if match is None:
        raise ValueError("a bracket is not closed")
    members = "".join(_POSIX.get(one) or _member(one) for one in _MEMBER.findall(match["members"]))
    return f"(?!/)[{'^' * bool(match['not'])}{members}]", match.end()


def _member(one: str) -> str:
    """Give a character, or the range between two, as it stands in a class of an expression."""
    first, *last = re.findall(r"\\.|[^\\]", one, re.DOTALL)
    ends = [first, last[-1]] if len(last) > 1 else [first]
    return "-".join(re.escape(end[-1]) for end in ends)


def _without_blanks(line: str) -> str:
    """Take away blanks at the end, but for one that a backslash keeps."""
    kept = line.rstrip(" ")
    behind = len(kept) - len(kept.rstrip("\\"))
    return kept + " " if behind % 2 and kept != line else kept


def _excludes_one_of_the_way(rules: Rules | None, start: str) -> bool:
    """Say whether the nearest of `rules` excludes `start`, or a folder between the two."""
    assert rules is not None
    own = Rules(rules.patterns, rules.folder, "", None)
    place = start
    while place != rules.folder:
        if own.excludes(place, is_folder=True):
            return True
        place = os.path.dirname(place)
    return False


def _reason(error: Exception) -> str:
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def _text(name: str) -> str:
    """Give a name, or a pattern, in one form of Unicode: keyboards and file systems differ in how they write ü."""
    return name if name.isascii() else unicodedata.normalize("NFC", utf8_text(name))
