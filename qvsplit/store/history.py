"""What the last runs did: a line each, for `inspect` and for estimates. Nothing depends on it.

No names of items are in it. A run that changed nothing leaves no line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qvsplit.errors import DiskError
from qvsplit.store import layout
from qvsplit.store.storage import Storage

_KEPT = 200  # lines
_LINE_BYTES = 1 << 16


def add_run(storage: Storage, began: float, summary: Mapping[str, Any]) -> None:
    """Add a line for a run that began at `began`, seconds since the epoch. Where it cannot be written, none."""
    record = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))} | {
        name: value for name, value in summary.items() if value not in ({}, 0, 0.0, "", None, False)
    }
    lines = [*_lines(storage), json.dumps(record).encode()]
    with suppress(DiskError), storage.put_whole(layout.HISTORY, durable=False) as stream:
        stream.write(b"\n".join(lines[-_KEPT:]) + b"\n")


def last_runs(storage: Storage, number: int | None = None) -> list[dict[str, Any]]:
    """Give the last runs, the latest last; a line that is no record is passed over."""
    runs = []
    for line in _lines(storage):
        with suppress(ValueError, RecursionError):
            record = json.loads(line[:_LINE_BYTES])
            if isinstance(record, dict):
                runs.append(record)
    return runs if number is None else runs[-number:]


def _lines(storage: Storage) -> list[bytes]:
    with suppress(OSError, ValueError), storage.open(layout.HISTORY) as stream:
        return stream.read().splitlines()
    return []
