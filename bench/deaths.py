"""Kills survived out of kills tried: at every step of the writing, by power cuts, and at moments at random.

    python bench/deaths.py [--random 200] [--stride 1] [--pictures 40]

On the tiny checkpoint of the tests, with pieces of real photographs. After every death the same run is made again, and
the album must be what an uninterrupted run makes, row for row; embeddings bit for bit where the batches were the same,
within the batching tolerance where a killed run's were others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from killing import Scenario, Server, contents, photographs_small, scenarios, survives, untidy
from make_checkpoint import make_tiny

TOLERANCE = 1e-5  # relative and absolute, of float32


def at_random(
    server: Server, folder: Path, model: str, kills: int, pictures: int, seed: int
) -> tuple[int, int, list[str]]:
    """Kill first runs at moments spread over their length. Gives those tried, those met alive, and what went wrong."""
    photos, album = folder / "many", folder / "many-album"
    photographs_small(photos, pictures)
    words = {"paths": [str(photos)], "out": str(album), "settings": {"model": model, "workers": 2, "patch_budget": 64}}
    whole = server.run("extract", words, shard_rows=6)
    expected, chance, wrong, met = contents(album), random.Random(seed), [], 0
    for number in range(kills):
        shutil.rmtree(album)
        died = server.run("extract", words, after=chance.uniform(0, whole["seconds"]), shard_rows=6)
        met += died["status"] == -signal.SIGKILL
        again = server.run("extract", words, shard_rows=6)
        problem = f"status {again['status']}" if again["status"] else _differs(contents(album), expected)
        problem = problem or ", ".join(untidy(album))
        if problem:
            wrong.append(f"kill {number} after {died['seconds']:.3f} s: {problem}")
    return kills, met, wrong


def _differs(found: dict[Any, Any], expected: dict[Any, Any]) -> str:
    if found.keys() != expected.keys():
        return "other rows"
    for key, row in found.items():
        if row[:-1] != expected[key][:-1]:
            return f"row {key} differs"
        one, other = (np.frombuffer(blob, np.float32) for blob in (row[-1], expected[key][-1]))
        if not np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE):
            return f"embeddings of {key} differ by {np.abs(one - other).max()}"
    return ""


def at_steps(scenario: Scenario, server: Server, power: str | None, stride: int, first: int) -> tuple[int, list[str]]:
    """Die at every `stride`th step."""
    wrong, tried = [], 0
    for step in range(first, scenario.steps + 1, stride):
        tried += 1
        if problem := survives(scenario, server, step=step, power=power):
            wrong.append(f"{scenario.name}, {power or 'killed'}, step {step}: {problem}")
    return tried, wrong


def main() -> None:
    """Kill, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--stride", type=int, default=1, help="of the steps: 1 takes every one")
    parser.add_argument("--pictures", type=int, default=40, help="of the runs that are killed at random")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    began, tried, table = time.monotonic(), 0, {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place, Server() as server:
        folder = Path(place)
        make_tiny(folder / "tiny")
        model = str(folder / "tiny")
        kills, met, problems = at_random(server, folder, model, told.random, told.pictures, told.seed)
        table["random moments"] = {"tried": kills, "met alive": met, "survived": kills - len(problems)}
        print(
            f"random moments       {kills - len(problems):5} of {kills} survived ({met} met the run alive)", flush=True
        )
        tried, wrong = tried + kills, wrong + problems
        for scenario in scenarios(folder / "steps", server, model):
            for shift, power in enumerate((None, "lost", "torn")):
                number, problems = at_steps(scenario, server, power, told.stride, 1 + shift * told.stride // 3)
                name = f"{scenario.name}, {power or 'killed'}"
                table[name] = {"tried": number, "survived": number - len(problems)}
                print(f"{name:20} {number - len(problems):5} of {number} survived", flush=True)
                tried, wrong = tried + number, wrong + problems
    for line in wrong:
        print(line)
    print(
        json.dumps(
            {
                "tried": tried,
                "survived": tried - len(wrong),
                "stride": told.stride,
                "by": table,
                "seconds": round(time.monotonic() - began, 1),
                "wrong": wrong,
            }
        )
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
