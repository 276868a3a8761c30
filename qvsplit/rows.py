"""The rows of an album's finished shards, side by side in one file: opening the album then opens no shard.

A cache and no more: a shard's rows count only as long as it has the seal that it had when they were read, and without
the file they are read from the shards. Standard library only: JSON is read faster than as many Parquet files are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from qvsplit.errors import QvsplitError
from qvsplit.recipe import Made, Recipe
from qvsplit.store import Row, Shard, Told, leave, left, read_seal

ROWS_FILE = ".qvsplit-rows.json"
_VERSION = 1
_NAMES = [field.name for field in fields(Row)]
_HASH = _NAMES.index("sha256")


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """These shards, each with its rows from its folder's file where that still knows it."""
    known = {folder: _read(folder) for folder in {path.parent for path in paths}}
    alike = _Alike()
    return [_open(path, known[path.parent], alike) for path in paths]


def leave_rows(folder: Path, shards: Sequence[Path]) -> None:
    """Bring the file in `folder` up to date with its `shards`; only those it does not know are opened."""
    before = _read(folder)
    lines = []
    with suppress(OSError, ValueError, QvsplitError):  # what is wrong with a shard is for whoever reads it to say
        for path in shards:
            name = _name(path, read_seal(path))
            lines.append(name + b"\t" + (before.get(name) or _line(Shard(path))))
        leave(folder / ROWS_FILE, b"\n".join(lines))


def _name(path: Path, seal: bytes) -> bytes:
    """What heads a shard's line."""
    return f"{path.name} {seal.hex()} {_VERSION}".encode()


def _line(shard: Shard) -> bytes:
    columns: list[Any] = [[getattr(row, name) for row in shard.rows] for name in _NAMES]
    columns[_HASH] = [None if value is None else value.hex() for value in columns[_HASH]]
    return json.dumps(
        {
            "recipe": shard.recipe.to_json(),
            "made": shard.made.to_json(),
            "hidden_size": shard.hidden_size,
            "columns": columns,
        },
        sort_keys=True,
    ).encode()


def _read(folder: Path) -> Mapping[bytes, bytes]:
    """Each shard's line, by what heads it."""
    payload = left(folder / ROWS_FILE)
    if payload is None:
        return {}
    parts = (line.partition(b"\t") for line in payload.split(b"\n"))
    return {name: line for name, _, line in parts}


class _Alike:
    """The recipe and origin that most shards share, made from JSON once."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any, Recipe, Made] | None = None

    def get(self, recipe: Any, made: Any, where: str) -> tuple[Recipe, Made]:
        if self._last is None or self._last[:2] != (recipe, made):
            self._last = (recipe, made, Recipe.from_json(recipe, where), Made.from_json(made))
        return self._last[2:]


def _open(path: Path, known: Mapping[bytes, bytes], alike: _Alike) -> Shard:
    if known:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, QvsplitError):
            seal = read_seal(path)
            line = known.get(_name(path, seal))
            if line is not None:
                return Shard(path, _told(seal, json.loads(line), str(path), alike))
    return Shard(path)


def _told(seal: bytes, content: Mapping[str, Any], where: str, alike: _Alike) -> Told:
    columns = list(content["columns"])
    columns[_HASH] = [None if value is None else bytes.fromhex(value) for value in columns[_HASH]]
    if len({len(column) for column in columns}) != 1 or len(columns) != len(_NAMES):
        raise ValueError("columns of unequal length")
    recipe, made = alike.get(content["recipe"], content["made"], where)
    return Told(
        seal=seal,
        recipe=recipe,
        made=made,
        hidden_size=int(content["hidden_size"]),
        columns=columns,
    )
