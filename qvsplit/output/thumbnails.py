"""Thumbnails of a report's images, made in a few threads and written in the order in which they were asked for.

A thumbnail is only of the very bytes that the answers are about; where they are not at hand, the page says why. Knows
nothing of pages but how a block of thumbnails is written into one.
"""

from __future__ import annotations

import base64
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError, printable
from qvsplit.output.verdicts import failure_reason
from qvsplit.sources import images
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    from PIL import Image

    from qvsplit.store.row import Row

THUMBNAIL = 192  # pixels of the longest side
QUALITY = 70  # of WebP or JPEG: 3 to 8 kB a thumbnail
THREADS = min(4, os.cpu_count() or 1)
BLOCK = 64  # thumbnails in one block of the page; a block is split when one of its thumbnails is first needed
# Images beyond these are decoded one at a time, so that memory does not grow with the threads.
LARGE_PIXELS = 24_000_000
LARGE_BYTES = 64 << 20
_ONE_LARGE = threading.Lock()


def shown_text(text: str) -> str:
    """Give `text` as a page may show it: what could turn a line round, or is no character at all, is spelt out."""
    return printable(text, keep="\n\t")


class Thumbnails:
    """Gives images their numbers in the page, and writes their thumbnails: equal bytes once.

    Args:
        write: Appends text to the page.
        on_item: Called with the path of each image once its thumbnail, or the reason why there is none, is known.
    """

    def __init__(self, write: Callable[[str], None], on_item: Callable[[str], None]) -> None:
        self._write = write
        self._on_item = on_item
        self._numbers: dict[tuple[str, str, str | None], int] = {}
        self._places: dict[str, int] = {}  # of thumbnails in the page, by the hash of the image's file
        self._roots: dict[str, str] = {}  # each once in memory: they repeat
        self._images: list[list[Any]] = []
        self._pending: deque[tuple[int, Row, Future[bytes | str]]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "thumbnail")

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def number(self, row: Row) -> int:
        """Give the image's number in the page; the same row has the same."""
        key = (*row.key, row.sha256)
        if key in self._numbers:
            return self._numbers[key]
        number = self._numbers[key] = len(self._images)
        root = shown_text(row.root)
        path = shown_text(row.path)
        self._images.append([path, self._roots.setdefault(root, root), -1, "", row.width, row.height])
        self._pending.append((number, row, self._pool.submit(_thumbnail, row, self._places)))
        if len(self._pending) > 4 * THREADS:
            self._take()
        return number

    def finish(self) -> list[list[Any]]:
        """Give of every image: path, root, its thumbnail's place or -1, why there is none, width, height."""
        while self._pending:
            self._take()
        if self._places:
            self._write("</script>")
        return self._images

    def _take(self) -> None:
        number, row, future = self._pending.popleft()
        thumbnail = future.result()
        if isinstance(thumbnail, str):
            self._images[number][3] = shown_text(thumbnail)
        else:
            assert row.sha256 is not None  # it was compared
            self._images[number][2] = self._place(row.sha256, thumbnail)
        self._on_item(self._images[number][0])

    def _place(self, sha256: str, thumbnail: bytes) -> int:
        if sha256 not in self._places:
            place = self._places[sha256] = len(self._places)
            if place % BLOCK == 0:
                self._write(("</script>\n" if place else "") + '<script type="text/plain" class="thumbnails">')
            self._write(base64.b64encode(thumbnail).decode() + "\n")
        return self._places[sha256]


def _thumbnail(row: Row, known: Mapping[str, int]) -> bytes | str:
    """Give the thumbnail, nothing if its bytes are among the `known`, or the reason why there is none."""
    try:
        if row.kind != "image":
            return f"is a {row.kind}"
        if row.sha256 is None:
            return failure_reason(row)
        large = (row.width or 0) * (row.height or 0) > LARGE_PIXELS or row.size > LARGE_BYTES
        with _ONE_LARGE if large else nullcontext():
            data = _same_bytes(row)
            return b"" if row.sha256 in known else _encoded(small_image(data))
    except ItemError as error:
        return str(error)
    except Exception as error:  # one image's thumbnail is never worth a page
        return f"cannot be shown: {error or type(error).__name__}"


def _same_bytes(row: Row) -> bytes:
    """Give the file's bytes if they are those of the row. ItemError if not."""
    entry = Entry(row.root, row.path, row.size, None, None)
    try:
        size = os.stat(entry.file).st_size
    except FileNotFoundError:
        raise ItemError("was not found") from None
    except OSError as error:
        raise ItemError(f"cannot be opened: {error.strerror}") from None
    if size == row.size:
        file = read(entry)
        if file.sha256 == row.sha256:
            return file.data
    raise ItemError("has changed since it was encoded")


def small_image(data: bytes) -> Image.Image:
    """Decode `data` to an upright RGB image, its longest side at most THUMBNAIL. ItemError if it is bad."""
    from PIL import Image

    image = images.decode(data, about=2 * THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _encoded(image: Image.Image) -> bytes:
    import io

    stream = io.BytesIO()
    if _has_webp():
        image.save(stream, "WEBP", quality=QUALITY, method=4)
    else:
        image.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


@cache
def _has_webp() -> bool:
    from PIL import features

    return bool(features.check("webp"))
