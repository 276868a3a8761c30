"""Find rows by what a user typed or pasted: a name, a path or a glob. Names are the files', however they are written.

A name matches in either form of Unicode: file systems and keyboards differ in how they write ü. What a command printed
may be pasted, with its escapes. A name that is there is meant, also where it would be a glob: `[2024] a.jpg`.

A part of a video has the number of the part behind its name: `clip.mp4#2`. A file of that very name is meant first. In
a glob what stands behind the last # is one of its own, of numbers: `*.mp4#0`, `clip.mp4#[3-5]`, `*#*`.

A glob that matches nothing is tried with its brackets taken as they are: `[2024]*` names what begins so. Of what names
nothing `hint` says what it may have meant.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qvsplit.errors import escaped, some_of
from qvsplit.runtime.names import absolute, is_within, name_on_disk, stored_name, typed_name
from qvsplit.store.catalogue import Catalogue
from qvsplit.store.row import PART_MARK, Row

Matches = Callable[[str, str], bool]  # of a root and a path, both as stored
_MOST_COMPARED = 20_000  # names that a mistyped one is held against; more take too long for a hint
_AS_ALIKE = 0.75  # of difflib's ratio: one letter in four may be wrong


class Named(Protocol):
    """Rows that can be found by their names: all of a `Catalogue`, or some at hand."""

    @property
    def roots(self) -> frozenset[str]:
        """Their roots, as stored."""

    def rows_of(self, root: str, path: str) -> list[Row]:
        """Give the rows of one item, by part."""

    def rows_named(self, wanted: Callable[[str, str], bool]) -> list[Row]:
        """Give the rows whose root and path are `wanted`, sorted by root, path and part."""


@dataclass(frozen=True)
class RowsAtHand:
    """Some rows, each an item of its own, that no catalogue has."""

    rows: Sequence[Row]

    @property
    def roots(self) -> frozenset[str]:
        """Their roots, as stored."""
        return frozenset(row.root for row in self.rows)

    def rows_of(self, root: str, path: str) -> list[Row]:
        """Give the rows of one item."""
        return [row for row in self.rows if row.key == (root, path)]

    def rows_named(self, wanted: Callable[[str, str], bool]) -> list[Row]:
        """Give the rows whose root and path are `wanted`, sorted."""
        return sorted((row for row in self.rows if wanted(*row.key)), key=lambda row: row.key)


def named(catalogue: Named, name: str) -> list[Row]:
    """Give the current rows of this name: a path below a root, else a whole path, else a file's name. Sorted.

    Of a video in several parts all of them, or the one whose number is behind the name.
    """
    if rows := _of_file(catalogue, name):
        return rows
    file, mark, number = name.rpartition(PART_MARK)
    return [row for row in _of_file(catalogue, file) if row.is_part and str(row.part) == number] if mark else []


def matching(catalogue: Named, pattern: str) -> list[Row]:
    """Give the current rows that `pattern` names, else those that it matches as a glob, by path or by file name."""
    rows = named(catalogue, pattern)
    if rows or not is_glob(pattern):
        return rows
    return _of_glob_with_parts(catalogue, pattern) or (
        _of_glob_with_parts(catalogue, pattern.replace("[", "[[]")) if "[" in pattern else []
    )


def below(catalogue: Catalogue, name: str, *, by_place: bool) -> list[Row]:
    """Give the current rows of the file or the folder of this name, and of all below it.

    What is written just as typed comes first, before what differs in the form of Unicode.

    Args:
        catalogue: Whose rows.
        name: As typed or pasted.
        by_place: Whether it is one on this machine, by which whole paths are held against it; else a path below a root.
    """
    forms = list(map(name_on_disk, _forms(name)))
    folders = {form.rstrip("/") for form in forms}
    if by_place:
        folders = {place for form in forms for place in (absolute(form), os.path.realpath(form))}
    for same in (name_on_disk, _on_disk):
        ours = {same(stored_name(folder)) for folder in folders}
        if rows := catalogue.rows_named(_is_below(ours, same, whole=by_place)):
            return rows
    return []


def _is_below(folders: set[str], same: Callable[[str], str], *, whole: bool) -> Matches:
    """Give what says whether an item is in one of `folders`, by its whole path or by that below its root."""

    def is_match(root: str, path: str) -> bool:
        file = f"{same(root).rstrip('/')}/{same(path)}" if whole else same(path)
        return any(is_within(file, folder) for folder in folders)

    return is_match


def hint(catalogue: Catalogue, pattern: str) -> str:
    """Say, behind a semicolon, what a name or glob may have meant that names nothing; "" where nothing is like it."""
    alike = _but_for_case(catalogue, pattern)
    if alike:
        are = "differs" if len(alike) == 1 else "differ"
        return f"; {some_of(alike, 3)} {are} in upper and lower case, or in the kind of blanks, alone"
    nearest = _nearest(catalogue, pattern)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def _but_for_case(catalogue: Catalogue, pattern: str) -> list[str]:
    """Give the names that match where case, and what kind a blank is, make no difference."""
    wanted = {_folded(form) for form in _forms(pattern)}
    patterns = {*wanted, *(one.replace("[", "[[]") for one in wanted)} if is_glob(pattern) else set()
    globs = [re.compile(fnmatch.translate(one)).match for one in patterns]

    def is_match(root: str, path: str) -> bool:
        file = _folded(path)
        names = (file, file.rpartition("/")[2], f"{_folded(root).rstrip('/')}/{file}")
        return not wanted.isdisjoint(names) or any(match(name) for match in globs for name in names)

    return _names_of(catalogue.rows_named(is_match))


def _nearest(catalogue: Catalogue, pattern: str) -> list[str]:
    """Give up to three names that are spelt like this one."""
    if is_glob(pattern) or sum(catalogue.counts_by_folder().values()) > _MOST_COMPARED:
        return []
    wanted = _folded(_forms(pattern)[-1])
    spelt: dict[str, set[str]] = {}  # as it is compared: a file's name, or its path where one was given → paths
    for row in catalogue.rows():
        name = _folded(row.path)
        spelt.setdefault(name if "/" in wanted else name.rpartition("/")[2], set()).update(_names_of([row]))
    close = difflib.get_close_matches(wanted, spelt, n=3, cutoff=_AS_ALIKE)
    return [path for name in close for path in sorted(spelt[name])][:3]


def _names_of(rows: Sequence[Row]) -> list[str]:
    """Give the paths of the items that are there, each once and as it can be pasted."""
    return list(dict.fromkeys(escaped(name_on_disk(row.path)) for row in rows if row.status != "deleted"))


def _folded(stored: str) -> str:
    return unicodedata.normalize("NFKC", _on_disk(stored)).casefold()


def is_glob(pattern: str) -> bool:
    """Say whether a name may be meant as a glob."""
    return any(character in pattern for character in "*?[")


def _of_glob_with_parts(catalogue: Named, pattern: str) -> list[Row]:
    """Give the current rows that the glob matches; what stands behind its last # may be one of numbers of parts."""
    found = {(row.key, row.part): row for row in _of_glob(catalogue, pattern)}
    file, mark, numbers = pattern.rpartition(PART_MARK)
    if mark:
        parts = (row for row in _of_file(catalogue, file) or _of_glob(catalogue, file) if row.is_part)
        found |= {(row.key, row.part): row for row in parts if fnmatch.fnmatchcase(str(row.part), numbers)}
    return [found[key] for key in sorted(found)]


def _of_file(catalogue: Named, name: str) -> list[Row]:
    """Give the current rows of the files of this name, with all their parts."""
    for form in _forms(name):  # looked up; all others have to be looked for
        rows = [row for root in sorted(catalogue.roots) for row in catalogue.rows_of(root, form)]
        if rows:
            return rows
    forms = set(map(_on_disk, _forms(name)))
    for is_match in (_has_path(forms), _has_whole_path(forms), _has_file_name(forms), _is_at(forms)):
        if rows := catalogue.rows_named(is_match):
            return rows
    return []


def _of_glob(catalogue: Named, pattern: str) -> list[Row]:
    """Give the current rows of the files whose path or name the glob matches, with all their parts."""
    matches = [re.compile(fnmatch.translate(_on_disk(form))).match for form in _forms(pattern)]

    def is_match(root: str, path: str) -> bool:
        file = _on_disk(path)
        names = (file, file.rpartition("/")[2], f"{_on_disk(root)}/{file}")
        return any(match(name) for match in matches for name in names)

    return catalogue.rows_named(is_match)


def _has_path(forms: set[str]) -> Matches:
    return lambda root, path: _on_disk(path) in forms


def _has_whole_path(forms: set[str]) -> Matches:
    whole = {form for form in forms if form.startswith("/")}
    return lambda root, path: bool(whole) and f"{_on_disk(root).rstrip('/')}/{_on_disk(path)}" in whole


def _is_at(forms: set[str]) -> Matches:
    """Match the file that is there from where the command runs, as paths are printed for programs."""
    return _has_whole_path({_normal(place(form)) for form in forms for place in (absolute, os.path.realpath)})


def _has_file_name(forms: set[str]) -> Matches:
    return lambda root, path: _on_disk(path).rpartition("/")[2] in forms


def _forms(name: str) -> list[str]:
    """Give what may be meant, as stored: the name as it is, and with what looks like an escape taken for one."""
    return list(dict.fromkeys((stored_name(name), typed_name(name))))


def _on_disk(stored: str) -> str:
    """Give a stored name as the file system has it, but for the form of Unicode."""
    return stored if stored.isascii() and "//x" not in stored else _normal(name_on_disk(stored))


def _normal(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)
