"""Bad and odd images and clips by their outcome: the whole corpus of the tests through one real run.

    python -m bench.nasty [--flips 4000] [--clips 400]

Truncations at every length, flipped bytes, bombs, lying headers, odd names and special files, as
tests/support/nasty_images.py and nasty_clips.py make them; the tests have a sample. Prints how each kind ended, the
reasons by their number, the longest wait, and the memory of the run and of its decoders. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.store.opening import open_store
from tests.support.checkpoints import make_tiny
from tests.support.nasty_clips import damaged, hostile
from tests.support.nasty_images import LIMIT, make_corpus, remove_corpus


def make_clips(folder: Path, number: int) -> dict[str, int]:
    """Write hostile and damaged clips; gives how many."""
    made = {
        "hostile clips": [(name, clip.data) for name, clip in hostile().items()],
        "damaged clips": [*damaged(number)],
    }
    for kind, files in made.items():
        (folder / kind).mkdir()
        for name, data in files:
            (folder / kind / name).write_bytes(data)
    return {kind: len(files) for kind, files in made.items()}


def main() -> None:
    """Run, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=4000)
    parser.add_argument("--clips", type=int, default=400, help="that are damaged; one of each hostile kind beside them")
    parser.add_argument("--seconds", type=float, default=10.0, help="the limit for each step of an image")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "corpus", Path(place) / "store"
        counts = make_corpus(folder, flips=arguments.flips) | make_clips(folder, arguments.clips)
        make_tiny(Path(place) / "tiny")
        last, waits = [time.monotonic()], []

        def on_item(path: str) -> None:
            now = time.monotonic()
            waits.append((now - last[0], path))
            last[0] = now

        options = ExtractOptions(
            model=f"{place}/tiny", item_timeout=arguments.seconds, max_pixels=28 * 28 * 16, max_image_pixels=LIMIT
        )
        callbacks = ExtractCallbacks(on_item=on_item)
        summary = extract_files([folder], out=out, options=options, callbacks=callbacks)
        rows = open_store(out).rows
        remove_corpus(folder)
    by_kind: dict[str, Counter[str]] = {}
    for row in rows:
        by_kind.setdefault(row.path.split("/")[0], Counter())[row.status] += 1
    print(f"made: {counts}")
    for kind, outcome in sorted(by_kind.items()):
        print(f"{kind:12} {outcome['ok']:6} ok {outcome['failed']:6} failed")
    reasons = Counter(row.error or "" for row in rows if row.status == "failed")
    for reason, number in reasons.most_common(25):
        print(f"{number:6}  {reason}")
    print(f"longest waits: {', '.join(f'{path} {wait:.1f} s' for wait, path in sorted(waits)[:-6:-1])}")
    print(
        json.dumps(
            {
                "tried": len(rows),
                "ok": sum(row.status == "ok" for row in rows),
                "failed": sum(row.status == "failed" for row in rows),
                "by_kind": {kind: dict(outcome) for kind, outcome in by_kind.items()},
                "reasons": len(reasons),
                "by_error_kind": dict(Counter(row.error_kind for row in rows if row.status == "failed")),
                "longest_wait_seconds": round(max(waits)[0], 1),
                "seconds": summary.seconds,
                "peak_memory_bytes": summary.peak_memory_bytes,
                "decoder_memory_bytes": summary.decoder_memory_bytes,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
