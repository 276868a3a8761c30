"""Which contents are encoded, and by whom: asked by every reader of a cluster, so that each is encoded once."""

from __future__ import annotations

from pathlib import Path

from qvsplit.store.catalogue import Catalogue
from qvsplit.store.catalogue_file import catalogue_of_shards, known_catalogue
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shards import shard_files
from qvsplit.store.storage import LocalStorage


class Contents:
    """The contents of a store, and those that a run has begun to encode. One process has it, on the driver's machine.

    What a run has begun is known here alone: if that process dies, so does the run, rather than encode a content twice.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: str) -> None:
        self._catalogue = _catalogue_of(store)
        self._owners: dict[bytes, int] = {}  # SHA-256 → the number of the item that is encoded for it

    def claim(self, sha256: str, number: int) -> bool:
        """Say whether item `number` is the one to be encoded for this content. Asked again, it answers the same."""
        owner = self._owners.get(content := bytes.fromhex(sha256))
        if owner is None:
            if self._catalogue.home_places(sha256):  # all its parts
                return False
            owner = self._owners[content] = number
        return owner == number

    def release(self, sha256: str) -> None:
        """Let another item be encoded for this content: the one that was to be has failed."""
        self._owners.pop(bytes.fromhex(sha256), None)


def _catalogue_of(store: str) -> Catalogue:
    """Give the store's catalogue, as the holder of its lock has left it; publish none."""
    storage = LocalStorage(Path(store))
    files = shard_files(storage)
    known = known_catalogue(storage, files)
    return known or catalogue_of_shards([Shard(storage, file.name) for _, file in files], storage.location)
