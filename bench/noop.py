"""A run with nothing to do, against `rsync -an` of the same tree to an equal tree.

    python -m bench.noop [--files 100000] [--folders 1000] [--rounds 7] [--folder DIR]

Makes a tree of small files and a store that knows them all (rows written by the real writer, one token of features
each), then times whole processes in turn: `rsync -an`, a bare scandir and stat, `qvsplit extract` with its catalogue,
and the same after that was taken away, which has to read the shards. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.synthetic import features, row, schema
from qvsplit.store.layout import CATALOGUE
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter

OLD = 1_600_000_000
WIDTH = 8
BARE = """
import os, sys
folders = [sys.argv[1]]
while folders:
    with os.scandir(folders.pop()) as scan:
        for entry in scan:
            folders.append(entry.path) if entry.is_dir() else entry.stat()
"""


def make_tree(root: Path, files: int, folders: int) -> list[tuple[str, int, int]]:
    """Files of 1 to 50 bytes, ten years of folders; gives path, size and mtime in seconds of each."""
    made = []
    each = -(-files // folders)
    for folder in range(folders):
        below = f"year{folder * 10 // folders}/store{folder:05d}"
        (root / below).mkdir(parents=True)
        for number in range(folder * each, min(files, (folder + 1) * each)):
            path, size, mtime = f"{below}/IMG_{number:07d}.jpg", number % 50 + 1, OLD + number
            (root / path).write_bytes(b"x" * size)
            os.utime(root / path, (mtime, mtime))
            made.append((path, size, mtime))
    return made


def make_store(folder: Path, root: Path, files: Sequence[tuple[str, int, int]]) -> None:
    """A store that knows them all."""
    declared = schema("float32", WIDTH)
    raw = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32).view(np.uint8).reshape(1, -1)
    folder.mkdir()
    writer = StoreWriter(LocalStorage(folder), declared)
    for name, size, mtime in files:
        known = row(str(root), name, 1, size=size, mtime_ns=mtime * 10**9, version=str(mtime * 10**9))
        writer.append(known, features(declared, raw))
    writer.end_shard()


# A process of its own, small: a child's peak as the kernel counts it is never less than what its parent had
TIMER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
said = process.stdout.read().splitlines()
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps([seconds, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), said[-1] if said else ""]))
"""


def measured(command: Sequence[str | Path], **options: Any) -> tuple[float, int, str]:
    """Seconds of a whole process, its peak memory in bytes, and the last line it printed; `options` of its start."""
    words = [sys.executable, "-S", "-c", TIMER, *map(str, command)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, **options)
    seconds, memory, code, said = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(map(str, command))} failed with {code}")
    return seconds, memory, said


def timed(command: Sequence[str | Path]) -> tuple[float, int]:
    """Seconds of a whole process, and its peak memory in bytes."""
    return measured(command)[:2]


def main() -> None:
    """Make it, time it, tell it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to make the trees [default: a temporary folder]")
    told = parser.parse_args()
    if shutil.which("rsync") is None:
        raise SystemExit("rsync is not installed: there is nothing to compare with")
    with tempfile.TemporaryDirectory(dir=told.folder) as place:
        here = Path(os.path.realpath(place))
        files = make_tree(here / "photos", told.files, told.folders)
        subprocess.run(["rsync", "-a", f"{here / 'photos'}/", f"{here / 'equal'}/"], check=True)
        make_store(here / "store", here / "photos", files)
        extract: list[str | Path] = [
            sys.executable,
            "-m",
            "qvsplit",
            "extract",
            here / "photos",
            "--embeds",
            here / "store",
        ]
        timed(extract)  # leaves the catalogue
        aside = here / "catalogue"

        def without_catalogue() -> tuple[float, int]:
            shutil.move(here / "store" / CATALOGUE, aside)
            return timed(extract)  # makes it again

        contenders: dict[str, Callable[[], tuple[float, int]]] = {
            "rsync -an": lambda: timed(["rsync", "-an", f"{here / 'photos'}/", f"{here / 'equal'}/"]),
            "scandir and stat": lambda: timed([sys.executable, "-c", BARE, here / "photos"]),
            "qvsplit extract": lambda: timed(extract),
            "qvsplit extract, catalogue lost": without_catalogue,
        }
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
        for _ in range(told.rounds):
            for name, run in contenders.items():
                runs[name].append(run())
        catalogue_bytes = (here / "store" / CATALOGUE).stat().st_size
    seconds = {name: statistics.median(one[0] for one in ones) for name, ones in runs.items()}
    memory = {name: max(one[1] for one in ones) for name, ones in runs.items()}
    print(f"{told.files:,} files in {told.folders:,} folders, all known; medians of {told.rounds}")
    for name in contenders:
        ratio = seconds[name] / seconds["rsync -an"]
        print(f"{name:28} {seconds[name]:7.3f} s  {ratio:5.2f} x rsync  {memory[name] / 1e6:7.1f} MB")
    print(f"catalogue {catalogue_bytes / 1e3:.1f} kB")
    print(
        json.dumps(
            {
                "files": told.files,
                "folders": told.folders,
                "seconds": seconds,
                "over_rsync": seconds["qvsplit extract"] / seconds["rsync -an"],
                "memory_bytes": memory,
                "catalogue_bytes": catalogue_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
