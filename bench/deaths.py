"""Kills survived out of kills tried: at every step of the writing, by power cuts, at random, in videos, in imports.

    python -m bench.deaths [--random 200] [--stride 1] [--images 40] [--signals 5]

With the fake encoder of the tests, as it is the writing that is tried, on pieces of real photographs; the signals meet
whole processes with the tiny checkpoint. After every death the same run is made again, and the store must be what an
uninterrupted run makes, row for row and bit for bit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qvsplit.errors import INTERRUPTED, TERMINATED
from qvsplit.store import layout
from tests.support.checkpoints import make_tiny
from tests.support.killing import Scenario, Server, contents, photographs_small, scenarios, survives, untidy
from tests.support.processes import start_process, wait_for

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGHUP: TERMINATED}
IMPORT_SECONDS = 4.0  # about what the libraries take
MOMENTS = {"frame": 82, "slice": 60, "part": 12}  # of the scenario of videos


def at_random(server: Server, folder: Path, kills: int, images: int, seed: int) -> tuple[int, int, list[str]]:
    """Kill first runs at moments spread over their length. Gives those tried, those met alive, and what went wrong."""
    photos, store = folder / "many", folder / "many-store"
    photographs_small(photos, images)
    words = {"paths": [str(photos)], "out": str(store), "options": {"model": "fake", "workers": 2, "patch_budget": 64}}
    whole = server.run("extract", words, shard_rows=6)
    expected, chance, wrong, met = contents(store), random.Random(seed), [], 0
    for number in range(kills):
        shutil.rmtree(store, ignore_errors=True)
        died = server.run("extract", words, after=chance.uniform(0, whole["seconds"]), shard_rows=6)
        met += died["status"] == -signal.SIGKILL
        again = server.run("extract", words, shard_rows=6)
        problem = f"status {again['status']}" if again["status"] else ""
        problem = problem or ("" if contents(store) == expected else "another store") or ", ".join(untidy(store))
        if problem:
            wrong.append(f"kill {number} after {died['seconds']:.3f} s: {problem}")
    return kills, met, wrong


def while_importing(folder: Path, times: int) -> tuple[int, list[str]]:
    """Send signals at moments spread over the import of libraries: each must end the process, and be said."""
    photos, model = folder / "few", folder / "tiny"
    photographs_small(photos, 4)
    make_tiny(model)
    wrong = []
    for number, code in CODES.items():
        for turn in range(times):
            seconds = IMPORT_SECONDS * turn / max(1, times)
            returned, said = _signalled(photos, model, folder / f"{number.name}-{turn}", number, seconds)
            ended = returned == code and said.splitlines()[-1:] == ["qvsplit: interrupted"]
            if not ended and returned != 0:  # 0: it was done before the signal came
                wrong.append(f"{number.name} after {seconds:.1f} s: {returned}, {said!r}")
    return len(CODES) * times, wrong


def _signalled(photos: Path, model: Path, out: Path, number: signal.Signals, seconds: float) -> tuple[int, str]:
    """Give the exit code of a run that has met a signal, and its stderr."""
    process = start_process("extract", photos, "--model", model, "--out", out)
    wait_for((out / layout.LOCK).exists, process)
    time.sleep(seconds)
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    return process.returncode, said


def at_steps(scenario: Scenario, server: Server, power: str | None, stride: int, first: int) -> tuple[int, list[str]]:
    """Die at every `stride`th step."""
    wrong, tried = [], 0
    for step in range(first, scenario.steps + 1, stride):
        tried += 1
        if problem := survives(scenario, server, step=step, power=power):
            wrong.append(f"{scenario.name}, {power or 'killed'}, step {step}: {problem}")
    return tried, wrong


def within_videos(scenario: Scenario, server: Server, stride: int) -> tuple[int, list[str]]:
    """Die at every `stride`th frame, slice and part of a run over real clips."""
    moments = [(which, number) for which, most in MOMENTS.items() for number in range(1, most + 1, stride)]
    outcomes = ((moment, survives(scenario, server, moment=moment)) for moment in moments)
    return len(moments), [f"{which} {number}: {problem}" for (which, number), problem in outcomes if problem]


class Tally:
    """What was tried and what went wrong, in a line each and in all."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, Any]] = {}
        self.wrong: list[str] = []

    def add(self, name: str, tried: int, wrong: list[str], **more: int) -> None:
        """Note the outcome of `tried` deaths."""
        survived = tried - len(wrong)
        self.table[name] = {"tried": tried, "survived": survived, **more}
        self.wrong += wrong
        notes = "".join(f", {number} {what}" for what, number in more.items())
        print(f"{name:24} {survived:5} of {tried} survived{notes}", flush=True)

    def total(self, column: str) -> int:
        """Add up a column."""
        return sum(line[column] for line in self.table.values())


def main() -> None:
    """Kill, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--stride", type=int, default=1, help="of the steps: 1 takes every one")
    parser.add_argument("--images", type=int, default=40, help="of the runs that are killed at random")
    parser.add_argument("--signals", type=int, default=5, help="of each kind, while libraries are imported")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as place, Server() as server:
        folder = Path(place)
        kills, met, wrong = at_random(server, folder, options.random, options.images, options.seed)
        tally.add("random moments", kills, wrong, **{"met the run alive": met})
        tally.add("signals while it imports", *while_importing(folder, options.signals))
        for scenario in scenarios(folder / "steps", server):
            for shift, power in enumerate((None, "lost", "torn")):
                outcome = at_steps(scenario, server, power, options.stride, 1 + shift * options.stride // 3)
                tally.add(f"{scenario.name}, {power or 'killed'}", *outcome)
            if scenario.name == "videos":
                tally.add("in the middle of videos", *within_videos(scenario, server, options.stride))
    for line in tally.wrong:
        print(line)
    result = {"tried": tally.total("tried"), "survived": tally.total("survived"), "stride": options.stride,
              "by": tally.table, "seconds": round(time.monotonic() - began, 1), "wrong": tally.wrong}  # fmt: skip
    print(json.dumps(result))
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
