"""Generations: every run that writes claims a number above all others, which its rows carry.

Of an item's rows those of the highest generation are current. A writer that was paused so long that its lock went to
another writes under a lower number than that one, and cannot hide what it wrote.
"""

from __future__ import annotations

import json
import os
import time

from qvsplit.errors import StoreInUse
from qvsplit.store import layout
from qvsplit.store.storage import Storage

_ATTEMPTS = 100


def claim_generation(storage: Storage, highest: int) -> int:
    """Claim a generation above `highest`, that of all rows, and above all that were claimed before.

    Raises:
        StoreInUse: Others claim generations as fast as this process does.
        DiskError: The claim cannot be written.
    """
    number = max([highest, *_claimed(storage)])
    content = json.dumps({"pid": os.getpid(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()
    for _ in range(_ATTEMPTS):
        number += 1
        if storage.put_if_absent(f"{layout.GENERATIONS}/{number:012d}", content):
            claimed = _claimed(storage)  # again: another may have claimed this very number, a higher one deleted it
            storage.delete(*(f"{layout.GENERATIONS}/{name}" for old, name in claimed.items() if old < max(claimed)))
            if number >= max(claimed, default=number):
                return number
            number = max(claimed)
    raise StoreInUse(f"{storage.location} is being written by others; try again later")


def _claimed(storage: Storage) -> dict[int, str]:
    """Map each number that has a file to its name; the highest always has one."""
    return {int(file.name): file.name for file in storage.list(layout.GENERATIONS) if file.name.isdecimal()}
