"""What a video costs to extract: memory, seconds, tokens and bytes, side by side with transformers.

    python -m bench.video CHECKPOINT [--minutes 10] [--clip FILE] [--device cpu] [--without-transformers]

Makes a clip of 720p H.264, 25 frames a second, unless one is given. Contenders, a process each, in turn:

    plain decode   PyAV decodes every frame with one thread, and keeps none
    transformers   its own reader (torchcodec where that is usable, else PyAV), then the checkpoint's video processor on
                   all sampled frames at once; nothing is encoded
    qvsplit        `qvsplit extract` of that one file: reading, hashing, decoding, encoding, writing

Memory of qvsplit is that of the process and its decoder child together, at the moment when it is most (resident pages
of both, looked at 50 times a second; what they share counts twice), "beyond the encoder" that less the encoder's
weights in the compute dtype. Decoding is counted as the summary has it: with resizing, cutting into patches and waiting
for a core. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.noop import measured
from bench.video_reader import make_clip

PLAIN = """
import av, sys
with av.open(sys.argv[1]) as container:
    stream = container.streams.video[0]
    stream.thread_count, stream.thread_type = 1, "SLICE"
    print(sum(1 for frame in container.decode(stream)))
"""
TRANSFORMERS = """
import sys, json
from transformers import AutoProcessor
from transformers.video_utils import load_video
from transformers.utils.import_utils import is_torchcodec_usable
video_processor = AutoProcessor.from_pretrained(sys.argv[2]).video_processor
limits = json.loads(sys.argv[3])
for name, value in limits.items():
    setattr(video_processor, name, value)
backend = "torchcodec" if is_torchcodec_usable(decode="video") else "pyav"
import functools
sample = functools.partial(video_processor.sample_frames, fps=2.0)
def indices(metadata, **more):
    return sample(metadata=metadata)
frames, metadata = load_video(sys.argv[1], backend=backend, sample_indices_fn=indices)
made = video_processor([frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
print(backend, list(made["pixel_values_videos"].shape))
"""


def main() -> None:
    """Run every contender and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-transformers", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        clip = told.clip or here / "clip.mp4"
        if told.clip is None:
            make_clip(clip, told.minutes)
        results: dict[str, Any] = {"qvsplit": _qvsplit(told, clip, here / "embeds")}
        seconds, peak, _ = measured([sys.executable, "-c", PLAIN, clip])
        results["plain decode"] = {"seconds": seconds, "peak_bytes": peak}
        if not told.without_transformers:
            limits = json.dumps(results["qvsplit"].pop("limits"))
            seconds, peak, said = measured([sys.executable, "-c", TRANSFORMERS, clip, told.checkpoint, limits])
            results["transformers"] = {"seconds": seconds, "peak_bytes": peak, "said": said}
    for name, result in results.items():
        print(f"{name:14} {result['seconds']:8.2f} s, peak {result['peak_bytes'] / 1e9:6.2f} GB")
    _report(results, told)


def _qvsplit(told: argparse.Namespace, clip: Path, out: Path) -> dict[str, Any]:
    words = [
        "extract",
        str(clip),
        "--model",
        str(told.checkpoint),
        "--out",
        str(out),
        "--device",
        told.device,
        "--json",
    ]
    with subprocess.Popen([sys.executable, "-m", "qvsplit", *words], stdout=subprocess.PIPE, text=True) as process:
        together = _most_memory(process)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    from qvsplit.store.opening import open_store

    store = open_store(out)
    (row,) = store
    assert store.config is not None
    assert store.config.videos is not None
    settings = store.config.videos["settings"]
    limits = {name: settings[name] for name in ("size", "max_video_tokens", "cap_pixels_per_frame") if name in settings}
    return {
        "seconds": summary["seconds"],
        "stages": summary["stages"],
        "peak_bytes": together,
        "process_bytes": summary["peak_memory_bytes"],
        "decoder_bytes": summary["decoder_memory_bytes"],
        "encoder_bytes": summary["encoder_bytes"],
        "tokens": summary["tokens"],
        "grid": row.grid_thw,
        "stored_bytes": summary["bytes"],
        "video_seconds": row.duration,
        "limits": limits,
    }


def _most_memory(process: subprocess.Popen[str]) -> int:
    """Give the most memory that a process and its children have together until it ends."""
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(_own_memory, _with_children(process.pid))))
        time.sleep(0.02)
    return most


def _with_children(pid: int) -> list[int]:
    with suppress(OSError):
        files = Path(f"/proc/{pid}/task").glob("*/children")
        children = [int(child) for file in files for child in file.read_text().split()]
        return [pid, *(one for child in children for one in _with_children(child))]
    return [pid]


def _own_memory(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _report(results: dict[str, Any], told: argparse.Namespace) -> None:
    mine, minutes = results["qvsplit"], results["qvsplit"]["video_seconds"] / 60
    ratios = {
        "memory beyond the encoder, GB": (mine["peak_bytes"] - mine["encoder_bytes"]) / 1e9,
        "decode, resize and cut, over plain decode": mine["stages"]["decode and prepare videos"]
        / results["plain decode"]["seconds"],
        "tokens a minute": mine["tokens"] / minutes,
        "MB on disk a minute": mine["stored_bytes"] / 1e6 / minutes,
        "seconds in the encoder a minute": mine["stages"]["forward"] / minutes,
    }
    if "transformers" in results:
        theirs = results["transformers"]
        ratios["memory beyond the encoder, over transformers' reading and processing"] = (
            mine["peak_bytes"] - mine["encoder_bytes"]
        ) / theirs["peak_bytes"]
    for name, ratio in ratios.items():
        print(f"{name:72} {ratio:10.3f}")
    print(json.dumps({"bench": "video", "machine": machine(), "checkpoint": told.checkpoint.name, "device": told.device,
                      "results": results, "ratios": ratios}))  # fmt: skip


if __name__ == "__main__":
    main()
