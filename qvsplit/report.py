"""Answers to one HTML page for people who look through an album's results: pictures, answers, filters, sorting.

The page is one file that asks nobody for anything: pictures are thumbnails within it, and its policy lets nothing but
its own script and style run. A thumbnail is only of the very bytes that were answered about. The page appears under
its name whole or not at all. It grows on disk as answers come; in memory are the answers' texts and a few pictures.
Knows nothing of models: no torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qvsplit import images
from qvsplit.checks import COVERED, PASS, SEVERITIES, verdict
from qvsplit.errors import PictureError, UsageError, printable
from qvsplit.folders import Found
from qvsplit.store import disk_errors, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from qvsplit.ask import Answer
    from qvsplit.store import Row

THUMBNAIL = 192  # pixels of the longest side
QUALITY = 70  # of WebP or JPEG: 3 to 8 kB a thumbnail
THREADS = min(4, os.cpu_count() or 1)
BLOCK = 64  # thumbnails in one block of the page; a block is taken apart when one of it is first seen
# Pictures beyond these are decoded one at a time, so that memory does not grow with the threads.
LARGE_PIXELS = 24_000_000
LARGE_BYTES = 64 << 20

# Below this the allowed answers were none of what the model would have said: which of them is likelier means little.

MARK = b'<meta name="generator" content="qvsplit">'
VERDICTS = (PASS, *SEVERITIES)
# What an answer's third number says, added up
_FLAGGED, _CUT, _SKIPPED, _UNCOVERED = 1, 2, 4, 8
_THUMBNAILS, _DATA = "<!-- thumbnails -->", "<!-- data -->"
_ONE_LARGE = threading.Lock()


def write_report(
    file: Path,
    answers: Iterable[Answer],
    *,
    title: str,
    told: Mapping[str, str],
    on_picture: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the page of `answers` to `file`; what is there stays until the new page is whole.

    Consecutive answers about the same pictures are one card. `told` are the lines on where the answers come from.
    `on_picture` hears the name of each picture once its thumbnail, or the reason why there is none, is in the page.
    UsageError where no page can be at `file`; DiskError where the disk is full or cannot be written. Either comes
    before the first answer is taken, where it can be known by then.
    """
    before, between, after = _template(title)
    with _Page(file) as page:
        page.write(before)
        cards = _Cards()
        with _Thumbnails(page.write, on_picture) as thumbnails:
            for answer in answers:
                cards.add(answer, [thumbnails.number(row) for row in answer.rows])
            pictures = thumbnails.finish()
        page.write(between)
        page.write('<script type="application/json" id="data">')
        for part in cards.to_json(title, told, pictures):
            page.write(part)
        page.write("</script>")
        page.write(after)
        page.finish()


def _is_ours(file: Path) -> bool:
    with _disk_errors(file), file.open("rb") as stream:
        return MARK in stream.read(1000)


def check_target(file: Path) -> None:
    """UsageError or DiskError if no page could be written to `file`: to be known before the first question is asked."""
    with _Page(file):
        pass


# --------------------------------------------------------------------------------------------------------- the file


class _Page:
    """The file: a hidden temporary one beside it, renamed when it is whole, gone when it is not."""

    def __init__(self, file: Path) -> None:
        self._target = Path(os.path.realpath(file))
        if not self._target.parent.is_dir():
            raise UsageError(f"no folder at {self._target.parent} for the report")
        if self._target.exists() and not self._target.is_file():
            raise UsageError(f"{self._target} is not a file: the report needs a name of its own")
        if file.suffix.lower() not in {".html", ".htm"}:
            raise UsageError(f"--report {file}: the name must end in .html")
        if self._target.exists() and self._target.stat().st_size and not _is_ours(self._target):
            raise UsageError(f"{self._target} is there and is no page of qvsplit's; choose another name")
        self._temporary = self._target.with_name(f".report.{os.getpid()}.{threading.get_ident()}.tmp")
        with _disk_errors(self._target):
            self._temporary.unlink(missing_ok=True)  # of a process that had our number and was killed
            self._stream: IO[bytes] = self._temporary.open("xb")

    def __enter__(self) -> _Page:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._stream.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        """Append."""
        with _disk_errors(self._target):
            self._stream.write(text.encode())

    def finish(self) -> None:
        """Make the page appear, in place of what was there."""
        with _disk_errors(self._target):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            os.replace(self._temporary, self._target)
            sync_folder(self._target.parent)


def _disk_errors(file: Path) -> AbstractContextManager[None]:
    return disk_errors(f"the report {file}", kept="", elsewhere="choose another place")


def _template(title: str) -> tuple[str, str, str]:
    """The page before its thumbnails, between them and its data, and behind. Only its own script and style may run."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style[0])}; script-src {_source(script[0])}; "
        "base-uri 'none'; form-action 'none'"
    )
    before, rest = page.split(_THUMBNAILS)
    between, after = rest.split(_DATA)
    before = before.replace("$policy", policy).replace("$title", html.escape(_text(title)))
    return before, between, after


def _source(content: str) -> str:
    """How a Content Security Policy names one inline script or style: by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# --------------------------------------------------------------------------------------------------------- the data


class _Cards:
    """What the page says, as compact as JSON goes: each text and each question once, else their numbers."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._questions: dict[tuple[str, str], int] = {}
        self._allowed: list[dict[str, int]] = []  # per question, each allowed answer's number
        self._cards: list[str] = []
        self._keys: list[tuple[str, str]] = []  # of the pictures of the card in hand
        self._pictures: Sequence[int] = ()
        self._answers: list[list[Any]] = []
        self._raised: list[str] | None = None  # severities; None where no check could raise any

    def add(self, answer: Answer, pictures: Sequence[int]) -> None:
        """One answer about the pictures of these numbers; another card than the last one's if they are others."""
        keys = [row.key for row in answer.rows]
        if keys != self._keys:
            self._close()
            self._keys, self._pictures = keys, pictures
        question = self._questions.setdefault((answer.id, answer.question), len(self._questions))
        if question == len(self._allowed):
            self._allowed.append({})
        if answer.flagged is not None:
            self._raised = self._raised or []
            if answer.flagged:
                self._raised.append(_severity(answer))
        self._answers.append([question, self._number(answer.text), _marks(answer), *self._scores(question, answer)])

    def _number(self, text: str) -> int:
        return self._texts.setdefault(_text(text), len(self._texts))

    def _scores(self, question: int, answer: Answer) -> list[Any]:
        """Severity's number, probabilities and log-probabilities in the order of the allowed answers, coverage."""
        if not answer.probabilities:
            return []
        allowed = self._allowed[question]
        for name in answer.probabilities:
            allowed.setdefault(name, self._number(name))
        logs = answer.logprobs or {}
        severity = VERDICTS.index(_severity(answer)) if answer.flagged is not None else 0
        return [
            severity,
            [_figure(answer.probabilities.get(name)) for name in allowed],
            [_figure(logs.get(name)) for name in allowed],
            _figure(answer.coverage, digits=3),
        ]

    def _close(self) -> None:
        if not self._answers:
            return
        judged = -1 if self._raised is None else VERDICTS.index(verdict(self._raised))
        self._cards.append(_json([self._pictures, judged, self._answers]))
        self._answers, self._raised = [], None

    def to_json(self, title: str, told: Mapping[str, str], pictures: Sequence[Sequence[Any]]) -> Iterator[str]:
        """The whole as JSON that can stand in a page, in parts."""
        self._close()
        content = {
            "title": _text(title),
            "told": [[_text(name), _text(value)] for name, value in told.items()],
            "verdicts": VERDICTS,
            "questions": [
                [_text(id), _text(question), list(allowed.values())]
                for (id, question), allowed in zip(self._questions, self._allowed, strict=True)
            ],
            "texts": list(self._texts),
            "pictures": pictures,
        }
        yield _json(content)[:-1] + ',"cards":['
        for number, card in enumerate(self._cards):
            yield f"{',' if number else ''}\n{card}"
        yield "]}"


def _severity(answer: Answer) -> str:
    return answer.severity or "warn"  # as checks have it where none is named


def _marks(answer: Answer) -> int:
    reason = answer.finish_reason
    marks = _FLAGGED * bool(answer.flagged) + _CUT * (reason == "length") + _SKIPPED * (reason == "skipped")
    coverage = answer.coverage if answer.probabilities else None
    return marks + _UNCOVERED * (coverage is not None and coverage < COVERED)


def _figure(value: float | None, *, digits: int = 6) -> float | None:
    """So many digits will do, and JSON has no infinity."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def _text(text: str) -> str:
    """`text` as it may be shown: what could turn a line round, or is no character at all, is spelt out."""
    return printable(text, keep="\n\t")


_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def _json(content: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)


# ------------------------------------------------------------------------------------------------------- thumbnails


class _Thumbnails:
    """Numbers for pictures; their thumbnails made in a few threads and written in that order, equal bytes once."""

    def __init__(self, write: Callable[[str], None], on_picture: Callable[[str], None]) -> None:
        self._write = write
        self._on_picture = on_picture
        self._numbers: dict[tuple[str, str, bytes | None], int] = {}
        self._places: dict[bytes, int] = {}  # of thumbnails in the page, by the picture's hash
        self._roots: dict[str, str] = {}  # each once in memory: they repeat
        self._pictures: list[list[Any]] = []
        self._waiting: deque[tuple[int, Row, Future[bytes | str]]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "thumbnail")

    def __enter__(self) -> _Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def number(self, row: Row) -> int:
        """The picture's number in the page; the same row has the same."""
        key = (*row.key, row.sha256)
        if key in self._numbers:
            return self._numbers[key]
        number = self._numbers[key] = len(self._pictures)
        root = _text(row.root)
        self._pictures.append([_text(row.path), self._roots.setdefault(root, root), -1, "", row.width, row.height])
        self._waiting.append((number, row, self._pool.submit(_thumbnail, row, self._places)))
        if len(self._waiting) > 4 * THREADS:
            self._take()
        return number

    def finish(self) -> list[list[Any]]:
        """Of every picture: path, root, its thumbnail's place or -1, why there is none, width, height."""
        while self._waiting:
            self._take()
        if self._places:
            self._write("</script>")
        return self._pictures

    def _take(self) -> None:
        number, row, future = self._waiting.popleft()
        made = future.result()
        if isinstance(made, str):
            self._pictures[number][3] = _text(made)
        else:
            assert row.sha256 is not None  # it was compared
            self._pictures[number][2] = self._place(row.sha256, made)
        self._on_picture(self._pictures[number][0])

    def _place(self, sha256: bytes, made: bytes) -> int:
        if sha256 not in self._places:
            place = self._places[sha256] = len(self._places)
            if place % BLOCK == 0:
                self._write(("</script>\n" if place else "") + '<script type="text/plain" class="thumbnails">')
            self._write(base64.b64encode(made).decode() + "\n")
        return self._places[sha256]


def _thumbnail(row: Row, known: Mapping[bytes, int]) -> bytes | str:
    """The thumbnail, nothing if its bytes are among the `known`, or the reason why there is none."""
    try:
        if row.kind != "image":
            return f"is a {row.kind}"
        if row.sha256 is None:
            return row.error or f"is {row.status}"
        large = (row.width or 0) * (row.height or 0) > LARGE_PIXELS or row.size > LARGE_BYTES
        with _ONE_LARGE if large else nullcontext():
            data = _same_bytes(row)
            return b"" if row.sha256 in known else _encoded(_small(data))
    except PictureError as error:
        return str(error)
    except Exception as error:  # one picture's thumbnail is never worth a page
        return f"cannot be shown: {error or type(error).__name__}"


def _same_bytes(row: Row) -> bytes:
    """The file's bytes if they are those of the row; PictureError if not."""
    found = Found(row.root, row.path, row.size, 0)
    try:
        size = os.stat(found.file).st_size
    except FileNotFoundError:
        raise PictureError("is no longer there") from None
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror}") from None
    if size == row.size:
        file = images.read(found)
        if file.sha256 == row.sha256:
            return file.data
    raise PictureError("was changed since it was answered about")


def _small(data: bytes) -> Image.Image:
    """The picture in `data`, upright RGB, its longest side at most THUMBNAIL. PictureError if it cannot be had."""
    from PIL import Image

    picture = images.decode(data, about=2 * THUMBNAIL)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return picture


def _encoded(picture: Image.Image) -> bytes:
    import io

    stream = io.BytesIO()
    if _has_webp():
        picture.save(stream, "WEBP", quality=QUALITY, method=4)
    else:
        picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


@cache
def _has_webp() -> bool:
    from PIL import features

    return bool(features.check("webp"))
