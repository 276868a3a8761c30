"""Find rows by what a user typed or pasted: a name, a path or a glob. Names are the files', however they are written.

A name matches in either form of Unicode: file systems and keyboards differ in how they write ü. What a command printed
may be pasted, with its escapes. A name that is there is meant, also where it would be a glob: `[2024] a.jpg`.

A part of a video has the number of the part behind its name: `clip.mp4#2`. A file of that very name is meant first. In
a glob what stands behind the last # is one of its own, of numbers: `*.mp4#0`, `clip.mp4#[3-5]`, `*#*`.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Callable

from qvsplit.runtime.names import name_on_disk, stored_name, typed_name
from qvsplit.store.catalogue import Catalogue
from qvsplit.store.row import PART_MARK, Row

Matches = Callable[[str, str], bool]  # of a root and a path, both as stored


def named(catalogue: Catalogue, name: str) -> list[Row]:
    """Give the current rows of this name: a path below a root, else a whole path, else a file's name. Sorted.

    Of a video in several parts all of them, or the one whose number is behind the name.
    """
    if rows := _of_file(catalogue, name):
        return rows
    file, mark, number = name.rpartition(PART_MARK)
    return [row for row in _of_file(catalogue, file) if row.is_part and str(row.part) == number] if mark else []


def matching(catalogue: Catalogue, pattern: str) -> list[Row]:
    """Give the current rows that `pattern` names, else those that it matches as a glob, by path or by file name."""
    rows = named(catalogue, pattern)
    if rows or not any(character in pattern for character in "*?["):
        return rows
    found = {(row.key, row.part): row for row in _of_glob(catalogue, pattern)}
    file, mark, numbers = pattern.rpartition(PART_MARK)
    if mark:
        parts = (row for row in _of_file(catalogue, file) or _of_glob(catalogue, file) if row.is_part)
        found |= {(row.key, row.part): row for row in parts if fnmatch.fnmatchcase(str(row.part), numbers)}
    return [found[key] for key in sorted(found)]


def _of_file(catalogue: Catalogue, name: str) -> list[Row]:
    """Give the current rows of the files of this name, with all their parts."""
    for form in _forms(name):  # looked up; all others have to be looked for
        rows = [row for root in sorted(catalogue.roots) for row in catalogue.rows_of(root, form)]
        if rows:
            return rows
    forms = set(map(_on_disk, _forms(name)))
    for is_match in (_has_path(forms), _has_whole_path(forms), _has_file_name(forms)):
        if rows := catalogue.rows_named(is_match):
            return rows
    return []


def _of_glob(catalogue: Catalogue, pattern: str) -> list[Row]:
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
