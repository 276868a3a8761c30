"""How rows are named and counted where people and programs read of them: with the part of a video. Rows only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qvsplit.output.text import counted_items
from qvsplit.runtime.names import file_on_disk, is_within, utf8_text

if TYPE_CHECKING:
    from qvsplit.store.row import Row

_TIME_SPAN = re.compile(r" \([0-9:.]+ to [0-9:.]+\)$")


def timestamp(seconds: float) -> str:
    """Give seconds of a video as `0:10`, `1:02:05` or, where they are not whole, `0:07.5`."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    shown = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{hours}:{minutes:02d}:{shown}" if hours else f"{minutes}:{shown}"


def time_span(row: Row) -> str:
    """Give the seconds of a part, `0:10 to 0:20`; nothing for an image or a whole video."""
    if row.start is None or row.end is None:
        return ""
    return f"{timestamp(row.start)} to {timestamp(row.end)}"


def shown_name(row: Row, *, with_root: bool = False) -> str:
    """Give the name of a row for people: its path, and which part of a video: `a.mp4#1 (0:10 to 0:20)`.

    What it gives, `answering.selection.select` takes.
    """
    name = f"{row.root}/{row.name}" if with_root else row.name
    span = time_span(row)
    return f"{name} ({span})" if span else name


def without_time_span(name: str) -> str:
    """Give a name that `shown_name` gave without the seconds."""
    return _TIME_SPAN.sub("", name)


def file_of(row: Row, *, absolute: bool = False) -> str:
    """Give the path by which the file of a row opens from here: relative below the current folder, else absolute.

    Its bytes as UTF-8 reads them, whatever the locale: a byte that is not UTF-8 is a surrogate. Features at hand have
    no file: then their name.
    """
    if not row.root:
        return row.path
    file = file_on_disk(row.root, row.path)
    return utf8_text(file if absolute else from_here(file))


def from_here(file: str) -> str:
    """Give an absolute file by a path that opens from here: relative below the current folder, else absolute."""
    try:
        here = os.getcwd()
    except OSError:  # the current folder has been removed: from there nothing opens but by its whole path
        return file
    if here == "/" or not is_within(file, here):
        return file
    relative = file[len(here) + 1 :]
    return f"./{relative}" if relative.startswith("-") else relative  # no command may take it for an option


def names_of(rows: Sequence[Row], *, absolute: bool = False) -> dict[str, Any]:
    """Name the items of one prompt for programs: `file`, `path` and `root`; where there are several, lists of these.

    The lists are `files`, `paths` and `roots`. Where any of the items is a video there are also `kind`, `part`, `start`
    and `end`, or `kinds`, `parts`, `starts` and `ends`.
    """
    files = [file_of(row, absolute=absolute) for row in rows]
    fields = ["path", "root"]
    if any(row.kind == "video" for row in rows):
        fields += ["kind", "part", "start", "end"]
    if len(rows) == 1:
        return {"file": files[0]} | {name: getattr(rows[0], name) for name in fields}
    return {"files": files} | {f"{name}s": [getattr(row, name) for row in rows] for name in fields}


def count_rows(rows: Iterable[Row]) -> str:
    """Give `3 images`, `2 videos`, `12 clips of 1 video`, or `3 images and 2 videos`."""
    images, clips, videos = 0, 0, set()
    for row in rows:
        images += row.kind != "video"
        clips += row.kind == "video"
        if row.kind == "video":
            videos.add(row.key)
    return counted_items(images, len(videos), clips)
