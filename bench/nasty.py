"""Bad and odd pictures by their outcome: the whole corpus of the tests through one real run.

    python bench/nasty.py [--flips 4000]

Truncations at every length, flipped bytes, bombs, lying headers, odd names and special files (tools/nasty_pictures.py).
Prints how each kind ended, the reasons by their number, the longest wait, and the memory of the run and of its
decoders. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qvsplit.album import open_album
from qvsplit.extract import Settings, Watcher, extract_pictures

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from make_checkpoint import make_tiny
from nasty_pictures import make_corpus, remove_corpus


def main() -> None:
    """Run, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=10.0, help="the limit for each step of a picture")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "corpus", Path(place) / "album"
        made = make_corpus(folder, flips=told.flips)
        make_tiny(Path(place) / "tiny")
        last, waits = [time.monotonic()], []

        def on_picture(path: str) -> None:
            now = time.monotonic()
            waits.append((now - last[0], path))
            last[0] = now

        settings = Settings(model=f"{place}/tiny", picture_seconds=told.seconds, max_pixels=28 * 28 * 16)
        watcher = Watcher(on_picture=on_picture)
        summary = extract_pictures([folder], out=out, settings=settings, watcher=watcher)
        rows = open_album(out).rows
        remove_corpus(folder)
    by_kind: dict[str, Counter[str]] = {}
    for row in rows:
        by_kind.setdefault(row.path.split("/")[0], Counter())[row.status] += 1
    print(f"made: {made}")
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
