"""CSV that has been through a spreadsheet, and CSV that is safe in one. Standard library only.

Excel saves CSV with a mark of its encoding at the beginning and, where the comma is for decimals, with another mark
between the cells; both are read. A cell that a spreadsheet would take for a formula gets an apostrophe before it, as
OWASP advises against CSV injection; so does one that begins with apostrophes and then like a formula, so that reading
it again gives every text back as it was.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Collection, Iterator
from pathlib import Path

DELIMITERS = (",", ";", "\t")
# What a spreadsheet may take for the beginning of a formula: some also take what OWASP lists beside = + - @, the marks
# that they trim and the wide forms that they fold
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def as_cell(text: str) -> str:
    """Give a text as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Invert `as_cell`. A cell that a spreadsheet, or an earlier version, wrote without an apostrophe is its text."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_rows(file: Path, columns: Collection[str]) -> tuple[list[str], Iterator[dict[str, str]]]:
    """Open a CSV file, however a spreadsheet saved it.

    Args:
        file: It.
        columns: Some that it must have, by which is told what separates its cells.

    Returns:
        The names of its columns, none for an empty file, and its rows; those whose cells are all empty are left out.

    Raises:
        ValueError, csv.Error: It is no such file. This may come while its rows are read, too.
    """
    delimiter = next((one for one in DELIMITERS if set(columns) <= set(_names(file, one))), DELIMITERS[0])
    lines = _cells(file, delimiter)
    names = next(lines, [])
    return names, _rows(lines, names)


def _names(file: Path, delimiter: str) -> list[str]:
    try:
        return next(_cells(file, delimiter), [])
    except csv.Error:  # names in quotes that another delimiter follows
        return []


def _rows(lines: Iterator[list[str]], names: list[str]) -> Iterator[dict[str, str]]:
    for cells in lines:
        if len(cells) != len(names) and any(cells):
            raise ValueError(f"it has a line of {len(cells)} cells under {len(names)} names")
        if any(cells):
            yield dict(zip(names, cells, strict=True))


def _cells(file: Path, delimiter: str) -> Iterator[list[str]]:
    with file.open("rb") as stream:
        start = stream.read(3)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    with file.open(encoding=encoding, newline="") as text:
        yield from csv.reader(text, delimiter=delimiter, strict=True)


def number(cell: str) -> float:
    """Give a number that a spreadsheet may have written with a comma for decimals. ValueError for anything else."""
    return float(cell.replace(",", ".") if cell.count(",") == 1 and "." not in cell else cell)


def truth(cell: str) -> bool:
    """Give a truth value that a spreadsheet may have written in capitals. KeyError for anything else."""
    return {"true": True, "false": False}[cell.lower()]
