"""A file that only saves time: headed by its hash, and ignored where it is not what was written."""

from __future__ import annotations

import hashlib
from contextlib import suppress

from qvsplit.errors import DiskError
from qvsplit.store.storage import Storage


def write_cache(storage: Storage, name: str, payload: bytes) -> None:
    """Write a cache file, whole or not at all. Where it cannot be written nothing is lost but time."""
    with suppress(DiskError), storage.put_whole(name, durable=False) as stream:
        stream.write(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def read_cache(storage: Storage, name: str) -> bytes | None:
    """Give what `write_cache` wrote; None where there is nothing, or not what was written."""
    try:
        with storage.open(name) as stream:
            digest, _, payload = stream.read().partition(b"\n")
    except (OSError, ValueError):
        return None
    return payload if digest == hashlib.sha256(payload).hexdigest().encode() else None
