"""The local runner: concurrency, back-pressure, deadlines, and nothing else.

Threads read and decode, a bounded number ahead, each with a decoder process of its own; every device has a thread that
encodes one batch after the other. Results come out as they are known, those of encoded items in the order of the
entries. The runner knows nothing of rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from os import cpu_count

from qvsplit.errors import ItemError
from qvsplit.models.encoder import Encoder
from qvsplit.models.preparing import Prepared
from qvsplit.pipeline.stages import Decode, Encode, Prepare, Quantize, Read
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources.decoder import ITEM_SECONDS, DecoderPool, Fetch
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.pixel_budget import PixelBudget
from qvsplit.sources.source import Entry, local_file
from qvsplit.store.features import Features
from qvsplit.store.row import Content

# Decoded and not yet prepared: 0.4 GB of RGB. A larger image goes alone.
PIXELS_IN_FLIGHT = 100_000_000


class Known:
    """The outcome of an item whose content needs no encoding: it is held already, or in flight."""


KNOWN = Known()


@dataclass
class Result:
    """One item on its way, and in the end its outcome.

    Attributes:
        entry: As it was listed.
        info: What identifies the file, once it was read.
        width, height, taken_at, format: What decoding said of it, once it was decoded.
        outcome: Its features, why it has none, or KNOWN.
        seconds: What workers spent on it, by stage.
    """

    entry: Entry
    info: FileInfo | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    format: str | None = None
    outcome: Features | ItemError | Known | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _image: DecodedImage | None = None
    _prepared: Prepared | None = None
    _pixels: int = 0  # that it has of the budget

    @property
    def content(self) -> Content | None:
        """What names its features."""
        return None if self.info is None else (self.info.sha256, 0)


@dataclass
class _Batch:
    """Items that go through the encoder together."""

    items: list[Result]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return sum(item._prepared.patches for item in self.items if item._prepared is not None)


class DeviceWorker:
    """One device's thread: batches go through its encoder one after the other, and come out as bytes to be stored."""

    def __init__(self, encode: Encode, quantize: Quantize) -> None:
        self.encode = encode
        self.quantize = quantize
        self.waiting = 0  # batches not yet collected
        self._pool = ThreadPoolExecutor(1, "qvsplit-encode")
        self._ended = 0.0

    def submit(self, batch: _Batch) -> Future[_Batch]:
        """Queue a batch."""
        self.waiting += 1
        return self._pool.submit(self._run, batch)

    def _run(self, batch: _Batch) -> _Batch:
        began = time.perf_counter()
        if self._ended:
            batch.seconds["encoder idle"] = began - self._ended
        with Timer(batch.seconds, "forward"):
            encoded = self.encode([item._prepared for item in batch.items if item._prepared is not None])
        with Timer(batch.seconds, "copy"):
            for item, one in zip(batch.items, encoded, strict=True):
                item.outcome = one if isinstance(one, ItemError) else self.quantize(one)
                item._prepared = None
        self._ended = time.perf_counter()
        return batch

    def close(self) -> None:
        """End soon: what is still in the encoder is given up."""
        self.encode.encoder.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Devices:
    """Loaded encoders, ready to work: one worker for each device that was asked for."""

    encoder: Encoder
    prepare: Prepare
    workers: Sequence[DeviceWorker]
    patch_budget: int


@dataclass(frozen=True)
class RunnerOptions:
    """Bounds of a run; None is none."""

    workers: int | None = None
    limit: int | None = None  # items that are begun
    deadline: float | None = None  # by active_seconds(): after it no item is begun
    item_timeout: float = ITEM_SECONDS
    fetch: Fetch = local_file  # the source's


class LocalRunner:
    """Runs entries through the stages on this machine. Everything but the workers' part happens in the caller's thread.

    Args:
        options: Bounds.
        load: Gives the devices; called when the first item needs them, and not before.
        is_held: Whether features of a content exist already, so that it need not be decoded.

    Attributes:
        seconds: What was waited for, by stage.
        stopped: "limit" or "max-runtime" where that left entries.
        decoder_memory_bytes: The most that the decoders took, once it is closed.
    """

    def __init__(self, options: RunnerOptions, load: Callable[[], Devices], is_held: Callable[[Content], bool]) -> None:
        self.seconds: dict[str, float] = {}
        self.stopped = ""
        self.decoder_memory_bytes = 0
        self._options = options
        self._load = load
        self._is_held = is_held
        self._devices: Devices | None = None
        self._pool = DecoderPool(options.item_timeout, options.fetch)
        self._read, self._decode = Read(self._pool), Decode(self._pool)
        self._budget = PixelBudget(PIXELS_IN_FLIGHT)
        self._pending: list[Result] = []  # the batch that is being filled
        self._in_flight: deque[tuple[DeviceWorker, Future[_Batch]]] = deque()  # batches in the workers, in order
        self._contents: set[Content] = set()  # pending or in flight
        self._ready: deque[Result] = deque()  # through the encoder, not yet given

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give each entry's result; close the generator, or exhaust it, before `close`."""
        with closing(self._loaded(entries)) as loaded:
            for item in loaded:
                yield from self._take(item)
                yield from self.finished()
        yield from self._submit()
        while self._in_flight:
            yield from self._collect()

    def finished(self) -> Iterator[Result]:
        """Give the results of batches that are through; what failed in a worker is left for `run` to raise."""
        yield from self._given()
        while self._in_flight and self._in_flight[0][1].done() and self._in_flight[0][1].exception() is None:
            yield from self._collect()

    def close(self) -> None:
        """End everything; what is in flight is given up."""
        for worker in self._devices.workers if self._devices else ():
            worker.close()

    # --------------------------------------------------------------------------------------- reading and decoding

    def _loaded(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give the entries in order, read and decoded by worker threads, a bounded number ahead.

        Until the devices are there items wait as decoded images, which are larger than patches: then fewer wait.
        """
        workers = self._options.workers or min(8, cpu_count() or 1)
        window: deque[tuple[int, Future[Result]]] = deque()
        threads = ThreadPoolExecutor(workers, "qvsplit-decode")
        remaining = enumerate(entries)
        try:
            while True:
                ahead = workers if self._devices is None else 2 * workers
                while len(window) < ahead and (following := self._next(remaining)) is not None:
                    number, entry = following
                    window.append((number, threads.submit(self._load_item, number, entry)))
                if not window:
                    return
                number, future = window.popleft()
                self._budget.serve(number)
                with Timer(self.seconds, "wait for images"):
                    item = future.result()
                yield item
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._budget.close()
            self._pool.close()
            self.decoder_memory_bytes = self._pool.peak_memory()

    def _next(self, remaining: enumerate[Entry]) -> tuple[int, Entry] | None:
        """Give the next entry; None when there is no other, or none is to be begun any more."""
        number, entry = next(remaining, (0, None))
        if entry is None:
            return None
        if self._options.deadline is not None and active_seconds() > self._options.deadline:
            self.stopped = self.stopped or "max-runtime"
            return None
        if self._options.limit is not None and number >= self._options.limit:
            self.stopped = self.stopped or "limit"
            return None
        return number, entry

    def _load_item(self, number: int, entry: Entry) -> Result:
        """Read and hash; where the content is not known, decode; once the devices are there, prepare. In a thread."""
        item = Result(entry)

        def on_size(width: int, height: int) -> None:
            self._release(item)  # what a decoder had that died of it
            self._budget.take(number, width * height)
            item._pixels = width * height

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
                image = self._decode(entry, info, on_size)
            if isinstance(image, ItemError):
                item.outcome = image
                return item
            item._image = image
            item.width, item.height = image.width, image.height
            item.taken_at, item.format = image.taken_at, image.format
            if self._devices is not None:
                self._prepare(item, self._devices.prepare)
            return item
        finally:
            if item._image is None:
                self._release(item)

    def _is_known(self, item: Result) -> bool:
        assert item.content is not None
        return self._is_held(item.content)

    def _prepare(self, item: Result, prepare: Prepare) -> None:
        assert item._image is not None
        with Timer(item.seconds, "preprocess"):
            prepared = prepare(item._image.pixels)
        if isinstance(prepared, ItemError):
            item.outcome = prepared
        else:
            item._prepared = prepared
        self._release(item)

    def _release(self, item: Result) -> None:
        """Let go of an item's pixels, if it still has any."""
        item._image = None
        self._budget.give_back(item._pixels)
        item._pixels = 0

    # -------------------------------------------------------------------------------------------------- encoding

    def _take(self, item: Result) -> Iterator[Result]:
        """Queue an item that has to be encoded; give any other."""
        if item.outcome is None and (self._is_known(item) or item.content in self._contents):
            item.outcome = KNOWN  # decoded beside another item of the same bytes
        if item.outcome is None and item._prepared is None:  # decoded before the devices were there
            self._prepare(item, self._loaded_devices().prepare)
        self._release(item)
        if item.outcome is not None:
            yield item
            return
        assert item._prepared is not None
        assert item.content is not None
        budget = self._loaded_devices().patch_budget
        if self._pending and _Batch(self._pending).patches + item._prepared.patches > budget:
            yield from self._submit()
        self._pending.append(item)
        self._contents.add(item.content)
        if _Batch(self._pending).patches >= budget:
            yield from self._submit()

    def _loaded_devices(self) -> Devices:
        if self._devices is None:
            self._devices = self._load()
        return self._devices

    def _submit(self) -> Iterator[Result]:
        """Hand the batch to the worker with the least to do. One in the encoder and one behind it are enough."""
        if not self._pending:
            return
        workers = self._loaded_devices().workers
        batch, self._pending = _Batch(self._pending), []
        while all(worker.waiting > 1 for worker in workers):
            yield from self._collect()
        worker = min(workers, key=lambda one: one.waiting)
        self._in_flight.append((worker, worker.submit(batch)))

    def _collect(self) -> Iterator[Result]:
        """Wait for the oldest batch in flight, and give its results."""
        worker, future = self._in_flight[0]
        with Timer(self.seconds, "wait for the encoder"):
            batch = future.result()
        self._in_flight.popleft()
        worker.waiting -= 1
        for stage, seconds in batch.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self._ready += batch.items
        yield from self._given()

    def _given(self) -> Iterator[Result]:
        while self._ready:
            item = self._ready.popleft()
            assert item.content is not None
            self._contents.discard(item.content)
            yield item
