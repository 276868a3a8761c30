"""How much of Ray's object stores does an extraction take, where the encoder is much slower than the readers?

    python -m bench.ray_memory [--images 120] [--nodes 3] [--store-mb 100] [--depth 4] [--pixels 200000]

A cluster of several nodes on this machine, each with a small object store; one encoder with the true widths of
Qwen2-VL-2B's and `--depth` layers, random; photographs whose prepared pixels together are several times what the object
stores hold. Readers could have them all prepared long before the encoder is done: what is held back is what the object
stores hold at most. Every node is looked at some times a second until the run has ended.

    used       the most that objects took at a look
    touched    shared memory that was ever written to: no more was used at any moment between two looks
    spilled    what was moved to the disk as it did not fit

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.extract import make_photographs
from bench.machine import machine
from bench.ray_overhead import make_encoder
from qvsplit.store.opening import open_store
from tests.support.ray_cluster import MEGABYTE, ObjectStore, RayCluster

LOOK_SECONDS = 0.2
PATCH_BYTES = 2 * 3 * 14 * 14 * 4  # of prepared pixels: two frames, three channels, float32
PATCHES_A_TOKEN = 4


def most(looks: list[list[ObjectStore]], field: str) -> dict[int, int]:
    """Give the most of a field, by node."""
    found: dict[int, int] = {}
    for look in looks:
        for one in look:
            found[one.node] = max(found.get(one.node, 0), getattr(one, field))
    return found


def watch(command: list[str], cluster: RayCluster, limit: float) -> tuple[list[list[ObjectStore]], float]:
    """Run a command to its end; give what the object stores held at each look, and the seconds it took."""
    looks: list[list[ObjectStore]] = []
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, text=True, env=cluster.environment)
        try:
            while process.poll() is None:
                looks.append(cluster.object_stores())
                if time.monotonic() - began > limit:
                    raise TimeoutError(f"it has not ended after {limit:.0f} s")
                time.sleep(LOOK_SECONDS)
        finally:
            process.kill()
            process.wait()
        looks.append(cluster.object_stores())
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"it ended with {process.returncode}: {said.read()[-3000:]}")
    return looks, time.monotonic() - began


def main() -> None:
    """Extract, and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="of a node, as Ray counts them")
    parser.add_argument("--store-mb", type=int, default=100, help="of a node's object store; Ray takes no less than 79")
    parser.add_argument("--depth", type=int, default=4, help="layers of the encoder")
    parser.add_argument("--pixels", type=int, default=200_000, help="of the largest photograph")
    parser.add_argument("--encoders", default="1:1", help="as of --ray-encoders")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that the run may take")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_encoder(folder / "model", told.depth)
        make_photographs(folder / "photos", told.images, told.pixels)
        words = [folder / "photos", "--out", folder / "store", "--model", folder / "model", "--device", "cpu"]
        capacity = told.store_mb * MEGABYTE
        cache = {"QVSPLIT_CACHE": str(folder / "cache")}
        with RayCluster(told.nodes, cpus=told.cpus, object_store_bytes=capacity, environment=cache) as cluster:
            command = [sys.executable, "-m", "qvsplit", "extract", *map(str, words), "--progress", "none",
                       "--ray", cluster.address, "--ray-encoders", told.encoders]  # fmt: skip
            looks, seconds = watch(command, cluster, told.limit)
        rows = list(open_store(folder / "store").rows)
    tokens = sum(row.n_tokens or 0 for row in rows)
    prepared = tokens * PATCHES_A_TOKEN * PATCH_BYTES
    used, touched, spilled = (most(looks, name) for name in ("used", "touched", "spilled_in_all"))
    summed = max(sum(one.used for one in look) for look in looks)
    on_disk = max(sum(one.spilled for one in look) for look in looks)
    print(f"{len(rows)} images, {tokens:,} tokens, {seconds:.0f} s; prepared pixels {prepared / 1e6:,.0f} MB in all, "
          f"object stores {told.nodes} x {told.store_mb} MB, {len(looks)} looks")  # fmt: skip
    print(f"{'node':>6} {'used':>10} {'of capacity':>12} {'touched':>10} {'spilled':>10}")
    for node in sorted(used):
        print(f"{node:6} {used[node] / 1e6:7.1f} MB {used[node] / capacity:11.0%} {touched[node] / 1e6:7.1f} MB "
              f"{spilled[node] / 1e6:7.1f} MB")  # fmt: skip
    share = summed / (capacity * told.nodes)
    print(f"{'all':>6} {summed / 1e6:7.1f} MB {share:11.0%}, on the disk at most {on_disk / 1e6:.1f} MB")
    print(json.dumps({
        "bench": "ray_memory", "machine": machine(), "images": len(rows), "tokens": tokens,
        "seconds": round(seconds, 1), "nodes": told.nodes, "capacity_bytes": capacity, "prepared_bytes": prepared,
        "looks": len(looks), "most_used_bytes": used, "most_touched_bytes": touched, "spilled_bytes": spilled,
        "most_used_together_bytes": summed, "most_used_together_share": round(share, 3),
        "most_on_disk_bytes": on_disk,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
