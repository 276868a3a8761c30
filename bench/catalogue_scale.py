"""What do catalogue, committer, memory and listing cost at 100 million rows? Rows are made, not images.

    python -m bench.catalogue_scale [PART …] [--rows 1000000] [--rows-per-shard 10000] [--files 1000,10000,100000]
        [--entries 300000] [--walk 100000] [--shards 300] [--folder DIR]

Parts, each in a process of its own; all of them where none is named:

    catalogue  the real builder makes, copies and publishes a catalogue of so many rows; only the reader of shards is
               replaced, by one that makes rows, and empty files stand for shards. Seconds along the way, bytes, peak
               memory, what a run looks up, a run with nothing to do, one more shard. Cold: the file's pages are
               dropped from the page cache before
    shards     real shards of --rows-per-shard rows of one token, of 67 such, and of 67 rows of 1,280 tokens, as full as
               a shard gets: seconds that a catalogue takes to read them
    commit     the next shard of a folder of so many is renamed out of staging, both folders synced, without and with
               the listing that gives the next number
    memory     what the driver of a run keeps for an item: lines of a listing, entries of a plan, rows of a run
               (`RowRecorder`), contents that are written, a dictionary of digests
    cluster    what a plan of so many entries takes as input of Ray Data, and how often a second the process that knows
               all contents is asked, by one caller that waits and by one that does not; where Ray is installed
    listing    the walk over so many empty files, 1,000 a folder: not known, and known by its digest

A catalogue takes some 250 bytes a row, and as much again for its copy, which is left out beyond --most-gb.
Times are of the clock unless they are said to be of the CPU, and hold for the disk that --folder lies on. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib.util
import json
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.machine import machine
from bench.synthetic import features, schema
from qvsplit.pipeline.items import Result
from qvsplit.pipeline.parts import Part
from qvsplit.pipeline.plan import nothing_to_do, plan
from qvsplit.pipeline.record import RowRecorder
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.runtime.memory import bytes_in_kernel_file, garbage_collection_paused, machine_memory, peak_memory
from qvsplit.sources.files import FileInfo
from qvsplit.sources.folders import LocalFolders
from qvsplit.sources.source import Listing, Scope
from qvsplit.store import catalogue_file, layout
from qvsplit.store.catalogue import Catalogue, FolderTally
from qvsplit.store.catalogue_file import Noted, catalogue_of, known_catalogue
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.row import Content, Key, Row, placeholder_json
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shards import next_number, shard_files
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter

ROOT = "/mnt/photos"
IN_FOLDER = 1_000  # items
SMALL_SHARD = 67  # rows of 1,280 tokens of 3,072 bytes: as many as 256 MiB hold, but for one or two
LOOKUPS = 1_000
COMMITS = 50
LISTED_COMMITS = 10
DECLARED, NARROW = schema("bfloat16", 1536), schema("float32", 8)
OLD = 1_600_000_000


def main() -> None:
    """Measure every part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [default: all]")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument(
        "--files", type=_numbers, default=(1_000, 10_000, 100_000), help="shards of a folder, by commas"
    )
    parser.add_argument("--entries", type=int, default=300_000)
    parser.add_argument("--walk", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--most-gb", type=float, default=40, help="disk that a catalogue and its copy may take")
    parser.add_argument("--folder", type=Path, help="where to work: the disk that is measured")
    told = parser.parse_args()
    if unknown := set(told.part) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"bench": "catalogue_scale", **machine()}
    for part in told.part or PARTS:
        print(f"\n{part}", flush=True)
        with (
            tempfile.TemporaryDirectory(dir=told.folder) as place,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
        ):
            results[part] = process.submit(PARTS[part], Path(os.path.realpath(place)), told).result()
    print(json.dumps(results))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


def _say(what: str, value: float, unit: str) -> float:
    print(f"  {what:58} {value:14,.3f} {unit}", flush=True)
    return value


def _timed(what: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Call it; gives the seconds by that clock, and what it gave."""
    began = clock()
    given = what()
    return clock() - began, given


# ------------------------------------------------------------------------------------------------------------- rows


def made_row(number: int) -> Row:
    """Make a row of an image that was encoded; columns are as long as they are for a photograph."""
    digest = hashlib.sha256(number.to_bytes(8, "little")).hexdigest()
    h, w = 20 + 2 * (number % 25), 20 + 2 * (number // 25 % 25)
    tokens, mtime = h * w // 4, (OLD + number) * 10**9 + number % 10**9
    return Row(
        root=ROOT, path=made_path(number), sha256=digest, size=2_000_000 + number % 3_000_000, status="ok",
        generation=1, mtime_ns=mtime, version=str(mtime), width=14 * w, height=14 * h, taken_at=_taken_at(number),
        grid_thw=(1, h, w), n_tokens=tokens, placeholder=_placeholder(tokens), inputs="{}",
        media='{"format": "JPEG"}', has_features=True,
    )  # fmt: skip


def _placeholder(tokens: int) -> str:
    return placeholder_json([("<|image_pad|>", tokens)])


def _taken_at(number: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(OLD + number))


def made_folder(number: int) -> str:
    """Give the path of a folder; these sort by their number."""
    return f"{number // 1000:04d}/album-{number:06d}"


def made_path(number: int) -> str:
    """Give the path of an item; these sort by their number."""
    return f"{made_folder(number // IN_FOLDER)}/IMG_{number:09d}.jpg"


class MadeShard:
    """Stands for a shard: its name says which rows it has."""

    rows_each = 0

    def __init__(self, storage: LocalStorage, name: str) -> None:
        self.name, self.schema = name, DECLARED
        self.checksum = hashlib.sha256(name.encode()).digest()

    @property
    def rows(self) -> list[Row]:
        """Its rows, in order."""
        first = ((layout.shard_number(self.name) or 1) - 1) * self.rows_each
        with garbage_collection_paused():
            return [made_row(number) for number in range(first, first + self.rows_each)]


# --------------------------------------------------------------------------------------------------------- catalogue


def catalogue(place: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Make a catalogue, ask it, open it, add a shard."""
    MadeShard.rows_each = told.rows_per_shard
    storage = _store_of_empty_files(place, -(-told.rows // told.rows_per_shard))
    shards = len(shard_files(storage))
    rows = shards * told.rows_per_shard
    result: dict[str, Any] = {"rows": rows, "rows_per_shard": told.rows_per_shard, "shards": shards}
    with mock.patch.object(catalogue_file, "Shard", MadeShard):
        result |= _made(storage, rows)
        file = place / layout.CATALOGUE
        result["bytes"] = file.stat().st_size
        result["bytes_a_row"] = _say("bytes a row", result["bytes"] / rows, "B")
        result |= _opened(storage, file, rows)
        room = min(shutil.disk_usage(place).free + result["bytes"], told.most_gb * 1e9)
        if room > 2.1 * result["bytes"]:
            result |= _one_more(storage, place, shards, rows)
    result["peak_bytes"] = peak_memory()
    _say("peak memory of the process", result["peak_bytes"] / 1e6, "MB")
    return result


def _store_of_empty_files(place: Path, shards: int) -> LocalStorage:
    (place / layout.STAGING).mkdir(parents=True)
    for number in range(1, shards + 1):
        (place / layout.shard_name(number)).touch()
    return LocalStorage(place)


def _tallies(rows: int) -> Mapping[Key, FolderTally]:
    folders = -(-rows // IN_FOLDER)
    return {
        (ROOT, made_folder(one)): FolderTally(hashlib.md5(str(one).encode()).hexdigest(), IN_FOLDER, 0, 0)
        for one in range(folders)
    }


def _made(storage: LocalStorage, rows: int) -> dict[str, Any]:
    """Make it as a first run's end does: all shards are new, and all folders are settled."""
    result: dict[str, Any] = {}
    some = min(rows, 100_000)
    seconds, _ = _timed(lambda: [made_row(number) for number in range(some)], time.process_time)
    result["making_rows_s"] = _say(
        f"of the next: making the rows, by {some:,} of them, CPU", seconds * rows / some, "s"
    )
    curve: list[tuple[int, float, float]] = []  # rows, seconds, seconds of the CPU
    began, cpu_began, written = time.perf_counter(), time.process_time(), _written_bytes()

    def on_shard(done: int, total: int) -> None:
        if not done or done == total or done * 10 // total > (done - 1) * 10 // total:
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
            curve.append((done * rows // total, round(seconds, 2), round(cpu, 2)))
            print(f"    {curve[-1][0]:,} rows, {seconds:,.1f} s, of the CPU {cpu:,.1f} s", flush=True)

    files, noted = shard_files(storage), Noted(_tallies(rows), {})
    catalogue_of(storage, files, noted=noted, on_shard=on_shard).close()
    result["made_s"] = _say("made and published", time.perf_counter() - began, "s")
    result["finish_s"] = _say("of that: tallies, commit, hash, rename", result["made_s"] - curve[-1][1], "s")
    result["written_bytes"] = _say("written to the kernel meanwhile", (_written_bytes() - written) / 1e6, "MB") * 1e6
    return result | {"curve": curve, "peak_made_bytes": peak_memory()}


def _written_bytes() -> int:
    """Count what this process has written, pages that were written again included."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def _drop_pages(file: Path) -> None:
    """Have the kernel forget the file's pages, as far as it does."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _opened(storage: LocalStorage, file: Path, rows: int) -> dict[str, Any]:
    """Open it cold and warm, have a run with nothing to do, look up what runs look up."""
    files = shard_files(storage)
    result: dict[str, Any] = {}

    def opened() -> Catalogue:
        found = known_catalogue(storage, files)
        assert found is not None
        return found

    for how in ("cold", "warm"):
        if how == "cold":
            _drop_pages(file)
        seconds, known = _timed(opened)
        result[f"open_{how}_s"] = _say(f"opened, {how} (every page is hashed)", seconds, "s")
        if how == "cold":
            known.close()
    seconds, tallies = _timed(lambda: known.tallies)
    result["tallies_s"] = _say(f"tallies of {len(tallies):,} folders", seconds, "s")
    listings = [Listing(folder[0], folder[1], (), one.ok, known=True) for folder, one in tallies.items()]
    seconds, total = _timed(lambda: nothing_to_do(tallies, known.unsettled, listings, Scope((ROOT,), ()), prune=False))
    assert total is not None
    result["nothing_to_do_s"] = _say("found that there is nothing to do", seconds, "s")
    chance = random.Random(0)
    numbers = [chance.randrange(rows) for _ in range(LOOKUPS)]
    made = [made_row(number) for number in numbers]
    for name, ask in _lookups(known).items():
        assert ask(made[0]), name
        seconds, _ = _timed(functools.partial(_all_of, ask, made))
        result[f"{name}_us"] = _say(f"{name}, at random", seconds / LOOKUPS * 1e6, "µs")
    seconds, _ = _timed(lambda: [known.folder_rows(row.folder) for row in made[:50]])
    result["folder_rows_ms"] = _say(f"folder_rows, {IN_FOLDER:,} rows, at random", seconds / 50 * 1e3, "ms")
    seconds, _ = _timed(known.counts)
    result["counts_s"] = _say("counts of all rows by status", seconds, "s")
    known.close()
    return result


def _all_of(ask: Callable[[Row], Any], rows: Sequence[Row]) -> None:
    for row in rows:
        ask(row)


def _lookups(known: Catalogue) -> Mapping[str, Callable[[Row], Any]]:
    return {
        "rows_of": lambda row: known.rows_of(row.root, row.path),
        "home": lambda row: known.home(row.content),
        "home_places": lambda row: known.home_places(row.sha256),
    }


def _one_more(storage: LocalStorage, place: Path, shards: int, rows: int) -> dict[str, Any]:
    """Add one shard, as the end of an incremental run does: the catalogue is copied, hashed and renamed."""
    (place / layout.shard_name(shards + 1)).touch()
    files, noted = shard_files(storage), Noted(_tallies(rows + MadeShard.rows_each), {})
    result: dict[str, Any] = {}
    fits = (place / layout.CATALOGUE).stat().st_size < machine_memory() / 4
    for how in ("warm", "cold") if fits else ("cold",):
        if how == "cold":
            (place / layout.shard_name(shards + 2)).touch()
            files = shard_files(storage)
            _drop_pages(place / layout.CATALOGUE)
        seconds, made = _timed(functools.partial(catalogue_of, storage, files, noted=noted))
        made.close()
        result[f"one_more_{how}_s"] = _say(f"one more shard, {how}", seconds, "s")
    return result


# ------------------------------------------------------------------------------------------------------------ shards


def real_shards(place: Path, told: argparse.Namespace) -> list[dict[str, Any]]:
    """Write real shards, and have a catalogue read them."""
    result = []
    for each, number, declared, tokens in (
        (told.rows_per_shard, max(1, told.shards // 30), NARROW, 1),
        (SMALL_SHARD, told.shards, NARROW, 1),
        (SMALL_SHARD, max(1, told.shards // 30), DECLARED, 1280),
    ):
        folder = place / f"{each}-{tokens}"
        (folder / layout.STAGING).mkdir(parents=True)
        storage = LocalStorage(folder)
        size = _write_shards(storage, each, number, declared, tokens)
        files = shard_files(storage)
        seconds, made = _timed(functools.partial(catalogue_of, storage, files), time.process_time)
        made.close()
        shutil.rmtree(folder)
        print(f"  {number:,} shards of {each:,} rows of {tokens:,} tokens, {size / number / 1e6:.1f} MB each")
        _say("of the CPU, a row", seconds / number / each * 1e6, "µs")
        _say("of the CPU, a shard", seconds / number * 1e3, "ms")
        result.append({"rows_per_shard": each, "tokens": tokens, "shards": number, "cpu_seconds": seconds})
    return result


def _write_shards(storage: LocalStorage, each: int, number: int, declared: ShardSchema, tokens: int) -> int:
    """Write shards of rows of so many tokens; gives their bytes."""
    (spec,) = declared.tensors
    values = np.random.default_rng(0).normal(size=(tokens, spec.width)).astype(np.float32)
    raw = values.view(np.uint8) if spec.dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    made = features(declared, raw.view(np.uint8))
    writer = StoreWriter(storage, declared)
    for one in range(each * number):
        row = replace(made_row(one), grid_thw=made.grid_thw, n_tokens=tokens, placeholder=_placeholder(tokens))
        writer.append(row, made)
        if (one + 1) % each == 0:
            writer.end_shard()
    return writer.written.bytes


# ------------------------------------------------------------------------------------------------------------ commit


def commit(place: Path, told: argparse.Namespace) -> list[dict[str, Any]]:
    """Put staged files under the next shard's name, in a folder that has more and more of them."""
    storage, there = _store_of_empty_files(place, 0), 0
    result = []
    for number in sorted(told.files):
        print(f"  {number:,} shards")
        _fill(place, there, number)
        gc.collect()
        os.sync()
        one: dict[str, Any] = {"shards": number}
        seconds = _seconds_of_commits(storage, iter(range(number + 1, number + COMMITS + 1)))
        one["commit_ms"] = _say("rename, sync of both folders", seconds * 1e3, "ms")
        seconds = _seconds_of_commits(storage, (next_number(storage) for _ in range(LISTED_COMMITS)))
        one["listed_commit_ms"] = _say("the same behind a listing for its number", seconds * 1e3, "ms")
        there = number + COMMITS + LISTED_COMMITS
        seconds, _ = _timed(lambda: shard_files(storage))
        one["listing_s"] = _say("a listing", seconds, "s")
        result.append(one | {"peak_bytes": peak_memory()})
    return result


def _seconds_of_commits(storage: LocalStorage, numbers: Iterator[int]) -> float:
    """Commit staged files under these numbers; gives the seconds of one."""
    began, done = time.perf_counter(), 0
    for number in numbers:
        staged = f"{layout.STAGING}/{secrets.token_hex(8)}.parquet"
        os.close(os.open(storage.folder / staged, os.O_CREAT | os.O_WRONLY))
        storage.move(staged, layout.shard_name(number))
        done += 1
    return (time.perf_counter() - began) / done


def _fill(place: Path, have: int, number: int) -> None:
    for one in range(have + 1, number + 1):
        os.close(os.open(place / layout.shard_name(one), os.O_CREAT | os.O_WRONLY))


# ------------------------------------------------------------------------------------------------------------ memory


class _Nothing:
    """A catalogue of an empty store, and a writer that writes nothing."""

    def folder_rows(self, folder: Key) -> Mapping[Key, tuple[Row, bool]]:
        return {}

    def rows_in(self, wanted: Callable[[Key], bool]) -> Iterator[Row]:
        return iter(())

    def current(self, root: str, path: str) -> Row | None:
        return None

    def rows_of(self, root: str, path: str) -> Sequence[Row]:
        return []

    def holds(self, content: Content | None) -> bool:
        return False

    def home(self, content: Content | None) -> Row | None:
        return None

    def home_rows(self, sha256: str | None) -> Sequence[Row]:
        return []

    def append_item(self, parts: Any) -> list[Row]:
        return [row for row, _ in parts]


def memory(place: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Count bytes of memory an item, as the process grows by them."""
    number, nothing = told.entries, _Nothing()
    result: dict[str, Any] = {"items": number}

    def growth(what: str, make: Callable[[], Any], of: int = number) -> Any:
        gc.collect()
        before = bytes_in_kernel_file("/proc/self/status", "VmRSS") or 0
        made = make()
        gc.collect()
        grown = (bytes_in_kernel_file("/proc/self/status", "VmRSS") or 0) - before
        result[f"{what}_bytes"] = _say(f"{what}, an item", grown / of, "B")
        return made

    listings = growth("listing lines", lambda: list(_listings(number)))
    seconds, planned = _timed(
        lambda: growth("entries of a plan", lambda: plan(listings, Scope((ROOT,), ()), nothing, {})), time.process_time
    )
    result["plan_us"] = _say("of the CPU, to plan an item", seconds / number * 1e6, "µs")
    recorder = RowRecorder(nothing, planned, 1, lambda: nothing, Summary(), ExtractCallbacks())
    seconds = growth("rows of a run", lambda: _recorded(recorder, planned.to_read))
    result["record_us"] = _say("of the CPU, to record an item", seconds / number * 1e6, "µs")
    growth("contents that are written", lambda: {row.content for row in recorder.written.values()})
    growth("a dictionary of digests", lambda: _digests(10 * number), 10 * number)
    return result


def _listings(number: int) -> Iterator[Listing]:
    for first in range(0, number, IN_FOLDER):
        rows = (made_row(one) for one in range(first, min(number, first + IN_FOLDER)))
        lines = tuple(f"{row.path.rpartition('/')[2]}\0{row.size}\0{row.mtime_ns}" for row in rows)
        yield Listing(ROOT, made_folder(first // IN_FOLDER), lines, len(lines))


def _recorded(recorder: RowRecorder, entries: Sequence[Any]) -> float:
    """Have a run's results recorded; gives the seconds. Values are new objects, as those of a worker are."""
    seconds = 0.0
    tensors = {"pooler_output": StoredTensor(np.zeros((1, 4), np.uint8), "bfloat16")}
    for number, entry in enumerate(entries):
        row = made_row(number)
        info = FileInfo(row.sha256 or "", row.size, row.mtime_ns or 0, row.version)
        placeholder = (("<|image_pad|>", row.n_tokens or 0),)
        made = Part(Features(DECLARED.config, tensors, row.grid_thw, placeholder))
        result = Result(entry, info, row.width, row.height, row.taken_at, "JPEG", outcome=[made])
        seconds += _timed(functools.partial(recorder.take, result), time.process_time)[0]
    return seconds


def _digests(number: int) -> dict[bytes, int]:
    return {hashlib.sha256(one.to_bytes(8, "little")).digest(): 1000 + one for one in range(number)}


# ----------------------------------------------------------------------------------------------------------- cluster


def cluster(place: Path, told: argparse.Namespace) -> dict[str, Any] | None:
    """Hand a plan to Ray Data, and ask the process that knows which contents are encoded."""
    if importlib.util.find_spec("ray") is None:
        return None
    from qvsplit.pipeline.cluster.connection import connected
    from qvsplit.pipeline.cluster.contents import Contents
    from qvsplit.pipeline.cluster.driver import BLOCK_ITEMS
    from qvsplit.pipeline.cluster.packing import Numbered, numbered_table

    os.environ["RAY_AUTH_MODE"] = "disabled"
    number = told.entries // 3
    entries = [entry for one in _listings(number) for entry in one.entries()]
    result: dict[str, Any] = {"items": number}
    with connected("local", str(place)):
        import ray

        ray.data.from_arrow(numbered_table([Numbered(0, entries[0])]))  # imports what it needs

        def dataset() -> Any:
            numbered = [Numbered(number, entry) for number, entry in enumerate(entries)]
            blocks = [numbered_table(numbered[one : one + BLOCK_ITEMS]) for one in range(0, number, BLOCK_ITEMS)]
            return numbered, blocks, ray.data.from_arrow(blocks)

        before = bytes_in_kernel_file("/proc/self/status", "VmRSS") or 0
        seconds, made = _timed(dataset, time.process_time)
        grown = (bytes_in_kernel_file("/proc/self/status", "VmRSS") or 0) - before
        result["input_us"] = _say("of the CPU, a plan as input of Ray Data, an item", seconds / number * 1e6, "µs")
        result["input_bytes"] = _say("memory of the driver for it at the peak, an item", grown / number, "B")
        result["pickled_bytes"] = _say("of that in tables", sum(one.nbytes for one in made[1]) / number, "B")
        kept, made = made[2], None
        gc.collect()
        grown = (bytes_in_kernel_file("/proc/self/status", "VmRSS") or 0) - before
        result["kept_bytes"] = _say("memory of the driver for it while the job runs, an item", grown / number, "B")
        del kept
        actor = ray.remote(Contents).options(num_cpus=0).remote(str(place))
        ray.get(actor.__ray_ready__.remote())
        digests = [made_row(one).sha256 for one in range(2 * LOOKUPS)]
        seconds, _ = _timed(lambda: [ray.get(actor.claim.remote(digest, 0)) for digest in digests])
        result["claims_waiting_per_s"] = _say("answers a second to one who waits", len(digests) / seconds, "")
        seconds, _ = _timed(lambda: ray.get([actor.claim.remote(digest, 0) for digest in 5 * digests]))
        result["claims_per_s"] = _say("answers a second to one who does not", 5 * len(digests) / seconds, "")
    return result


# ----------------------------------------------------------------------------------------------------------- listing


def listing(place: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Walk a tree of empty files."""
    for number in range(told.walk):
        folder = place / made_folder(number // IN_FOLDER)
        if number % IN_FOLDER == 0:
            folder.mkdir(parents=True)
        os.close(os.open(place / made_path(number), os.O_CREAT | os.O_WRONLY))
    result: dict[str, Any] = {"files": told.walk}
    source = LocalFolders([place])
    seconds, listings = _timed(lambda: list(source.list({})))
    assert sum(one.number for one in listings) == told.walk
    result["new_per_s"] = _say("files a second, not known", told.walk / seconds, "")
    digests = {one.folder: one.digest for one in listings}
    del listings
    seconds, listings = _timed(lambda: list(source.list(digests)))
    assert all(one.known for one in listings if one.number)
    result["known_per_s"] = _say("files a second, known by digest", told.walk / seconds, "")
    result["peak_bytes"] = peak_memory()
    return result


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Any]] = {
    "catalogue": catalogue, "shards": real_shards, "commit": commit, "memory": memory, "cluster": cluster,
    "listing": listing,
}  # fmt: skip


if __name__ == "__main__":
    main()
