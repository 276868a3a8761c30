"""A few frames of a video, or of a part of one, as one small image. Decoded in child processes that can be killed.

One frame is in memory at a time, and of each only a small copy is kept.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvsplit.errors import ItemError
from qvsplit.sources.decoder import Decoder, DecoderPool
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    from PIL import Image

    from qvsplit.sources.files import FileInfo
    from qvsplit.store.row import Row

FRAMES = 4
CARD = (284, 192)  # pixels of a card's picture at its smallest, which the frames should fill
GAP = 2  # pixels between frames


class VideoFrames:
    """Shows videos. Each thread that asks has a decoder of its own; close it in the end.

    A file is hashed again only if its size, time or inode is not what it was before: a long video may have many parts.
    """

    def __init__(self) -> None:
        self._pool: DecoderPool | None = None
        self._hashed: dict[str, tuple[tuple[int, int, int], FileInfo]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the child processes, whatever they do."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def sheet(self, row: Row, side: int) -> Image.Image:
        """Give frames of a row side by side, in rows and columns that fill a card best.

        Args:
            row: Of a video, whose file is there.
            side: The most pixels of a frame's longer side.

        Raises:
            ItemError: The file is not the one that was encoded, or its frames cannot be decoded.
        """
        from PIL import Image

        decoder, entry, info = self._decoder(), _entry(row), self.check(row)
        indices = spread(sampled_indices(row) or _indices_by_time(row, decoder, entry, info), FRAMES)
        if not indices:
            raise ItemError("has no frames to be shown")
        small = []
        for frame in decoder.frames(entry, info, indices):
            image = Image.fromarray(frame)  # a copy: the next frame may lie in the same memory
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
            small.append(image)
        return _side_by_side(small)

    def check(self, row: Row) -> FileInfo:
        """Raise ItemError unless the file is the one that was encoded."""
        info = self._info(self._decoder(), _entry(row))
        if info.sha256 != row.sha256:
            raise ItemError("has changed since it was encoded")
        return info

    def _decoder(self) -> Decoder:
        with self._lock:
            if self._pool is None:
                self._pool = DecoderPool(gifs_are_videos=True)  # a GIF here is one whose row is a video's
        return self._pool.mine()

    def _info(self, decoder: Decoder, entry: Entry) -> FileInfo:
        status = os.stat(entry.file)
        signature = status.st_size, status.st_mtime_ns, status.st_ino
        with self._lock:
            known = self._hashed.get(entry.file)
        if known is not None and known[0] == signature:
            return known[1]
        info = decoder.read(entry)
        if info.version is not None:  # else it may change within its time's resolution
            with self._lock:
                self._hashed[entry.file] = signature, info
        return info


def sampled_indices(row: Row) -> list[int]:
    """Give the numbers of the frames that a row's features are of, as far as the row says."""
    try:
        indices = json.loads(row.media or "{}").get("frames_indices", [])
    except (ValueError, AttributeError, RecursionError):
        return []
    sound = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
    return sorted(set(indices)) if sound else []


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """Give at most so many of the numbers, evenly spread: each from the middle of an equal share."""
    count = min(most, len(numbers))
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


def columns_of(number: int, width: int, height: int) -> int:
    """Say in how many columns so many frames of this size are largest on a card."""

    def scale(columns: int) -> float:
        return min(CARD[0] / (columns * width), CARD[1] / (math.ceil(number / columns) * height))

    return max(range(1, number + 1), key=scale)


def _entry(row: Row) -> Entry:
    return Entry(row.root, row.path, row.size, None, None)


def _indices_by_time(row: Row, decoder: Decoder, entry: Entry, info: FileInfo) -> list[int]:
    video = decoder.scan(entry, info)
    first = 0 if row.start is None else math.ceil(row.start * video.fps - 1e-6)
    after = video.n_frames if row.end is None else math.ceil(row.end * video.fps - 1e-6)
    return list(range(max(0, first), min(video.n_frames, max(after, first + 1))))


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    width, height = (max(frame.size[side] for frame in frames) for side in (0, 1))
    columns = columns_of(len(frames), width, height)
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * (width + GAP), number // columns * (height + GAP)))
    return sheet
