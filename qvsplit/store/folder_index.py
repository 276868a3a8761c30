"""Cache: what a run found in each folder, so that the next run need not read the shards where nothing has changed.

It counts only as long as the store's shards are, by the checksums of their footers, the very ones it was made from.
Standard library only, as a run with nothing to do should cost little more than the walk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qvsplit.errors import QvsplitError
from qvsplit.runtime.names import name_on_disk
from qvsplit.store import layout
from qvsplit.store.cache_file import read_cache, write_cache
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.row import Key
from qvsplit.store.shard_reader import read_checksum
from qvsplit.store.storage import Storage

_VERSION = 2


@dataclass(frozen=True, slots=True)
class FolderTally:
    """One folder's items at the end of a run in which nothing was left to do there.

    Attributes:
        digest: Its listing's; empty where it has none.
        ok: Items with status ok.
        failed: Items with status failed.
        not_found: Rows whose file was not found and that are not marked deleted.
    """

    digest: str
    ok: int
    failed: int
    not_found: int


@dataclass(frozen=True)
class FolderIndex:
    """What a run found.

    Attributes:
        config: The store's.
        provenance: Of its newest rows.
        folders: Tallies by root and path, both as stored.
        roots: Of all rows, as stored.
        cures: What the run could read, and under which limits: failures may be cured where that has changed.
    """

    config: ExtractionConfig
    provenance: Provenance
    folders: Mapping[Key, FolderTally]
    roots: frozenset[str]
    cures: Mapping[str, Any]

    @property
    def roots_on_disk(self) -> frozenset[str]:
        """The store's roots, as the file system has them."""
        return frozenset(map(name_on_disk, self.roots))


def read_index(storage: Storage, shards: Sequence[str]) -> FolderIndex | None:
    """Give the index of the store; None where there is none, or it is not that of these `shards`."""
    try:
        payload = read_cache(storage, layout.INDEX)
        if payload is None:
            return None
        content = json.loads(payload)
        if content["version"] != _VERSION or content["shards"] != _checksums(storage, shards):
            return None
        return FolderIndex(
            config=ExtractionConfig.from_json(content["config"], storage.location),
            provenance=Provenance.from_json(content["provenance"]),
            folders={
                (root, path): FolderTally(*tally)
                for root, below in content["folders"].items()
                for path, tally in below.items()
            },
            roots=frozenset(content["roots"]),
            cures=dict(content["cures"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, QvsplitError):
        return None


def write_index(storage: Storage, shards: Sequence[str], index: FolderIndex) -> None:
    """Leave `index` for the next run. Where that cannot be done nothing is lost but time."""
    below: dict[str, dict[str, Any]] = {}
    for (root, path), tally in index.folders.items():
        below.setdefault(root, {})[path] = [tally.digest, tally.ok, tally.failed, tally.not_found]
    with suppress(OSError, ValueError):
        content = {
            "version": _VERSION,
            "shards": _checksums(storage, shards),
            "config": index.config.to_json(),
            "provenance": index.provenance.to_json(),
            "roots": sorted(index.roots),
            "folders": below,
            "cures": dict(index.cures),
        }
        write_cache(storage, layout.INDEX, json.dumps(content, sort_keys=True).encode())


def _checksums(storage: Storage, shards: Sequence[str]) -> list[list[str]]:
    """Name each shard's content; OSError or ValueError where one is not sound."""
    return [[name, read_checksum(storage, name).hex()] for name in shards]
