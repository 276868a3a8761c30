"""What reading a long clip takes: a scan, sampled frames by decoding through and by seeking, memory; against others.

    python -m bench.video_reader [--minutes 10] [--frames 768] [--rounds 3] [--clip FILE] [--without-transformers]

Makes a clip of 720p H.264, 25 frames a second, unless one is given. Each contender is a process of its own: PyAV
decoding every frame with one thread and with two and converting none; qvsplit's `Decoder`, whose child decodes (its own
peak memory is printed) while frames are taken here; the same reader in one process with two threads; transformers'
reader, through torchcodec where that is installed, else through PyAV. Medians of the rounds, in turn. Seconds are of
the work alone, without imports; cpu is that of the process and its children. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from bench.noop import measured

SIZE = (1280, 720)
RATE = 25
BEGIN = """
import json, os, sys, time, resource
def spent():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
path, count, indices = sys.argv[1], int(sys.argv[2]), None
def evenly(n): return [i * n // count for i in range(count)]
def tell(began, cpu, **more): print(json.dumps({"seconds": time.perf_counter() - began, "cpu": spent() - cpu, **more}))
"""
PLAIN = """
import av
began, cpu = time.perf_counter(), spent()
with av.open(path) as container:
    stream = container.streams.video[0]
    stream.thread_count, stream.thread_type = {threads}, "FRAME" if {threads} > 1 else "SLICE"
    n = sum(1 for frame in container.decode(stream))
tell(began, cpu, frames=n)
"""
DECODER = """
from qvsplit.sources.decoder import Decoder
from qvsplit.sources.source import Entry
folder, name = os.path.split(os.path.abspath(path))
entry, decoder = Entry(folder, name, 1, None, 1), Decoder()
info = decoder.read(entry)
began = time.perf_counter()
scanned = decoder.scan(entry, info)
scan = time.perf_counter() - began
began, cpu = time.perf_counter(), spent()
n = sum(int(frame[0, 0, 0]) >= 0 for frame in decoder.frames(entry, info, evenly(scanned.n_frames)))
seconds = time.perf_counter() - began
decoder.close()
decoder.wait(5)
tell(time.perf_counter() - seconds, cpu, frames=n, scan=scan, child_memory=decoder.peak_memory)
"""
IN_PROCESS = """
from qvsplit.sources import videos
file = videos.FileView(os.open(path, os.O_RDONLY))
scanned = videos.scan(file)
began, cpu = time.perf_counter(), spent()
wanted = evenly(scanned.info.n_frames)
n = sum(1 for frame in videos.frames(file, scanned, wanted, threads={threads}, seek_frames={seek}))
tell(began, cpu, frames=n)
"""
TRANSFORMERS = """
from transformers.utils.import_utils import is_torchcodec_usable
from transformers.video_utils import load_video
backend = "torchcodec" if is_torchcodec_usable(decode="video") else "pyav"
began, cpu = time.perf_counter(), spent()
def sample(metadata, **more): return evenly(metadata.total_num_frames)
frames, _ = load_video(path, backend=backend, sample_indices_fn=sample)
tell(began, cpu, frames=len(frames), backend=backend)
"""


def make_clip(path: Path, minutes: float) -> None:
    """A window that moves over a picture of smooth noise."""
    import av

    noise = np.random.default_rng(0).integers(0, 255, (45, 80, 3), dtype=np.uint8)
    large = av.VideoFrame.from_ndarray(noise, "rgb24").reformat(width=2560, height=1440, interpolation="BICUBIC")
    picture: Any = large.reformat(format="rgb24").to_ndarray()
    width, height = SIZE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(int(minutes * 60 * RATE)):
            left, top = int(600 + 600 * np.sin(number / 90)), int(350 + 350 * np.cos(number / 70))
            window: Any = np.ascontiguousarray(picture[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(window, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def run(code: str, clip: Path, frames: int) -> dict[str, Any]:
    """Run one contender once."""
    _, memory, said = measured([sys.executable, "-c", BEGIN + code, clip, str(frames)])
    answer: dict[str, Any] = json.loads(said)
    return answer | {"memory": memory}


def main() -> None:
    """Make it, time it, tell it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--few", type=int, default=16, help="frames of a sample for which seeking saves much")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clip", type=Path, help="a clip to read instead of making one")
    parser.add_argument("--without-transformers", action="store_true", help="its reader holds all frames in memory")
    told = parser.parse_args()
    contenders = {
        "plain PyAV, every frame, 1 thread": (PLAIN.format(threads=1), told.frames),
        "plain PyAV, every frame, 2 threads": (PLAIN.format(threads=2), told.frames),
        "qvsplit": (DECODER, told.frames),
        "qvsplit in one process, 2 threads": (IN_PROCESS.format(threads=2, seek="videos.SEEK_FRAMES"), told.frames),
        "qvsplit in one process, by seeking": (IN_PROCESS.format(threads=1, seek=0), told.frames),
        "qvsplit, few": (DECODER, told.few),
        "qvsplit in one process, few, no seeking": (IN_PROCESS.format(threads=1, seek=10**9), told.few),
    }
    if not told.without_transformers:
        contenders["transformers"] = (TRANSFORMERS, told.frames)
    with tempfile.TemporaryDirectory() as place:
        clip = told.clip or Path(place) / "clip.mp4"
        if told.clip is None:
            make_clip(clip, told.minutes)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(told.rounds):
            for name, (code, frames) in contenders.items():
                runs[name].append(run(code, clip, frames))
    plain = "plain PyAV, every frame, 1 thread"
    found = {}
    for name, ones in runs.items():
        middle = {key: statistics.median(one[key] for one in ones) for key in ("seconds", "cpu", "memory")}
        found[name] = ones[0] | middle
        found[name]["over_plain"] = middle["seconds"] / statistics.median(one["seconds"] for one in runs[plain])
        found[name]["cpu_over_plain"] = middle["cpu"] / statistics.median(one["cpu"] for one in runs[plain])
        more = f", child {found[name]['child_memory'] / 1e6:.0f} MB" if "child_memory" in found[name] else ""
        print(
            f"{name:40} {middle['seconds']:7.2f} s  {found[name]['over_plain']:5.2f} x plain  "
            f"cpu {middle['cpu']:6.2f} s ({found[name]['cpu_over_plain']:.2f} x) {middle['memory'] / 1e6:7.0f} MB{more}"
        )
    print(f"scan {found['qvsplit']['scan']:.2f} s")
    print(json.dumps({"frames": told.frames, "few": told.few, "rounds": told.rounds, "contenders": found}))


if __name__ == "__main__":
    main()
