"""Thumbnails of a report's items, made in a few threads and written in the order in which they were asked for.

A thumbnail is only of the very bytes that the answers are about; where they are not at hand, the page says why. Knows
nothing of pages but how a block of thumbnails is written into one.
"""

from __future__ import annotations

import base64
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError, printable
from qvsplit.output.frames import VideoFrames
from qvsplit.output.names import time_span, timestamp
from qvsplit.output.verdicts import failure_reason
from qvsplit.runtime.cpus import usable_cpus
from qvsplit.sources import images
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    from PIL import Image

    from qvsplit.store.row import Content, Row

THUMBNAIL = 192  # pixels of the longest side
FRAME = 160  # likewise, of each of a video's few frames
QUALITY = 70  # of WebP or JPEG: 3 to 8 kB a thumbnail
MOST_THREADS = 4
BLOCK = 64  # thumbnails in one block of the page; a block is split when one of its thumbnails is first needed
# Images, and videos whose frames are, beyond these are decoded one at a time, so that memory does not grow with the
# threads.
LARGE_PIXELS = 24_000_000
LARGE_BYTES = 64 << 20
_ONE_LARGE = threading.Lock()


def shown_text(text: str) -> str:
    """Give `text` as a page may show it: what could turn a line round, or is no character at all, is spelt out."""
    return printable(text, keep="\n\t")


class Thumbnails:
    """Gives items, each part of a video too, their numbers in the page, and writes their thumbnails: equal ones once.

    Args:
        write: Appends text to the page.
        on_item: Called with the name of each item once its thumbnail, or the reason why there is none, is known.
        worded: How such a reason is said.
    """

    def __init__(
        self, write: Callable[[str], None], on_item: Callable[[str], None], worded: Callable[[str], str] = str
    ) -> None:
        self._write = write
        self._on_item = on_item
        self._worded = worded
        self._numbers: dict[tuple[str, str, str | None, int], int] = {}
        self._places: dict[Content, int] = {}  # of thumbnails in the page, by what they are of
        self._roots: dict[str, str] = {}  # each once in memory: they repeat
        self._items: list[list[Any]] = []
        self._videos = VideoFrames()
        self._pending: deque[tuple[int, Row, Future[bytes | str]]] = deque()
        threads = min(MOST_THREADS, usable_cpus())
        self._most_pending = 4 * threads
        self._pool = ThreadPoolExecutor(threads, "thumbnail")

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._videos.close()
        self._pool.shutdown()

    def number(self, row: Row) -> int:
        """Give the item's number in the page; the same row has the same."""
        key = (*row.key, row.sha256, row.part)
        if key in self._numbers:
            return self._numbers[key]
        number = self._numbers[key] = len(self._items)
        root = shown_text(row.root)
        item = [shown_text(row.name), self._roots.setdefault(root, root), -1, "", row.width, row.height]
        self._items.append(item + ([_shown_time(row), int(row.is_part)] if row.kind == "video" else []))
        self._pending.append((number, row, self._pool.submit(self._thumbnail, row)))
        if len(self._pending) > self._most_pending:
            self._take()
        return number

    def finish(self) -> list[list[Any]]:
        """Give of every item: name, root, its thumbnail's place or -1, why there is none, width, height.

        Of a video also its time, `0:42` or `0:10 to 0:20 of 0:42`, and 1 if it is a part.
        """
        while self._pending:
            self._take()
        if self._places:
            self._write("</script>")
        return self._items

    def _take(self) -> None:
        number, row, future = self._pending.popleft()
        thumbnail = future.result()
        if isinstance(thumbnail, str):
            self._items[number][3] = shown_text(self._worded(thumbnail))
        else:
            assert row.content is not None  # it was compared
            self._items[number][2] = self._place(row.content, thumbnail)
        self._on_item(self._items[number][0])

    def _place(self, content: Content, thumbnail: bytes) -> int:
        if content not in self._places:
            place = self._places[content] = len(self._places)
            if place % BLOCK == 0:
                self._write(("</script>\n" if place else "") + '<script type="text/plain" class="thumbnails">')
            self._write(base64.b64encode(thumbnail).decode() + "\n")
        return self._places[content]

    def _thumbnail(self, row: Row) -> bytes | str:
        """Give the thumbnail, nothing if the page has it already, or the reason why there is none."""
        try:
            # what failed may have crashed its decoder, and here an image is decoded in this very process
            if row.status == "failed" or row.content is None:
                return failure_reason(row)
            is_video = row.kind == "video"
            large = (row.width or 0) * (row.height or 0) > LARGE_PIXELS or (row.size > LARGE_BYTES and not is_video)
            with _ONE_LARGE if large else nullcontext():
                _check_size(row)
                if is_video:
                    self._videos.check(row)
                    return b"" if row.content in self._places else _encoded(self._videos.sheet(row, FRAME))
                data = _same_bytes(row)
                return b"" if row.content in self._places else _encoded(small_image(data, _most_pixels(row)))
        except ItemError as error:
            return str(error)
        except Exception as error:  # one item's thumbnail is never worth a page
            return f"cannot be shown: {error or type(error).__name__}"


def _shown_time(row: Row) -> str:
    """Give the duration of a video, and of a part its seconds; nothing where that is not known."""
    whole = "" if row.duration is None else timestamp(row.duration)
    return " of ".join(filter(None, [time_span(row), whole]))


def _check_size(row: Row) -> None:
    """Raise ItemError where the file cannot be the one of the row: it need not be read to see that."""
    try:
        size = os.stat(_entry(row).file).st_size
    except FileNotFoundError:
        raise ItemError("was not found") from None
    except OSError as error:
        raise ItemError(f"cannot be opened: {error.strerror}") from None
    if size != row.size:
        raise ItemError("has changed since it was encoded")


def _same_bytes(row: Row) -> bytes:
    """Give the file's bytes if they are those of the row. ItemError if not."""
    file = read(_entry(row))
    if file.sha256 != row.sha256:
        raise ItemError("has changed since it was encoded")
    return file.data


def _entry(row: Row) -> Entry:
    return Entry(row.root, row.path, row.size, None, None)


def _most_pixels(row: Row) -> int:
    """Give how many pixels the image of a row may have: it was read, under whatever limit."""
    return max(images.MAX_IMAGE_PIXELS, (row.width or 0) * (row.height or 0))


def small_image(data: bytes, max_pixels: int = images.MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode `data` to an upright RGB image, its longest side at most THUMBNAIL. ItemError if it is bad."""
    from PIL import Image

    image = images.decode(data, about=2 * THUMBNAIL, max_pixels=max_pixels)
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
