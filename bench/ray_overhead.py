"""What does Ray cost? `extract` with and without it on the same cores and images, side by side, beyond start-up.

    python -m bench.ray_overhead [--images 2000] [--rounds 3] [--depth 1] [--pixels 65000] [--encoders 1:1 2:2]

The checkpoint has the true widths of Qwen2-VL-2B's encoder and its first `--depth` layers, random: the fewer layers,
the more of the time is Ray's. The photographs are those that scikit-image and scikit-learn ship, each a crop of its
own, saved as JPEG of at most `--pixels` pixels. Each contender is a process of its own, in turn, in another order each
round:

    plain       without Ray
    ray 1:1     `--ray local --ray-encoders 1:1`, and so on

Each contender runs twice a round: on the first `--few` photographs, and on all. What the second took longer, by the
images it had more, is `an image`: start-up, which is the rest, is in neither. `first` is when a caller hears of the
first item. The stores must be the same, features bit for bit. Medians of the rounds, and the ratios of these. The last
line is one JSON object.
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
from pathlib import Path

from bench.extract import make_photographs
from bench.machine import machine
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from tests.support.checkpoints import make_2b
from tests.support.same_store import differences

PLAIN = "plain"


def make_encoder(folder: Path, depth: int) -> None:
    """Make a checkpoint whose encoder has Qwen2-VL-2B's widths and so many layers; its language model has one layer."""
    make_2b(folder, layout="today", vision_depth=depth, layers=1)


def environment(folder: Path) -> dict[str, str]:
    """Give the environment of runs that join nothing and read no cache."""
    return os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1",
        "QVSPLIT_CACHE": str(folder / "cache"),
    }  # fmt: skip


def child(told: argparse.Namespace) -> None:
    """Extract, as the contender `told.child` does, and print when items were heard of."""
    began = time.perf_counter()
    heard: list[float] = []
    ray = {} if told.child == PLAIN else {"ray": "local", "ray_encoders": told.child.removeprefix("ray ")}
    summary = extract_files(
        [told.photos],
        out=told.out,
        options=ExtractOptions(model=str(told.model), device="cpu", **ray),
        callbacks=ExtractCallbacks(on_item=lambda path: heard.append(time.perf_counter() - began)),
    )
    print(json.dumps({
        "total": time.perf_counter() - began, "first": heard[0], "encoded": summary.encoded,
        "shards": summary.shards, "tokens": summary.tokens, "bytes": summary.bytes,
    }))  # fmt: skip


def run(told: argparse.Namespace, folder: Path, name: str, photos: str) -> dict[str, float]:
    """Run a contender on a folder of photographs, into `folder / "store"`; give what it printed."""
    command = [sys.executable, "-m", "bench.ray_overhead", "--child", name, "--photos", str(folder / photos),
               "--model", str(folder / "model"), "--out", str(folder / "store")]  # fmt: skip
    shutil.rmtree(folder / "store", ignore_errors=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment(folder), timeout=told.limit
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(told: argparse.Namespace, folder: Path) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """Run every contender in turn, several rounds; give what each took, and what differs."""
    names = [PLAIN, *(f"ray {encoders}" for encoders in told.encoders)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    wrong: list[str] = []
    reference = folder / "reference"
    for number in range(told.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            few = run(told, folder, name, "few")
            result = run(told, folder, name, "photos")
            result["few"] = few["total"]
            result["an image"] = (result["total"] - few["total"]) / (told.images - told.few)
            result["start-up"] = few["total"] - told.few * result["an image"]
            rounds[name].append(result)
            print(f"round {number + 1}: {name} {json.dumps(result)}", file=sys.stderr, flush=True)
            if not reference.exists():
                (folder / "store").rename(reference)
            elif problems := differences(folder / "store", reference):
                wrong.append(f"round {number + 1}, {name}: {'; '.join(problems[:3])}")
    return rounds, wrong


def main() -> None:
    """Run, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--few", type=int, default=32, help="images of the short runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=1, help="layers of the encoder")
    parser.add_argument("--pixels", type=int, default=65_000, help="of the largest photograph")
    parser.add_argument("--encoders", nargs="+", default=["1:1", "2:2"], help="as of --ray-encoders")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a run may take")
    for name in ("--photos", "--model", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        child(told)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_encoder(folder / "model", told.depth)
        make_photographs(folder / "photos", told.images, told.pixels)
        make_photographs(folder / "few", told.few, told.pixels)
        rounds, wrong = compare(told, folder)
    median = {
        name: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for name, results in rounds.items()
    }
    plain = median[PLAIN]
    print(f"{told.images} photographs, {plain['tokens']:,.0f} tokens, {plain['bytes'] / 1e6:,.0f} MB of features, "
          f"{told.depth} layers, medians of {told.rounds}")  # fmt: skip
    print(f"{'':10} {'start-up':>9} {'first':>8} {'total':>8} {'an image':>10} {'of plain':>9}")
    for name, one in median.items():
        one["of plain"] = one["an image"] / plain["an image"]
        print(f"{name:10} {one['start-up']:7.1f} s {one['first']:6.1f} s {one['total']:6.1f} s "
              f"{1000 * one['an image']:7.1f} ms {one['of plain']:8.3f}x")  # fmt: skip
    for line in wrong:
        print(line)
    print(json.dumps({
        "bench": "ray_overhead", "machine": machine(), "images": told.images, "depth": told.depth,
        "pixels": told.pixels, "few": told.few, "rounds": told.rounds, "same": not wrong, "median": median,
        "runs": rounds, "wrong": wrong,
    }))  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
