"""Reports for tests: answers by hand, the page they make, and what stands in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qvsplit.answering.checks import Question
from qvsplit.answering.requests import judged
from qvsplit.errors import ItemError
from qvsplit.output.answer import Answer
from qvsplit.output.report import write_report
from qvsplit.sources import images
from qvsplit.store.row import Row

FACTS = {"Model": "demo", "Store": "/stores/<postcards>"}


def row_of(file: Path, root: Path | None = None, **changes) -> Row:
    data = file.read_bytes()
    root = root or file.parent
    try:
        width, height = images.decode(data).size
    except ItemError:
        width = height = 1
    row = Row(
        str(root), file.relative_to(root).as_posix(), hashlib.sha256(data).hexdigest(), len(data), "ok", mtime_ns=0,
        width=width, height=height, grid_thw=(1, 2, 2), n_tokens=1, has_features=True,
    )  # fmt: skip
    return replace(row, **changes)


def clip_row(
    file: Path, sampled: Sequence[int], *, frames: int = 40, size: tuple[int, int] = (160, 90), **changes
) -> Row:
    """Make a clip of ten frames a second, each of one grey, four brighter than the one before; give a row of it."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = file.read_bytes()
    row = Row(
        str(file.parent), file.name, hashlib.sha256(data).hexdigest(), len(data), "ok", kind="video", width=size[0],
        height=size[1], duration=frames / 10, grid_thw=(1, 2, 2), n_tokens=1, has_features=True,
        media=json.dumps({"frames_indices": list(sampled)}),
    )  # fmt: skip
    return replace(row, **changes)


def no_row(name: str) -> Row:
    """Of an image that is nowhere."""
    return Row("/nowhere", name, "0" * 64, 10, "ok", mtime_ns=0, width=4, height=3, grid_thw=(1, 2, 2), n_tokens=1,
               has_features=True)  # fmt: skip


def failed_row(name: str, error: str) -> Row:
    return Row("/nowhere", name, None, 10, "failed", error=error, error_kind="content")


def generated(rows: Row | tuple[Row, ...], question: str, text: str, **changes) -> Answer:
    shown = (rows,) if isinstance(rows, Row) else rows
    return replace(Answer(shown, question, text, [1], 9, "stop", "fingerprint"), **changes)


def scored(
    rows: Row, id: str, yes: float, *, level: str | None = None, question: str = "Is it so?",
    choice_mass: float = math.exp(-0.1),
) -> Answer:  # fmt: skip
    probabilities = {"yes": yes, "no": 1 - yes}
    logprobs = {name: math.log(p) + math.log(choice_mass) if p else -math.inf for name, p in probabilities.items()}
    check = Question(question, id, ["yes", "no"], flag="yes" if level else (), level=level or "warn")
    answer = Answer((rows,), question, "", [], 9, "scored", "fingerprint", logprobs=logprobs)
    return replace(judged(answer, check), probabilities=probabilities)


def data_of(page: Path) -> dict:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(content)


def thumbnails_of(page: Path) -> list[bytes]:
    blocks = re.findall(r'<script type="text/plain" class="thumbnails">(.*?)</script>', page.read_text(), re.DOTALL)
    return [base64.b64decode(line) for block in blocks for line in block.split()]


def written(file: Path, answers, **changes) -> Path:
    write_report(file, answers, **{"title": "Postcards", "facts": FACTS} | changes)
    return file
