"""Long work: time, memory, open files and threads of one run over many small images, or clips.

    python -m bench.soak [--images 20000] [--clips 0]

Pieces of real photographs, each its own content, through the tiny checkpoint. Every tenth of the way the process is
looked at from within. The last line is one JSON object; `growth_bytes` is from 2,000 items (or a tenth) to the end,
`last_tenth_over_second` what the last tenth took over what the second did: 1 where time grows with images.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from PIL import Image

from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime.memory import give_back_freed_memory
from tests.support.checkpoints import make_tiny
from tests.support.clips import make_clip
from tests.support.nasty_clips import box
from tests.support.photographs import photographs

SIDE = 60


def make_photos(folder: Path, number: int) -> None:
    """Small pieces, a thousand a folder."""
    sources: list[Image.Image] = []
    for path in photographs():
        with Image.open(path) as opened:
            sources.append(opened.convert("RGB"))
    sources = [image for image in sources if min(image.size) >= 4 * SIDE]
    for index in range(number):
        image = sources[index % len(sources)]
        across, down = image.width - SIDE, image.height - SIDE
        place = index // len(sources) * 7
        left, top = place % across, place // across * 3 % down
        below = folder / f"{index // 1000:03d}"
        below.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + SIDE, top + SIDE)).save(below / f"{index:06d}.png", compress_level=1)


def make_clips(folder: Path, number: int) -> None:
    """Copies of one small clip, each its own content by what stands behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = make_clip(folder / "clip.mp4", 8)
    data = clip.read_bytes()
    clip.unlink()
    for index in range(number):
        (folder / f"{index:06d}.mp4").write_bytes(data + box(b"free", index.to_bytes(8, "big")))


def usage() -> dict[str, int]:
    """What this process has now: resident bytes, open files, threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


def main() -> None:
    """Run, and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--clips", type=int, default=0, help="beside the images")
    options = parser.parse_args()
    give_back_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        make_tiny(Path(place) / "tiny")
        make_photos(Path(place) / "photos", options.images)
        make_clips(Path(place) / "photos" / "clips", options.clips)
        items = options.images + options.clips
        seen = 0
        looks: list[dict[str, float]] = []
        began = time.perf_counter()
        step = max(1, items // 10)

        def on_item(path: str) -> None:
            nonlocal seen
            seen += 1
            if seen % step == 0:
                looks.append({"items": seen, "seconds": round(time.perf_counter() - began, 3), **usage()})
                print("  ".join(f"{name} {value:,}" for name, value in looks[-1].items()), flush=True)

        summary = extract_files(
            [Path(place) / "photos"],
            out=Path(place) / "store",
            options=ExtractOptions(model=f"{place}/tiny"),
            callbacks=ExtractCallbacks(on_item=on_item),
        )
    print(
        json.dumps(
            {
                "images": options.images,
                "clips": options.clips,
                "encoded": summary.encoded,
                "copied": summary.copied,
                "seconds": summary.seconds,
                "looks": looks,
                "last_tenth_over_second": (looks[-1]["seconds"] - looks[-2]["seconds"])
                / max(1e-3, looks[1]["seconds"] - looks[0]["seconds"]),
                "growth_bytes": looks[-1]["resident_bytes"] - looks[0]["resident_bytes"],
                "open_files_grow_by": looks[-1]["open_files"] - looks[0]["open_files"],
                "threads_grow_by": looks[-1]["threads"] - looks[0]["threads"],
            }
        )
    )


if __name__ == "__main__":
    main()
