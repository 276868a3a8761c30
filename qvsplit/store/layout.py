"""Where everything in a store's folder lies, by name. Imports nothing heavy.

A store is a folder of shards. Everything else lies in `.qvsplit/` below it, so that `*.parquet` names the shards and
nothing but the shards.
"""

from __future__ import annotations

import re
from pathlib import Path

OWN_FOLDER = ".qvsplit"
LOCK = f"{OWN_FOLDER}/lock"
CATALOGUE = f"{OWN_FOLDER}/catalogue.sqlite"  # cache: the current rows, and what was found in each folder
HISTORY = f"{OWN_FOLDER}/history.jsonl"  # what the last runs did
WALKED = f"{OWN_FOLDER}/walked.json"  # the folders that the store is brought up to date with
GENERATIONS = f"{OWN_FOLDER}/generations"  # a file for the generation that was claimed last
DAMAGE = f"{OWN_FOLDER}/damage"  # a file for each shard in which `verify` found damage
QUARANTINE = f"{OWN_FOLDER}/quarantine"  # damaged shards, as they were found
STAGING = f"{OWN_FOLDER}/staging"  # files that are being written
REBUILD = f"{OWN_FOLDER}/rebuild"  # the store that is to take this one's place
REBUILD_COMPLETE = f"{REBUILD}/complete.json"  # exists while it is being put in place

_SHARD = re.compile(r"shard-(\d{6,})\.parquet")


def shard_name(number: int) -> str:
    """Give the name of the shard of this number."""
    return f"shard-{number:06d}.parquet"


def shard_number(name: str) -> int | None:
    """Give the number in a shard's name; None for a name that is no shard's."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match and shard_name(int(match[1])) == name else None


def in_order(path: Path) -> tuple[int, str]:
    """Give the key by which shards are sorted: by number, other names after them."""
    number = shard_number(path.name)
    return (1 << 62 if number is None else number, str(path))
