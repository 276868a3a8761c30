"""Read one item: Read → Scan of a video, Decode and Prepare of an image. What is wrong with it is its outcome."""

from __future__ import annotations

from collections.abc import Callable

from qvsplit.errors import ItemError
from qvsplit.pipeline.items import KNOWN, Result
from qvsplit.pipeline.stages import Decode, Prepare, Read, Scan
from qvsplit.pipeline.summary import Timer
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.files import FileInfo
from qvsplit.sources.pixel_budget import PixelBudget
from qvsplit.sources.source import Entry

# Decoded and not yet prepared: 0.4 GB of RGB. A larger image goes alone.
PIXELS_IN_FLIGHT = 100_000_000


class ItemReader:
    """Reads items, each calling thread with a decoder process of its own.

    Args:
        pool: The decoder processes.
        is_known: Whether the content of an item that was read needs no encoding.
        videos: Take videos as well; else they fail, with a reason.

    Attributes:
        budget: Bounds the decoded pixels that are in memory.
    """

    def __init__(self, pool: DecoderPool, is_known: Callable[[Result], bool], *, videos: bool = True) -> None:
        self.budget = PixelBudget(PIXELS_IN_FLIGHT)
        self._read, self._decode, self._scan = Read(pool), Decode(pool), Scan(pool)
        self._is_known = is_known
        self._videos = videos

    def read(self, number: int, entry: Entry, prepare: Prepare | None) -> Result:
        """Read and hash item `number`. Where the content is not known, scan a video; decode an image and `prepare` it.

        Without a `prepare` an image stays as it was decoded.
        """
        item = Result(entry)

        def on_size(width: int, height: int) -> None:
            self.release(item)  # what a decoder had that died of it
            self.take_pixels(number, item, width * height)

        try:
            with Timer(item.seconds, "read and decode"):
                info = self._read(entry)
                if isinstance(info, ItemError):
                    item.outcome = info
                    return item
                item.info = info
                if self._is_known(item):
                    item.outcome = KNOWN
                    return item
                if info.kind == "video":
                    self._scan_video(item, info)
                    return item
                image = self._decode(entry, info, on_size)
            if isinstance(image, ItemError):
                item.outcome = image
                return item
            item.image = image
            item.width, item.height = image.width, image.height
            item.taken_at, item.format, item.cut_rows = image.taken_at, image.format, image.cut_rows
            if prepare is not None:
                self.prepare(item, prepare)
            return item
        finally:
            if item.image is None:
                self.release(item)

    def _scan_video(self, item: Result, info: FileInfo) -> None:
        if not self._videos:
            item.outcome = ItemError("is a video, and `videos=False` leaves videos out", "reader-missing")
            return
        video = self._scan(item.entry, info)
        if isinstance(video, ItemError):
            item.outcome = video
        else:
            item.video, item.width, item.height = video, video.width, video.height

    def prepare(self, item: Result, prepare: Prepare) -> None:
        """Prepare an image that was decoded."""
        assert item.image is not None
        with Timer(item.seconds, "preprocess"):
            prepared = prepare(item.image.pixels)
        if isinstance(prepared, ItemError):
            item.outcome = prepared
        else:
            item.prepared = prepared
            if prepared.decoded_bytes:
                return  # its pixels wait for the encoder; they count until it is queued
        self.release(item)

    def take_pixels(self, number: int, item: Result, pixels: int) -> None:
        """Wait until an item may have so many decoded pixels."""
        self.budget.take(number, pixels)
        item.pixels = pixels

    def release(self, item: Result) -> None:
        """Let go of an item's pixels, if it still has any."""
        item.image = None
        self.budget.give_back(item.pixels)
        item.pixels = 0
