"""Is anything lost or doubled when parts of a Ray cluster die while it extracts?

    python -m bench.ray_kills [--rounds 30] [--images 200] [--nodes 3] [--seed 0] [--limit 180] [--keep FOLDER]

A cluster of several nodes on this machine is kept for all rounds; each extracts the same items into a fresh store with
the tiny checkpoint: pieces of real photographs, copies of some, files that are no images, a short clip. At a random
moment of the round one of these is killed by SIGKILL:

    reader    a worker that reads and prepares
    encoder   a worker that encodes
    writer    a worker that describes blocks and writes shards
    writing   the same, while it writes a shard
    node      all processes of a node that the driver is not attached to; it is started again after the round
    driver    the process of `qvsplit extract` itself
    joined    its process that has joined the cluster

The run is made once more, at once; where the first one said that it had done its work, the second must find nothing to
do. Then the store must be what a run without Ray makes: the same current rows, features bit for bit, no
content held twice, no item current twice, no temporary file left, and `qvsplit verify` finds nothing. A round that does
not end within `--limit` seconds has failed, and what there was then is printed. `met` counts the kills that met the run
at work. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.checkpoints import make_tiny
from tests.support.clips import make_clip
from tests.support.killing import OLD, photographs_small
from tests.support.ray_cluster import MEGABYTE, RayCluster
from tests.support.same_store import differences

READER, ENCODER, WRITER, WRITING, NODE, DRIVER = "reader", "encoder", "writer", "writing", "node", "driver"
JOINED = "joined"
# What the workers' titles hold
TITLES = {READER: "ReadItems", ENCODER: "EncodeItems", WRITER: "ray::Writer", WRITING: "Writer.write_shard"}
KINDS = (READER, ENCODER, WRITER, WRITING, NODE, DRIVER, JOINED)
DONE = (0, 1)  # exit codes of a run that did its work
SIDE = 320  # of an image: features enough for several shards, of which none is larger than 1/16 of an object store
LATEST = 0.9  # of a span, as some runs are shorter
TAIL = 3000  # characters of what a process said that are printed


@dataclass
class Round:
    """What happened in one round.

    Attributes:
        kind: What was to be killed.
        met: It was killed while the run was at work.
        codes: Exit codes of the run, and of the one that was made once more.
        seconds: What the runs took.
        problem: What is wrong afterwards; empty if nothing is.
        after: Seconds from the start of the run to the kill.
    """

    kind: str
    met: bool = False
    codes: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    problem: str = ""
    after: float | None = None


class Trial:
    """One cluster, the items, and what a run without Ray makes of them."""

    def __init__(self, folder: Path, cluster: RayCluster, told: argparse.Namespace, chance: random.Random) -> None:
        """Make the items, and run once without Ray."""
        self.folder, self.cluster, self.told, self.chance = folder, cluster, told, chance
        self.photos, self.model = folder / "photos", folder / "tiny"
        make_items(self.photos, told.images)
        make_tiny(self.model)
        process = self._start(folder / "reference", by_ray=False)
        if process.wait(told.limit) not in DONE:
            raise RuntimeError(f"the run without Ray failed: {self._said()}")

    def spans(self) -> dict[str, tuple[float, float]]:
        """Run undisturbed: give from when to when there is something of each kind, in seconds from the start."""
        store, began = self.folder / "store", time.monotonic()
        spans: dict[str, tuple[float, float]] = {}
        process = self._start(store)
        while process.poll() is None and time.monotonic() - began < self.told.limit:
            now, titles = time.monotonic() - began, " ".join(one.title for one in self.cluster.workers())
            for kind in [kind for kind, title in TITLES.items() if title in titles]:
                for one in (kind, NODE):
                    spans[one] = spans.get(one, (now,))[0], now
            time.sleep(0.005)
        spans[DRIVER] = spans[JOINED] = 0.0, time.monotonic() - began
        spans.setdefault(WRITING, (0.0, 0.0))  # what is soon over may not have been seen
        if process.poll() not in DONE or spans.keys() < set(KINDS):
            process.kill()
            raise RuntimeError(f"an undisturbed run ended with {process.wait()}, seen {spans}: {self._said()}")
        if problem := self._differs(store):
            raise RuntimeError(f"an undisturbed run makes another store: {problem}")
        return spans

    def run(self, kind: str, moment: float, span: tuple[float, float]) -> Round:
        """Extract into a fresh store, and kill at that share of the span in which there is something to kill.

        Args:
            kind: What is killed; empty for nothing.
            moment: From 0 to 1.
            span: From when to when there is something to kill, in seconds from the start. Runs do not take as long as
                each other: it begins when there is something in this one.
        """
        store, this = self.folder / "store", Round(kind)
        shutil.rmtree(store, ignore_errors=True)
        process, began = self._start(store), time.monotonic()
        if kind:
            start = began if kind in (DRIVER, JOINED) else self._first(kind, process, began)
            while time.monotonic() - start < (span[1] - span[0]) * moment and process.poll() is None:
                time.sleep(0.005)
            this.met = self._kill(kind, process, began)
            this.after = round(time.monotonic() - began, 3) if this.met else None
        if not self._ended(process, began, this):
            return this
        was_cut = kind in (DRIVER, JOINED) or process.returncode not in DONE
        before = shards(store)
        process, began = self._start(store), time.monotonic()
        if not self._ended(process, began, this):
            return this
        if process.returncode not in DONE:
            this.problem = f"the next run ended with {process.returncode}: {self._said()}"
        elif not was_cut and shards(store) != before:
            this.problem = "the next run found something to do"
        else:
            this.problem = self._differs(store)
        return this

    def _first(self, kind: str, process: subprocess.Popen[bytes], began: float) -> float:
        """Wait until there is something of the kind, or the run has ended; give that moment."""
        titles = TITLES.values() if kind == NODE else (TITLES[kind],)
        while process.poll() is None and time.monotonic() - began < self.told.limit:
            if any(title in one.title for one in self.cluster.workers() for title in titles):
                break
            time.sleep(0.005)
        return time.monotonic()

    def _start(self, store: Path, *, by_ray: bool = True) -> subprocess.Popen[bytes]:
        words = [self.photos, "--out", store, "--model", self.model, "--device", "cpu", "--progress", "none"]
        ray = ["--ray", self.cluster.address, "--ray-encoders", self.told.encoders, "--workers", self.told.readers]
        command = [sys.executable, "-m", "qvsplit", "extract", *map(str, words + ray if by_ray else words)]
        with (self.folder / "said").open("wb") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env=self.cluster.environment
            )
        return self.process

    def close(self) -> None:
        """End the run in hand, if there is one."""
        self.process.kill()
        self.process.wait()

    def _said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")[-TAIL:]

    def _kill(self, kind: str, process: subprocess.Popen[bytes], began: float) -> bool:
        """Kill as soon as there is something of the kind. False if the run ended before."""
        while process.poll() is None and time.monotonic() - began < self.told.limit:
            if kind == DRIVER:
                process.kill()
                return True
            if kind == JOINED:
                if children := children_of(process.pid):
                    return self.cluster.kill(children[0])
            elif kind == NODE:
                busy = {one.node for title in TITLES.values() for one in self.cluster.workers(title)} - {0}
                if busy:
                    self.cluster.kill_node(self.chance.choice(sorted(busy)))
                    return True
            else:
                found = self.cluster.workers(TITLES[kind])
                if found and self.cluster.kill(self.chance.choice(found).pid):
                    return True
            time.sleep(0.002)
        return False

    def _ended(self, process: subprocess.Popen[bytes], began: float, this: Round) -> bool:
        try:
            process.wait(max(0.0, self.told.limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            titles = Counter(f"node {one.node}: {one.title}" for one in self.cluster.workers())
            process.kill()
            process.wait()
            this.problem = f"it hangs. Workers: {dict(titles)}. It said: {self._said()}"
        this.codes.append(None if this.problem else process.returncode)
        this.seconds.append(round(time.monotonic() - began, 2))
        return not this.problem

    def _differs(self, store: Path) -> str:
        """Say in what a store is not as one of a run without Ray."""
        wrong = differences(store, self.folder / "reference")
        command = [sys.executable, "-m", "qvsplit", "verify", str(store)]
        verified = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.cluster.environment, timeout=self.told.limit
        )
        if verified.returncode:
            wrong.append(f"verify ended with {verified.returncode}: {(verified.stdout + verified.stderr)[-TAIL:]}")
        return "; ".join(wrong[:5]) + (f"; {len(wrong) - 5} more" if len(wrong) > 5 else "")


def make_items(folder: Path, images: int) -> None:
    """Make small images, a copy of each eighth, some files that are no images, a clip and a copy of it."""
    for index, path in enumerate(photographs_small(folder, images - images // 8 - 7, SIDE)):
        if index % 7 == 0:
            shutil.copy2(path, folder / f"copy-of-{path.name}")
    for index in range(4):
        (folder / f"bad-{index}.png").write_bytes(b"no image %d" % index)
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:200])
    make_clip(folder / "clip.mp4", 24)
    shutil.copy2(folder / "clip.mp4", folder / "copy-of-clip.mp4")
    for path in folder.iterdir():
        os.utime(path, (OLD, OLD))


def shards(store: Path) -> list[str]:
    """List a store's shards by name."""
    return sorted(path.name for path in store.glob("shard-*.parquet"))


def children_of(process: int) -> list[int]:
    """List the children of a process that run Python."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    found = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return [child for child in found if b"cluster.driver" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kinds_of(told: argparse.Namespace, chance: random.Random) -> list[str]:
    """Give what is killed in each round: all kinds as often, in a random order."""
    kinds = [told.only[number % len(told.only)] for number in range(told.rounds)]
    chance.shuffle(kinds)
    return kinds


def tell(rounds: list[Round], say: Callable[[str], object] = print) -> dict[str, dict[str, int]]:
    """Print a line a kind; give the same by kind."""
    table = {}
    say(f"\n{'killed':10} {'rounds':>7} {'met':>5} {'went on':>8} {'once more':>10} {'as without Ray':>15}")
    for kind in sorted({one.kind for one in rounds}, key=KINDS.index):
        these = [one for one in rounds if one.kind == kind]
        table[kind] = {
            "rounds": len(these),
            "met": sum(one.met for one in these),
            "went_on": sum(one.met and one.codes[:1] in ([0], [1]) for one in these),
            "once_more": sum(one.codes[:1] not in ([0], [1]) for one in these),
            "same": sum(not one.problem for one in these),
        }
        say("{:10} {rounds:7} {met:5} {went_on:8} {once_more:10} {same:15}".format(kind, **table[kind]))
    return table


def main() -> None:
    """Kill, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=200, help="files in all, copies and broken ones among them")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="of a node, as Ray counts them")
    parser.add_argument("--encoders", default="1:2", help="as of --ray-encoders")
    parser.add_argument("--readers", type=int, default=2, help="as of --workers; each takes seconds to start")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a run may take")
    parser.add_argument("--keep", type=Path, help="where stores that are not right are copied to")
    told = parser.parse_args()
    began, chance = time.monotonic(), random.Random(told.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cache = {"QVSPLIT_CACHE": str(folder / "cache")}
        with (
            RayCluster(told.nodes, cpus=told.cpus, object_store_bytes=80 * MEGABYTE, environment=cache) as cluster,
            closing(Trial(folder, cluster, told, chance)) as trial,
        ):
            spans = trial.spans()
            print(f"{told.nodes} nodes, started in {cluster.start_seconds:.1f} s; undisturbed, there is in seconds")
            for kind, (first, last) in spans.items():
                print(f"  {kind:10} {first:6.1f} to {last:6.1f}", flush=True)
            shortest = spans[DRIVER][1]  # of the runs so far: machines are not always as busy
            for number, kind in enumerate(kinds_of(told, chance), 1):
                one = trial.run(kind, chance.random() * LATEST * shortest / spans[DRIVER][1], spans[kind])
                rounds.append(one)
                if kind not in (DRIVER, JOINED) and one.codes[0] in DONE:
                    shortest = min(shortest, one.seconds[0])
                outcome = one.problem or "as without Ray"
                print(f"round {number}: {kind}, killed after {one.after} s, exit codes {one.codes}, "
                      f"{one.seconds} s: {outcome}", flush=True)  # fmt: skip
                if one.problem and told.keep:
                    shutil.copytree(folder / "store", told.keep / f"round-{number}", dirs_exist_ok=True)
                for dead in set(range(told.nodes)) - set(cluster.raylets):
                    cluster.start_node(dead)
                cluster.idle()
    table = tell(rounds)
    wrong = [f"round {number}, {one.kind}: {one.problem}" for number, one in enumerate(rounds, 1) if one.problem]
    print(json.dumps({
        "bench": "ray_kills", "nodes": told.nodes, "images": told.images, "seed": told.seed, "rounds": len(rounds),
        "met": sum(one.met for one in rounds), "same": len(rounds) - len(wrong), "by": table,
        "undisturbed_seconds": round(spans[DRIVER][1], 1), "seconds": round(time.monotonic() - began, 1),
        "wrong": wrong,
    }))  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
