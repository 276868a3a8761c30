"""What does a niced run cost beside a busy process, and what would its share of the cores allow?

    python -m bench.neighbours CHECKPOINT [--rounds 3] [--images 6] [--questions 60] [--threads 1]

CHECKPOINT: `python -m tests.support.checkpoints DIR --shape 113m`. `qvsplit extract` and `qvsplit ask`, whole runs with
`nice -n 19`, from start to end:

    passive  as the command line sets it by itself: OpenMP's threads sleep while they wait
    default  with a variable of OpenMP's set, so that it does not: they spin

each with nobody beside, beside a process at nice 0 that counts in Python (one core), and beside one that multiplies
matrices in torch on all cores but one. The share is what a niced process gets that does nothing but spin, on as many
threads, in the same place: its CPU time by the time of all cores. Of each run there are

    ratio   seconds by what the share allows: the seconds with nobody and the same setting / share
    strict  the same, where a run is not allowed more time for what one core does alone, imports above all: the larger
            one of the seconds with nobody and of the CPU seconds with nobody / (share x cores)
    cost    seconds by those of `default` with nobody

Niceness counts among processes of one session where the kernel groups by sessions: all of these are of one. Last line:
one JSON object.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine import machine
from qvsplit.runtime.cpus import OPENMP_VARIABLES, usable_cpus

NICED = ["nice", "-n", "19", sys.executable]
# OMP_DYNAMIC=false is the default: it changes nothing but that a variable of OpenMP's is set
SETTINGS = {"passive": {}, "default": {"OMP_DYNAMIC": "false"}}
NEIGHBOURS = {
    "nobody": "",
    "counting": "print(flush=True)\nwhile True: pass",
    "torch": """
import os, torch
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
x = torch.randn(1024, 1024)
print(flush=True)
while True: x @ x
""",
}
SPIN = """
import hashlib, sys, threading, time
seconds, threads = float(sys.argv[1]), int(sys.argv[2])
end = time.monotonic() + seconds
def spin():
    while time.monotonic() < end: hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)  # without the interpreter's lock
running = [threading.Thread(target=spin) for _ in range(threads)]
began = time.monotonic(), time.process_time()
for one in running: one.start()
for one in running: one.join()
print((time.process_time() - began[1]) / (time.monotonic() - began[0]))
"""
SHARE_SECONDS = 4.0
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")


def main() -> None:
    """Run everything in turn, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--threads", default="", help="also with so many threads, by OMP_NUM_THREADS [default: none]")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="`passive` alone takes a fraction of the time")
    parser.add_argument("--work", default="extract,ask")
    parser.add_argument("--beside", default=",".join(NEIGHBOURS))
    told = parser.parse_args()
    settings = {name: SETTINGS[name] for name in told.settings.split(",")} | {
        f"passive, {threads} threads": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads}
        for threads in told.threads.split(",")
        if threads
    }
    beside = told.beside.split(",")
    with tempfile.TemporaryDirectory() as folder:
        works = _works(Path(folder), told)
        shares = {name: _share(name) for name in beside}
        results = {work: _measured(words, settings, beside, told.rounds) for work, words in works.items()}
    for work, by_setting in results.items():
        for setting, by_neighbour in by_setting.items():
            _add_ratios(by_neighbour, by_setting.get("default", by_setting["passive"]), shares)
            for name, result in by_neighbour.items():
                print(f"{work:8} {setting:20} {name:9} {_line(result)}")
    print(json.dumps({"bench": "neighbours", "machine": machine(), "usable cores": usable_cpus(), "shares": shares,
                      "images": told.images, "questions": told.questions, "results": results}))  # fmt: skip


def _works(folder: Path, told: argparse.Namespace) -> dict[str, list[str]]:
    """Give the words of each command; the store that is asked is made here."""
    import skimage

    photographs, store = folder / "photographs", folder / "store"
    photographs.mkdir()
    for number in range(told.images):
        source = Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        # a byte behind the end makes it another file, and changes no pixel
        (photographs / f"{number}{source.suffix}").write_bytes(source.read_bytes() + bytes([number]))
    extract = ["extract", str(photographs), "--model", str(told.checkpoint), "--device", "cpu", "--quiet", "--out"]
    subprocess.run([sys.executable, "-m", "qvsplit", *extract, str(store)], check=True)
    questions = [f"What is at place {number}?" for number in range(told.questions)]
    works = {
        "extract": [*extract, str(folder / "again")],
        "ask": ["ask", "--embeds", str(store), "--device", "cpu", "--max-new-tokens", "8", "--quiet", *questions],
    }
    return {name: works[name] for name in told.work.split(",")}


def _measured(
    words: list[str], settings: dict[str, dict[str, str]], beside: list[str], rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {s: {name: [] for name in beside} for s in settings}
    for _ in range(rounds):
        for name in beside:
            with _neighbour(name):
                for setting, variables in settings.items():
                    runs[setting][name].append(_run(words, variables))
                    print(
                        f"{words[0]} {setting} {name} {runs[setting][name][-1][0]:.1f} s", file=sys.stderr, flush=True
                    )
    return {
        setting: {name: _medians(pairs) for name, pairs in by_neighbour.items()}
        for setting, by_neighbour in runs.items()
    }


def _medians(pairs: list[tuple[float, float]]) -> dict[str, float]:
    seconds, cpu_seconds = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def _run(words: list[str], variables: dict[str, str]) -> tuple[float, float]:
    """Give the seconds of a niced run from start to end, and its CPU seconds."""
    if words[0] == "extract":
        shutil.rmtree(words[-1], ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP_VARIABLES)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*NICED, "-m", "qvsplit", *words], env=environment | variables, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime


@contextmanager
def _neighbour(name: str) -> Iterator[None]:
    """Have a process at nice 0 compute inside the block."""
    if not NEIGHBOURS[name]:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", NEIGHBOURS[name]], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it computes from now on
            yield
        finally:
            process.kill()


def _share(name: str) -> float:
    """Give the share of all cores that a niced process gets which spins on as many threads."""
    with _neighbour(name):
        done = subprocess.run(
            [*NICED, "-c", SPIN, str(SHARE_SECONDS), str(usable_cpus())], stdout=subprocess.PIPE, check=True
        )
    return float(done.stdout) / usable_cpus()


def _add_ratios(
    by_neighbour: dict[str, dict[str, Any]], default: dict[str, dict[str, Any]], shares: dict[str, float]
) -> None:
    for name, result in by_neighbour.items():
        allowed = shares[name] / shares["nobody"]
        alone = by_neighbour["nobody"]
        result["ratio"] = result["seconds"] * allowed / alone["seconds"]
        result["strict"] = result["seconds"] / max(
            alone["seconds"], alone["cpu_seconds"] / (shares[name] * usable_cpus())
        )
        result["cost"] = result["seconds"] / default["nobody"]["seconds"]


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['seconds']:7.1f} s, {result['cpu_seconds']:7.1f} s of CPU; by what the share allows "
        f"{result['ratio']:5.2f}, strictly {result['strict']:5.2f}; by default with nobody {result['cost']:5.2f}"
    )


if __name__ == "__main__":
    main()
