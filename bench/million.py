"""A store of a million images: opened for one question, with one image new, with nothing to do, without its catalogue.

    python -m bench.million [--rows 1000000] [--folders 1000] [--rounds 3] [--folder DIR] [--before CHECKOUT]

Makes a tree of so many files (links to a few, so that they take no room) and a store that knows them all: rows written
by the real writer, one token of features each, under the extraction config of the checkpoint in the package. Then it
times whole processes. `--before` is another checkout of qvsplit, whose processes are timed on a copy of the same
shards in the same run. Memory is each process's peak; "above imports" is beyond a process that only imports the same.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.noop import measured
from bench.synthetic import row
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store import layout
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.opening import open_store
from qvsplit.store.schema import ShardSchema
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter

OLD = 1_600_000_000
LINKS = 500  # names of one file
HERE = Path(__file__).resolve().parents[1]
OPEN = """
import json, sys, time
import numpy, pyarrow.parquet
from qvsplit.store.opening import open_store
seconds = 0.0
if len(sys.argv) > 1:
    began = time.perf_counter()
    store = open_store(sys.argv[1])
    row = next(row for row in store.rows if row.path == sys.argv[2]) if sys.argv[3] == "all" else store[sys.argv[2]]
    store.features(row)
    seconds = time.perf_counter() - began
print(json.dumps(seconds))
"""


def make_tree(root: Path, files: int, folders: int) -> list[tuple[str, int]]:
    """Files of some bytes, many names each; gives path and size."""
    made, each, source = [], -(-files // folders), root / "first"
    root.mkdir()
    for folder in range(folders):
        below = root / f"year{folder * 10 // folders}" / f"album{folder:05d}"
        below.mkdir(parents=True)
        for number in range(folder * each, min(files, (folder + 1) * each)):
            path = below / f"IMG_{number:07d}.jpg"
            if number % LINKS == 0:
                source = path
                path.write_bytes(b"x" * (number // LINKS % 50 + 1))
                os.utime(path, (OLD, OLD))
            else:
                os.link(source, path)
            made.append((str(path.relative_to(root)), number // LINKS % 50 + 1))
    return made


def make_store(folder: Path, root: Path, files: list[tuple[str, int]], declared: ShardSchema) -> None:
    """A store that knows them all."""
    (spec,) = declared.tensors
    values = np.random.default_rng(0).normal(size=(1, spec.width)).astype(np.float32)
    tensors = {spec.key: StoredTensor(values.view(np.uint8), "float32")}
    made = Features(declared.config, tensors, (1, 2, 2), (("<|image_pad|>", 1),))
    folder.mkdir()
    writer = StoreWriter(LocalStorage(folder), declared)
    for name, size in files:
        known = row(str(root), name, 1, size=size, mtime_ns=OLD * 10**9, version=str(OLD * 10**9))
        writer.append(known, made)
    writer.end_shard()


def _image(place: Path) -> None:
    """A small image that no other name gives."""
    seed = int.from_bytes(place.name.encode()[-8:], "little")
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), np.uint8)).save(place)


def timed(command: list[str | Path], checkout: Path) -> dict[str, Any]:
    """Seconds of a whole process of this checkout, its peak memory in bytes, and what its last line says."""
    # -P and PYTHONPATH: the checkout's own package, whatever is installed
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    seconds, memory, said = measured(command, env=environment, cwd=checkout)
    return {"seconds": seconds, "memory": memory, "said": json.loads(said) if said else None}


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of seconds, the largest of memory."""
    return {
        "seconds": statistics.median(one["seconds"] for one in runs),
        "memory": max(one["memory"] for one in runs),
        "inside": statistics.median(one["inside"] for one in runs),
    }


class Contender:
    """One checkout, on its own copy of the store."""

    def __init__(self, name: str, checkout: Path, store: Path, photos: Path, *, whole: bool) -> None:
        self.name, self.checkout, self.store, self.photos = name, checkout, store, photos
        self._find = "all" if whole else "one"

    def _qvsplit(self, *words: object) -> dict[str, Any]:
        return timed([sys.executable, "-m", "qvsplit", *map(str, words)], self.checkout)

    def imports(self) -> dict[str, Any]:
        """A process that only imports what opening needs."""
        return timed([sys.executable, "-c", OPEN], self.checkout) | {"inside": 0.0}

    def open(self, name: str) -> dict[str, Any]:
        """Open the store, find one image, read its features."""
        done = timed([sys.executable, "-c", OPEN, self.store, name, self._find], self.checkout)
        return done | {"inside": done["said"]}

    def ask(self, store: Path, name: str) -> dict[str, Any]:
        """`qvsplit ask` one question about one image."""
        words = ["ask", "--embeds", store, "--image", name, "--model", "demo", "--json", "What is in the image?"]
        return self._qvsplit(*words, "--max-new-tokens", "1") | {"inside": 0.0}

    def nothing(self) -> dict[str, Any]:
        """`qvsplit extract` with nothing to do."""
        done = self._qvsplit("extract", self.photos, "--embeds", self.store, "--json")
        assert done["said"]["to_read"] == 0, done["said"]
        return done | {"inside": done["seconds"]}

    def one_new(self, store: Path, photos: Path, number: int) -> dict[str, Any]:
        """`qvsplit extract` with one new image: its time beyond loading the model."""
        place = (photos / "year3" if (photos / "year3").exists() else photos) / f"new_{self.name}_{number}.png"
        Image.fromarray(np.random.default_rng(hash(place.name) % 2**32).integers(0, 255, (56, 56, 3), np.uint8)).save(
            place
        )
        done = self._qvsplit("extract", photos, "--embeds", store, "--json")
        assert done["said"]["new"] == 1, done["said"]
        return done | {"inside": done["seconds"] - done["said"]["stages"]["load"]}

    def lost(self, name: str) -> dict[str, Any]:
        """Open the store when its caches are lost."""
        for cache in (layout.CATALOGUE, ".qvsplit/rows.json", ".qvsplit/index.json"):
            (self.store / cache).unlink(missing_ok=True)
        return self.open(name)


def main() -> None:
    """Make it, time it, tell it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make it all [default: a temporary folder]")
    parser.add_argument("--before", type=Path, help="another checkout, timed beside this one")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=told.folder) as place:
        print(json.dumps(measure(Path(os.path.realpath(place)), told)))


def measure(here: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Make the store, and time every contender in turn."""
    small = here / "small"
    (here / "few").mkdir()
    _image(here / "few" / "one.png")
    extract_files(here / "few", out=small, options=ExtractOptions(model="demo", device="cpu"))
    with open_store(small) as opened:
        declared = opened.catalogue.shards[0].schema
    files = make_tree(here / "photos", told.rows, told.folders)
    make_store(here / "store", here / "photos", files, declared)
    name = files[len(files) // 2][0]
    contenders = [Contender("now", HERE, here / "store", here / "photos", whole=False)]
    if told.before is not None:
        shutil.copytree(here / "store", here / "before")
        contenders.append(Contender("before", told.before, here / "before", here / "photos", whole=True))
    results: dict[str, Any] = {"rows": told.rows, "folders": told.folders}
    for contender in contenders:
        contender._qvsplit("extract", here / "photos", "--embeds", contender.store)  # leaves its caches
        results[contender.name] = _measured(contender, small, name, told.rounds)
    catalogue = here / "store" / layout.CATALOGUE
    results["catalogue_bytes"] = catalogue.stat().st_size
    print(f"catalogue {results['catalogue_bytes'] / 1e6:.1f} MB")
    return results


def _measured(contender: Contender, small: Path, name: str, rounds: int) -> dict[str, Any]:
    runs = {
        "imports": [contender.imports() for _ in range(rounds)],
        "open": [contender.open(name) for _ in range(rounds)],
        "ask": [contender.ask(contender.store, name) for _ in range(rounds)],
        "ask of one": [contender.ask(small, "one.png") for _ in range(rounds)],
        "nothing": [contender.nothing() for _ in range(rounds)],
        "one new": [contender.one_new(contender.store, contender.photos, one) for one in range(rounds)],
        "one new of few": [contender.one_new(small, small.parent / "few", one) for one in range(rounds)],
        "lost": [contender.lost(name)],
    }
    medians = {what: median(ones) for what, ones in runs.items()}
    base = medians["imports"]["memory"]
    print(f"\n{contender.name}")
    for what, one in medians.items():
        above = (one["memory"] - base) / 1e6
        print(f"  {what:14} {one['seconds']:7.2f} s, inside {one['inside']:6.2f} s, {one['memory'] / 1e6:7.1f} MB "
              f"({above:+.1f} above imports)")  # fmt: skip
    return medians


if __name__ == "__main__":
    main()
