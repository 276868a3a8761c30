"""How small are the files, how fast are they read and written, and how long does a large store take to open?

    python -m bench.store CHECKPOINT [--rounds 5] [--store-gb 10] [--shards 1000] [--folder DIR]

Embeddings of the photographs that scikit-image and scikit-learn ship: by the demo model, and by the encoder of
CHECKPOINT (`python -m tests.support.checkpoints DIR --shape 2b --vision-depth 4`), as computed in float32 and rounded
to bfloat16. Layouts, each written with fsync and read whole in one process, one thread:

    lists        Parquet, a list of values an image, BYTE_STREAM_SPLIT, zstd level 1 (float32; Parquet has no bfloat16)
    blob         Parquet, a blob an image, not compressed
    blob zstd    the same, zstd level 1
    npy          one .npy file an image
    safetensors  one .safetensors file an image
    qvsplit      a shard: byte planes, zstd level 1, checksums, every value checked to be finite, both ways

The limit is the entropy of order 0 of sign and exponent, the mantissa's bits being taken as random. Cold: the files'
pages are dropped from the page cache first. Then a store of so many gigabytes, from which single rows are read, and
one of so many shards, which is opened; whole processes as well as in one. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # rates are a core's

import numpy as np
import numpy.typing as npt

Arrays = list[npt.NDArray[Any]]


def main() -> None:
    """Measure layouts on every kind of features, then the two large stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store-gb", type=float, default=10)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to work: the disk that is measured")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=told.folder) as folder:
        results = {}
        for name, model, cuts in (("demo", "demo", 40), ("2b", str(told.checkpoint), 1)):
            single = _embeddings(model, Path(folder) / name, cuts)
            results[f"{name} float32"] = _layouts(single, "float32", Path(folder), told.rounds)
            results[f"{name} bfloat16"] = _layouts(
                [_rounded(one) for one in single], "bfloat16", Path(folder), told.rounds
            )
        large = _large(single, Path(folder) / "large", int(told.store_gb * 1e9))
        many = _many([_rounded(one[:64]) for one in single], Path(folder) / "many", told.shards)
    print(json.dumps({
        "bench": "store", "machine": platform.machine(), "cores": os.cpu_count(), "layouts": results, "large": large,
        "many": many,
    }))  # fmt: skip


def _embeddings(model: str, folder: Path, cuts: int) -> Arrays:
    """float32 [n_tokens, hidden_size] by `extract`, of every photograph, cut at its margin in so many ways."""
    from PIL import Image

    import qvsplit
    from tests.support.photographs import photographs

    (folder / "photos").mkdir(parents=True)
    for path in photographs():
        with Image.open(path) as image:
            for cut in range(cuts):
                part = image.convert("RGB").crop((3 * cut, 2 * cut, image.width - cut, image.height - cut))
                part.save(folder / "photos" / f"{path.stem}-{cut:02}.jpg", quality=90)
    options = qvsplit.ExtractOptions(model=model, dtype="float32")
    qvsplit.extract_files([folder / "photos"], out=folder / "store", options=options)
    store = qvsplit.open_store(folder / "store")
    return [np.array(store.features(row)["pooler_output"], np.float32) for row in store]


def _rounded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bfloat16, as uint16, to the nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def entropy_share(arrays: Arrays) -> float:
    """Bits a value by the entropy of sign and exponent, and all of the mantissa's, over the bits that it takes raw."""
    values = np.concatenate([one.reshape(-1).view(f"u{one.itemsize}") for one in arrays])
    mantissa = 23 if values.itemsize == 4 else 7
    counts = np.unique(values >> mantissa, return_counts=True)[1] / values.size
    return float(-(counts * np.log2(counts)).sum() + mantissa) / (8 * values.itemsize)


# ---------------------------------------------------------------------------------------------------------- layouts


def _layouts(arrays: Arrays, dtype: str, folder: Path, rounds: int) -> dict[str, Any]:
    raw = sum(one.nbytes for one in arrays)
    limit = entropy_share(arrays)
    print(f"\n{dtype}, width {arrays[0].shape[1]}: {len(arrays)} images, {raw / 1e6:.0f} MB raw; limit {limit:.4f}")
    print(f"{'':12} {'of raw':>8} {'of limit':>9} {'write':>10} {'read':>10} {'cold':>10}")
    told = {}
    for name, (write, read) in LAYOUTS.items():
        if name == "lists" and dtype != "float32":
            continue
        times: dict[str, list[float]] = {"write": [], "read": [], "cold": []}
        for number in range(rounds):
            place = folder / f"{name}-{dtype}-{arrays[0].shape[1]}-{number}"
            place.mkdir()
            times["write"].append(_timed(functools.partial(write, arrays, dtype, place)))
            size = sum(file.stat().st_size for file in place.iterdir() if file.is_file())
            times["read"].append(_timed(functools.partial(read, place, dtype)))
            _drop(place)
            times["cold"].append(_timed(functools.partial(read, place, dtype)))
            shutil.rmtree(place)
        rate = {key: raw / statistics.median(seconds) / 1e6 for key, seconds in times.items()}
        rates = {f"{key}_mb_s": value for key, value in rate.items()}
        told[name] = {"of_raw": size / raw, "of_limit": size / raw / limit} | rates
        print(f"{name:12} {size / raw:8.4f} {size / raw / limit:9.4f} "
              + " ".join(f"{rate[key]:5.0f} MB/s" for key in times))  # fmt: skip
    return {"limit_of_raw": limit, "raw_bytes": raw, "layouts": told}


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _drop(folder: Path) -> None:
    """The pages of a folder's files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_table(arrays: Arrays, column: Any, place: Path, **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    group = max(1, (4 << 20) // max(one.nbytes for one in arrays))  # rows, of about as much as qvsplit's row groups
    pq.write_table(pa.table({"e": column}), place / "t.parquet", use_dictionary=False, row_group_size=group,
                   write_statistics=False, **options)  # fmt: skip
    _sync(place / "t.parquet")


def _read_table(place: Path, dtype: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    with pq.ParquetFile(place / "t.parquet", page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)


def write_lists(arrays: Arrays, dtype: str, place: Path) -> None:
    """A list of values an image."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(one.size for one in arrays)])
    values = pa.array(np.concatenate([one.reshape(-1) for one in arrays]))
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    _write_table(arrays, column, place, compression="zstd", compression_level=1,
                 column_encoding={"e.list.element": "BYTE_STREAM_SPLIT"})  # fmt: skip


def write_blobs(arrays: Arrays, dtype: str, place: Path, compression: str = "none") -> None:
    """A blob an image."""
    import pyarrow as pa

    column = pa.array([one.tobytes() for one in arrays], pa.large_binary())
    level = {"compression_level": 1} if compression == "zstd" else {}
    _write_table(arrays, column, place, compression=compression, write_page_checksum=True, **level)


def write_blobs_zstd(arrays: Arrays, dtype: str, place: Path) -> None:
    """The same, compressed."""
    write_blobs(arrays, dtype, place, "zstd")


def write_npy(arrays: Arrays, dtype: str, place: Path) -> None:
    """A file an image."""
    for index, one in enumerate(arrays):
        np.save(place / f"{index:05}.npy", one)
        _sync(place / f"{index:05}.npy")


def read_npy(place: Path, dtype: str) -> None:
    """All of them."""
    for file in sorted(place.iterdir()):
        np.load(file)


def write_safetensors(arrays: Arrays, dtype: str, place: Path) -> None:
    """A file an image."""
    from safetensors.numpy import save_file

    for index, one in enumerate(arrays):
        save_file({"e": one}, place / f"{index:05}.safetensors")
        _sync(place / f"{index:05}.safetensors")


def read_safetensors(place: Path, dtype: str) -> None:
    """All of them."""
    from safetensors.numpy import load_file

    for file in sorted(place.iterdir()):
        load_file(file)


def write_shard(arrays: Arrays, dtype: str, place: Path, name: str = "shard-000001.parquet", first: int = 0) -> None:
    """A shard of qvsplit's."""
    from bench.synthetic import features, row, schema
    from qvsplit.store.shard_writer import ShardWriter
    from qvsplit.store.storage import LocalStorage

    declared = schema(dtype, arrays[0].shape[1])
    writer = ShardWriter(LocalStorage(place), name, declared)
    for index, one in enumerate(arrays, first):
        raw = one.reshape(len(one), -1).view(np.uint8)
        writer.add(row("/photos", f"{index:07}.jpg", len(one)), features(declared, raw))
    writer.finish()


def read_shard(place: Path, dtype: str) -> None:
    """Every row of it, checked."""
    from qvsplit.store.shard_reader import open_shard

    for _, _, stored in open_shard(place / "shard-000001.parquet"):
        assert stored is not None


LAYOUTS: dict[str, tuple[Callable[..., None], Callable[[Path, str], None]]] = {
    "lists": (write_lists, _read_table), "blob": (write_blobs, _read_table),
    "blob zstd": (write_blobs_zstd, _read_table), "npy": (write_npy, read_npy),
    "safetensors": (write_safetensors, read_safetensors), "qvsplit": (write_shard, read_shard),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------ large stores

ONE_ROW = """
import sys, time
start = time.perf_counter()
import numpy, pyarrow.parquet
import qvsplit
began = time.perf_counter()
store = qvsplit.open_store(sys.argv[1])
opened = time.perf_counter()
rows = store.rows
row = rows[int(sys.argv[2]) % len(rows)]
found = time.perf_counter()
store.features(row)
print(began - start, opened - began, time.perf_counter() - found, len(rows))
"""


def _open_and_read(folder: Path, *, cold: bool, repeats: int) -> dict[str, float]:
    """Medians over fresh processes: importing the libraries, opening the store, and reading one row at random."""
    imported, opened, read, rows = [], [], [], 0
    for number in range(repeats):
        if cold:
            _drop(folder)
        command = [sys.executable, "-c", ONE_ROW, str(folder), str(random.Random(number).randrange(1 << 30))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        zeroth, first, second, count = done.stdout.split()
        imported.append(float(zeroth))
        opened.append(float(first))
        read.append(float(second))
        rows = int(count)
    return {
        "import_seconds": statistics.median(imported),
        "open_seconds": statistics.median(opened),
        "row_seconds": statistics.median(read),
        "row_seconds_worst": max(read),
        "rows": rows,
    }


def _large(arrays: Arrays, folder: Path, size: int) -> dict[str, Any]:
    """A store of `size` bytes in shards of the product's own size."""
    from qvsplit.store.catalogue_file import catalogue_of
    from qvsplit.store.shards import shard_files
    from qvsplit.store.storage import LocalStorage
    from qvsplit.store.store_writer import SHARD_BYTES

    folder.mkdir()
    number, written, at = 0, 0, 0
    while written < size:
        batch, raw = [], 0
        while raw < SHARD_BYTES:
            batch.append(arrays[at % len(arrays)])
            raw, at = raw + batch[-1].nbytes, at + 1
        number += 1
        name = f"shard-{number:06}.parquet"
        write_shard(batch, "float32", folder, name, first=at - len(batch))
        written += (folder / name).stat().st_size
    storage = LocalStorage(folder)
    catalogue_of(storage, shard_files(storage)).close()
    return _tell("large", folder, number, written)


def _many(arrays: Arrays, folder: Path, shards: int) -> dict[str, Any]:
    """A store of so many shards, 32 images each."""
    from qvsplit.store.catalogue_file import catalogue_of
    from qvsplit.store.shards import shard_files
    from qvsplit.store.storage import LocalStorage

    folder.mkdir()
    for number in range(shards):
        batch = [arrays[(number + index) % len(arrays)] for index in range(32)]
        write_shard(batch, "bfloat16", folder, f"shard-{number + 1:06}.parquet", first=32 * number)
    storage = LocalStorage(folder)
    catalogue_of(storage, shard_files(storage)).close()
    return _tell("many shards", folder, shards, sum(file.stat().st_size for file in folder.glob("*.parquet")))


def _tell(name: str, folder: Path, shards: int, size: int) -> dict[str, Any]:
    warm, cold = (_open_and_read(folder, cold=cold, repeats=5) for cold in (False, True))
    print(f"\n{name}: {warm['rows']:,} rows in {shards:,} shards, {size / 1e9:.2f} GB")
    for kind, one in (("warm", warm), ("cold", cold)):
        ms = {key: value * 1e3 for key, value in one.items()}
        print(f"  {kind}: import {ms['import_seconds']:.0f} ms, open {ms['open_seconds']:.0f} ms, one row "
              f"{ms['row_seconds']:.1f} ms (worst {ms['row_seconds_worst']:.1f})")  # fmt: skip
    return {"shards": shards, "bytes": size, "warm": warm, "cold": cold}


if __name__ == "__main__":
    main()
