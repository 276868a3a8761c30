"""What the last runs did: a line each in the album, for `inspect` and for estimates. Nothing depends on it.

No names of pictures are in it. A run that changed nothing leaves no line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RUNS_FILE = ".qvsplit-runs.jsonl"
_KEPT = 200  # lines; twice as many are cut back to them
_LINE_BYTES = 1 << 16


def note(folder: Path, began: float, summary: Mapping[str, Any]) -> None:
    """One line for a run that began at `began`, seconds since the epoch. Where it cannot be written, none."""
    told = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))} | {
        name: value for name, value in summary.items() if value not in ({}, 0, 0.0, "", None, False)
    }
    path = folder / RUNS_FILE
    with suppress(OSError):
        with path.open("a") as stream:
            stream.write(json.dumps(told) + "\n")
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) >= 2 * _KEPT:
            temporary = path.with_name(f"{RUNS_FILE}.{os.getpid()}.tmp")
            temporary.write_bytes(b"".join(lines[-_KEPT:]))
            os.replace(temporary, path)


def last_runs(folder: Path, number: int | None = None) -> list[dict[str, Any]]:
    """The last runs, the latest last; a line that a dying run left half-written is passed over."""
    runs = []
    with suppress(OSError):
        for line in (folder / RUNS_FILE).read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                told = json.loads(line[:_LINE_BYTES])
                if isinstance(told, dict):
                    runs.append(told)
    return runs if number is None else runs[-number:]
