"""The language model at its true size on a CPU: loading, memory, answers, prefill, output layer. Before and after.

    python -m bench.language CHECKPOINT [--before FOLDER] [--dtypes float32,bfloat16]

CHECKPOINT: `python -m tests.support.checkpoints DIR --shape 2b`. FOLDER is a checkout of another commit, measured by
the same script in the same run (`git worktree add FOLDER COMMIT`). Each dtype and each side has a process of its own:

    load           seconds from a checkpoint in the page cache to a language model, without imports
    peak           the most memory while loading beyond what the imports took, over the model's own bytes
    first          the very first question after loading, about a new image, 16 new tokens
    warm           one more question about it, its prefix kept
    3, 20          that many questions about an image that is new, of 256 tokens, 16 new tokens each
    prefill        1,225 tokens of an image and what stands before them: the share of what matrix products alone reach
    output         the output layer for 1, 3 and 20 rows

Answers of both sides are compared. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import machine

NEW_TOKENS = 16
SMALL, LARGE = (16, 16), (35, 35)  # rows and columns of tokens
QUESTIONS = [f"Is there a {what} in the image?" for what in (
    "person", "dog", "car", "tree", "house", "sign", "boat", "flower", "lamp", "table", "chair", "door", "window",
    "road", "hill", "river", "bird", "cat", "book", "cup",
)]  # fmt: skip


def main() -> None:
    """Measure every side and dtype in turn, and print a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        print(json.dumps(_measured(told.checkpoint, told.store, told.child)))
        return
    sides = {"before": told.before, "after": Path(__file__).parents[1]}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = _store(told.checkpoint, Path(folder))
        for dtype in told.dtypes.split(","):
            for side, tree in sides.items():
                if tree is not None:
                    results.setdefault(dtype, {})[side] = _child(told.checkpoint, store, dtype, tree)
            _tell(dtype, results[dtype])
            for side in results[dtype].values():
                del side["tokens"]
    print(json.dumps({"bench": "language", "machine": machine(), "new_tokens": NEW_TOKENS, "results": results}))


def _store(checkpoint: Path, folder: Path) -> Path:
    """Extract one photograph in two sizes."""
    import skimage
    from PIL import Image

    (folder / "photos").mkdir()
    photo = Image.open(Path(skimage.__file__).parent / "data" / "retina.jpg")
    for name, (rows, columns) in {"small.png": SMALL, "large.png": LARGE}.items():
        photo.resize((columns * 28, rows * 28)).save(folder / "photos" / name)
    words = ["extract", folder / "photos", "--model", checkpoint, "--out", folder / "store", "--storage-dtype",
             "bfloat16", "--quiet"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "qvsplit", *map(str, words)], check=True)
    return folder / "store"


def _child(checkpoint: Path, store: Path, dtype: str, tree: Path) -> dict[str, Any]:
    """Run this file over the package of `tree`, in a process of its own."""
    words = [str(Path(__file__).resolve()), str(checkpoint), "--child", dtype, "--store", str(store)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measured(checkpoint: Path, folder: Path, dtype: str) -> dict[str, Any]:
    import torch

    import qvsplit
    from qvsplit.checkpoints.hf import import_libraries
    from qvsplit.checkpoints.opening import open_checkpoint

    opened = open_checkpoint(str(checkpoint), "language")
    import_libraries(opened)
    importlib.import_module("qvsplit.models.language")  # so that no import is left for loading

    for file in opened.file_names("language"):
        _in_page_cache(opened.folder / file)
    places = opened.places(opened.language_names)
    own = sum(math.prod(place.shape) for place in places.values()) * getattr(torch, dtype).itemsize
    store = qvsplit.open_store(folder)
    small, large = store["small.png"], store["large.png"]
    before = _status("VmRSS")
    began = time.perf_counter()
    options = qvsplit.AskOptions(max_new_tokens=NEW_TOKENS, dtype=dtype)
    session: Any = qvsplit.load_session(store, options, model=str(checkpoint))
    loaded = time.perf_counter() - began
    result: dict[str, Any] = {
        "load": loaded, "own_bytes": own, "peak_bytes": _status("VmHWM") - before,
        "peak_over_own": (_status("VmHWM") - before) / own,
    }  # fmt: skip
    cache = session.engine.prefix_cache
    result["first"], _ = _timed(lambda: session.answers(small, QUESTIONS[4:5]))
    result["warm"], _ = _timed(lambda: session.answers(small, QUESTIONS[5:6]))
    cache.clear()
    result["3"], _ = _timed(lambda: session.answers(small, QUESTIONS[:3]))
    cache.clear()
    result["20"], answers = _timed(lambda: session.answers(small, QUESTIONS))
    result["tokens"] = [answer.tokens for answer in answers]
    result |= _prefill(session, store, large, dtype)
    result["output"] = _output(session, dtype)
    return result


def _prefill(session: Any, store: Any, row: Any, dtype: str) -> dict[str, Any]:
    """Time one prefill, and the matrix products in it alone, each at the best rate that this machine reaches."""
    import torch

    from qvsplit.models.prompt import Placeholder

    language = session.engine.language
    prompt = language.prompter.chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
                                    [Placeholder.from_row(row)])  # fmt: skip
    features = [store.features(row)]
    seconds, _ = _timed(lambda: language.prefill(prompt, features))
    n, text = prompt.prefix_tokens, language.model.config.get_text_config()
    width, head = text.hidden_size, text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_key_value_heads * head
    whole = n * (width * (2 * width + keys) + 3 * width * text.intermediate_size)
    attention = n * n * width  # each token attends to half of them, for scores and for sums
    last = n * width * keys  # nothing of the last layer is computed behind its keys and values
    flops = 2 * ((text.num_hidden_layers - 1) * (whole + attention) + last)
    rate = _best_rate(getattr(torch, dtype))
    return {"prefill": seconds, "prefill_tokens": n, "limit_flops": rate, "share": flops / rate / seconds}


def _best_rate(dtype: Any) -> float:
    """Give the rate of large square matrix products in FLOP/s: the best of five, by torch's or by oneDNN's layout."""
    import torch

    size = 4096
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
    product = torch.ops.mkldnn._linear_pointwise
    ways: list[Callable[[], Any]] = [lambda: torch.mm(a, b), lambda: product(a, packed, None, "none", [], "")]
    with torch.inference_mode():
        seconds = min(_timed(way)[0] for way in ways for _ in range(5))
    return float(2 * size**3 / seconds)


def _output(session: Any, dtype: str) -> dict[int, float]:
    """Give the seconds of the output layer, by its rows."""
    import torch

    model = session.engine.language.model
    seconds = {}
    for rows in (1, 3, 20):
        hidden = torch.randn(rows, model.config.get_text_config().hidden_size).to(getattr(torch, dtype))
        with torch.inference_mode():
            taken = []
            for _ in range(9):
                began = time.perf_counter()
                model.lm_head(hidden)
                taken.append(time.perf_counter() - began)
        seconds[rows] = statistics.median(taken)
    return seconds


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    out = run()
    return time.perf_counter() - began, out


def _in_page_cache(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _tell(dtype: str, sides: dict[str, Any]) -> None:
    print(f"\n{dtype}")
    after, before = sides["after"], sides.get("before")
    names = ("load", "peak_over_own", "first", "warm", "3", "20", "prefill", "share")
    lines = [(name, after[name]) for name in names]
    lines += [(f"output {rows}", after["output"][rows]) for rows in after["output"]]
    for name, value in lines:
        line = f"{name:16} {value:10.3f}"
        if before is not None:
            was = before["output"][name.split()[1]] if name.startswith("output") else before[name]
            line += f"   before {was:10.3f}   ratio {value / was:.2f}"
        print(line, flush=True)
    if before is not None:
        same = sum(a == b for a, b in zip(after["tokens"], before["tokens"], strict=True))
        print(f"identical answers: {same} of {len(after['tokens'])}, {len(set(map(tuple, after['tokens'])))} different")


if __name__ == "__main__":
    main()
