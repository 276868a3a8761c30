"""Is the report's page smooth with a store of thousands? Size, time to write, and what Chromium makes of it.

    python -m bench.report [--images 5000] [--questions 20] [--out page.html]

Images are JPEGs cut from a few photographs, each at another place, so that no two thumbnails are equal; half of the
questions are scored checks, half are answered in words. Written by `write_report`, then opened in a headless Chromium:

    first cards   from the start of the navigation until the first cards are drawn
    search        from the last letter's input until the matching cards are drawn, without the 60 ms that typing waits
    worst frame   the longest time between two frames of a scroll through the page, 400 pixels a frame

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import machine

if TYPE_CHECKING:
    from qvsplit.output.answer import Answer
    from qvsplit.store.row import Row

ROOT = Path(__file__).parent.parent
WORDS = ("a", "the", "red", "blue", "small", "house", "dog", "tree", "people", "boat", "sky", "water", "night", "snow")
PICTURE = (800, 600)
SEARCH = """
new Promise(async done => {
  const frame = () => new Promise(requestAnimationFrame), input = document.querySelector('#search'), times = [];
  for (const text of ['boat', 'boat sky', '00042', '', 'check-3', 'zzz']) {
    input.value = text;
    input.dispatchEvent(new Event('input'));
    await new Promise(go => setTimeout(go, 55));
    const start = performance.now(), before = location.hash;
    while (location.hash === before) await new Promise(go => setTimeout(go, 0));
    await frame();
    times.push(performance.now() - start);
    await frame();
  }
  input.value = '';
  input.dispatchEvent(new Event('input'));
  setTimeout(() => done(times), 300);
})
"""
SCROLL = """
new Promise(done => {
  const times = [];
  let last = 0, most = 0;
  const step = now => {
    if (last) times.push(now - last);
    last = now;
    most = Math.max(most, document.querySelectorAll('.card').length);
    scrollBy(0, 400);
    if (times.length < 300) requestAnimationFrame(step);
    else done([times, most]);
  };
  requestAnimationFrame(step);
})
"""


def main() -> None:
    """Write the page, open it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--out", type=Path, help="keep the page here")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _images(Path(folder), told.images)
        page = told.out or Path(folder) / "page.html"
        results = _write(page, rows, told.questions) | _browse(page)
    for name, value in results.items():
        print(f"{name:28} {value:,}")
    print(json.dumps({"bench": "report", "machine": machine(), "images": told.images, "questions": told.questions,
                      "results": results}))  # fmt: skip


def _images(folder: Path, count: int) -> list[Row]:
    """JPEGs of PICTURE size, each cut at another place of a photograph, and their rows."""
    from PIL import Image

    from bench.synthetic import row
    from tests.support.photographs import photographs

    chosen = [path for path in photographs() if path.stem in {"astronaut", "coffee", "chelsea", "china", "flower"}]
    photos = [Image.open(path).convert("RGB") for path in chosen]
    draw, rows = random.Random(0), []
    for number in range(count):
        photo = photos[number % len(photos)]
        wide = draw.randint(photo.width // 2, photo.width - 1)
        high = min(photo.height, wide * 3 // 4)
        x, y = draw.randint(0, photo.width - wide), draw.randint(0, photo.height - high)
        file = folder / f"image-{number:05}.jpg"
        photo.crop((x, y, x + wide, y + high)).resize(PICTURE).save(file, quality=80)
        data = file.read_bytes()
        rows.append(row(str(folder), file.name, 1, sha256=hashlib.sha256(data).hexdigest(), size=len(data),
                        width=PICTURE[0], height=PICTURE[1]))  # fmt: skip
    return rows


def _answers(rows: list[Row], questions: int) -> Iterator[Answer]:
    from qvsplit.output.answer import Answer

    draw = random.Random(1)
    for row in rows:
        for number in range(questions):
            if number % 2:
                text = " ".join(draw.choices(WORDS, k=draw.randint(3, 14)))
                yield Answer((row,), f"Question {number} in words?", text, [], 9, "stop", "fingerprint")
                continue
            yes = draw.random() ** 4
            chances = {"yes": yes, "no": 1 - yes}
            yield Answer(
                (row,), f"Is it so in respect {number}?", "yes" if yes > 0.5 else "no", [], 9, "scored", "fingerprint",
                id=f"check-{number}", level=("info", "warn", "block")[number % 3], flagged=yes > 0.5,
                logprobs={answer: math.log(max(p, 1e-9)) for answer, p in chances.items()}, probabilities=chances,
            )  # fmt: skip


def _write(page: Path, rows: list[Row], questions: int) -> dict[str, float]:
    from qvsplit.output.report import write_report

    start, used = time.perf_counter(), time.process_time()
    write_report(page, _answers(rows, questions), title="Benchmark", facts={"Images": str(len(rows))})
    return {
        "bytes": page.stat().st_size,
        "bytes_a_image": page.stat().st_size // len(rows),
        "write_seconds": round(time.perf_counter() - start, 2),
        "write_cpu_seconds": round(time.process_time() - used, 2),
    }


def _browse(page: Path) -> dict[str, Any]:
    """What Chromium makes of it; nothing where none is at hand."""
    from tests.support import browser

    program = browser.find()
    if program is None:
        print(f"no browser at hand ({', '.join(browser.NAMES)})")
        return {}
    with browser.Browser(program) as window:
        window.open(page)
        window.wait("document.querySelectorAll('.card').length > 0 && document.documentElement.dataset.ready")
        first = window.evaluate("Number(document.documentElement.dataset.ready)")
        times = window.evaluate(SEARCH)
        frames, most = window.evaluate(SCROLL)
        if window.errors:
            raise SystemExit(f"the page has errors: {window.errors}")
    frames.sort()
    return {
        "first_cards_ms": first,
        "search_worst_ms": round(max(times), 1),
        "worst_frame_ms": round(frames[-1], 1),
        "median_frame_ms": round(frames[len(frames) // 2], 1),
        "most_cards_in_dom": most,
    }


if __name__ == "__main__":
    main()
