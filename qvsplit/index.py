"""What a run left behind, so that the next one need not read the shards: folders in which there is nothing to do.

A cache and no more: it counts only as long as the album's shards are, by the checksums of their footers, the very ones
it was made from, and without it everything is found out from the shards. Standard library only, as a run with nothing
to do should cost little more than the walk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsplit.folders import Walked, name_on_disk
from qvsplit.recipe import Made, Recipe
from qvsplit.store import leave, left, read_seal

INDEX_FILE = ".qvsplit-index.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Tally:
    """One folder's pictures when nothing is left to do there. `digest` is its listing's, empty where it has none."""

    digest: str
    ok: int
    failed: int
    missing: int  # rows whose file is no longer there, not marked gone


NOWHERE = Tally("", 0, 0, 0)


@dataclass(frozen=True)
class Index:
    """`folders` by root and path, both as stored; `recipe` and `made` are the album's."""

    recipe: Recipe
    made: Made
    folders: Mapping[tuple[str, str], Tally]
    roots: frozenset[str]  # of all rows, as stored

    @property
    def roots_on_disk(self) -> frozenset[str]:
        """The album's roots, as the file system has them."""
        return frozenset(map(name_on_disk, self.roots))


def nothing_to_do(index: Index, walked: Walked, *, prune: bool) -> Tally | None:
    """The sum of all folders walked, if the walk saw just what it saw when nothing was left to do; else None."""
    if walked.empty or any(
        listing.lines or index.folders.get((listing.root, listing.path), NOWHERE).digest for listing in walked.listings
    ):
        return None
    known = set(walked.known)
    ok = failed = missing = 0
    for (root, path), tally in index.folders.items():
        if walked.covers(root, path):
            if (tally.digest and (root, path) not in known) or (tally.missing and prune):
                return None
            ok, failed, missing = ok + tally.ok, failed + tally.failed, missing + tally.missing
    return Tally("", ok, failed, missing)


def read_index(folder: Path, shards: list[Path]) -> Index | None:
    """The index of the album in `folder`; None where there is none, or it is not that of these `shards`."""
    try:
        payload = left(folder / INDEX_FILE)
        if payload is None:
            return None
        content = json.loads(payload)
        if content["version"] != _VERSION or content["shards"] != _seals(shards):
            return None
        return Index(
            recipe=Recipe.from_json(content["recipe"], str(folder)),
            made=Made.from_json(content["made"]),
            folders={
                (root, path): Tally(*tally)
                for root, below in content["folders"].items()
                for path, tally in below.items()
            },
            roots=frozenset(content["roots"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_index(folder: Path, shards: list[Path], index: Index) -> None:
    """Leave `index` for the next run. Where that cannot be done nothing is lost but time."""
    below: dict[str, dict[str, Any]] = {}
    for (root, path), tally in index.folders.items():
        below.setdefault(root, {})[path] = [tally.digest, tally.ok, tally.failed, tally.missing]
    with suppress(OSError, ValueError):
        content = {
            "version": _VERSION,
            "shards": _seals(shards),
            "recipe": index.recipe.to_json(),
            "made": index.made.to_json(),
            "roots": sorted(index.roots),
            "folders": below,
        }
        leave(folder / INDEX_FILE, json.dumps(content, sort_keys=True).encode())


def _seals(shards: list[Path]) -> list[list[str]]:
    """What names each shard's content; OSError or ValueError where one is not sound."""
    return [[shard.name, read_seal(shard).hex()] for shard in shards]
