"""A fake of what the store knows, and rows by a few words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qvsplit.store.row import Row, is_whole, item_row, placeholder_json


def digest(text: str) -> str:
    """A content hash."""
    return hashlib.sha256(text.encode()).hexdigest()


def ok_row(path: str, *, content: str | None = None, root: str = "/photos", **more) -> Row:
    """A row of an image that was encoded; its content is its path's unless another is given."""
    given = {
        "size": 1, "version": "1", "mtime_ns": 1, "status": "ok", "generation": 1, "width": 28, "height": 28,
        "sha256": digest(content or path), "grid_thw": (1, 2, 2), "n_tokens": 1, "has_features": True,
        "placeholder": placeholder_json([("<|image_pad|>", 1)]), "inputs": "{}",
    }  # fmt: skip
    return Row(root=root, path=path, **given | more)


def clip_rows(path: str, parts: int, **more) -> list[Row]:
    """The rows of a video that was cut into so many parts of a second each."""
    return [
        ok_row(path, **{"kind": "video", "part": part, "start": float(part), "end": part + 1.0,
                        "duration": float(parts)} | more)
        for part in range(parts)
    ]  # fmt: skip


def failed_row(path: str, kind: str = "content", **more) -> Row:
    """A row of an image that failed."""
    given = {"root": "/photos", "sha256": digest(path), "size": 1, "version": "1", "mtime_ns": 1, "generation": 1}
    return Row(path=path, **given | {"status": "failed", "error": "is bad", "error_kind": kind} | more)


class FakeCatalogue:
    """Rows, the current ones; features of a content are there where a row says so."""

    def __init__(self, rows: Sequence[Row] = ()):
        self.rows = list(rows)

    def current(self, root, path):
        rows = self.rows_of(root, path)
        return item_row(rows) if rows else None

    def rows_of(self, root, path):
        return sorted((row for row in self.rows if row.key == (root, path)), key=lambda row: row.part)

    def rows_in(self, wanted):
        return [row for row in self.rows if wanted(row.folder)]

    def folder_rows(self, folder):
        keys = dict.fromkeys(row.key for row in self.rows if row.folder == folder)
        return {key: (row, self.holds(row.content)) for key in keys if (row := self.current(*key))}

    def holds(self, content):
        return content is not None and bool(self.home_rows(content[0]))

    def home(self, content):
        return next((row for row in self.rows if row.has_features and row.content == content), None)

    def home_rows(self, sha256):
        homes = {row.part: row for row in self.rows if row.has_features and row.sha256 == sha256}
        rows = [homes[part] for part in sorted(homes)]
        return rows if is_whole(rows) else []
