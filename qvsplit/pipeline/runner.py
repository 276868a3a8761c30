"""The local runner: concurrency, back-pressure, deadlines, and nothing else.

Threads read and decode, a bounded number ahead, each with a decoder process of its own; every device has a thread that
encodes one batch after the other. A video comes through slice by slice, so that no more than a few of its frames are in
memory. Results come out as they are known, those of encoded items in the order of the entries. The runner knows nothing
of rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qvsplit.errors import ItemError
from qvsplit.models.copies import Copies, Sent, ToHost
from qvsplit.models.encoder import Clips, Encoded, Encoder
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import Clip
from qvsplit.pipeline.channel import Channel
from qvsplit.pipeline.parts import Part, Parts
from qvsplit.pipeline.stages import Decode, Encode, JoinSlices, Prepare, PrepareClips, Quantize, Read, Scan, to_host
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime import interrupts
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.cpus import default_workers
from qvsplit.runtime.memory import give_back_now
from qvsplit.sources.decoder import ITEM_SECONDS, Closed, DecoderPool, Fetch
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import MAX_IMAGE_PIXELS, DecodedImage
from qvsplit.sources.pixel_budget import PixelBudget
from qvsplit.sources.source import Entry, local_file
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.row import Content

if TYPE_CHECKING:
    import torch

# Decoded and not yet prepared: 0.4 GB of RGB. A larger image goes alone.
PIXELS_IN_FLIGHT = 100_000_000
# Of one batch, where images are prepared on the encoder's device. A larger image goes alone.
DECODED_BYTES = 1 << 27


class Known:
    """The outcome of an item whose content needs no encoding: it is held already, or in flight."""


KNOWN = Known()
DECODED_FRAMES = 2  # of a video that are in memory as pixels


@dataclass
class Result:
    """One item on its way, and in the end its outcome.

    Attributes:
        entry: As it was listed.
        info: What identifies the file, once it was read.
        width, height, taken_at, format, cut_rows: What decoding said of an image, once it was decoded.
        video: What a video's packets say, once it was scanned.
        outcome: Its parts with their features, why it has none, or KNOWN.
        seconds: What workers spent on it, by stage.
    """

    entry: Entry
    info: FileInfo | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    format: str | None = None
    cut_rows: int | None = None
    video: VideoInfo | None = None
    outcome: list[Part] | ItemError | Known | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _image: DecodedImage | None = None
    _prepared: Prepared | None = None
    _pixels: int = 0  # that it has of the budget
    _parts: Parts | None = None
    _encoding: int = 0  # pieces that are to come out of the encoder
    _sent: bool = False  # whether all pieces are there

    @property
    def content(self) -> Content | None:
        """What names its features; of a video with several parts, those of the first."""
        return None if self.info is None else (self.info.sha256, 0)


@dataclass
class _Piece:
    """What goes through the encoder by itself: an image, or one temporal slice of a clip."""

    item: Result
    prepared: Prepared
    clip: Clip | None = None
    outcome: Features | ItemError | None = None


@dataclass
class _Batch:
    """Pieces that go through the encoder together."""

    pieces: list[_Piece]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return sum(piece.prepared.patches for piece in self.pieces)

    def is_within(self, budget: int) -> bool:
        """Say whether it has at most so many patches, and no more decoded pixels than may be in one batch."""
        decoded = sum(piece.prepared.decoded_bytes for piece in self.pieces)
        return self.patches <= budget and decoded <= DECODED_BYTES


_Computed: TypeAlias = "tuple[Sequence[Encoded | ItemError], torch.cuda.Event]"
_Made: TypeAlias = "Result | _Piece | ItemError"  # what a worker makes: the item itself, then the slices of a video


class DeviceWorker:
    """One device's thread: batches go through its encoder one after the other, and come out as bytes to be stored.

    With `copies` the caller sends a batch when it queues it, and another thread receives the features.
    """

    def __init__(self, encode: Encode, quantize: Quantize, copies: Copies | None = None) -> None:
        self.encode = encode
        self.quantize = quantize
        self.waiting = 0  # batches not yet collected
        self._copies = copies
        use = (lambda: None) if copies is None else copies.port.use
        self._pool = ThreadPoolExecutor(1, "qvsplit-encode", initializer=use)
        self._receiver = ThreadPoolExecutor(1, "qvsplit-receive", initializer=use)
        self._ended = 0.0

    def submit(self, batch: _Batch) -> Future[_Batch]:
        """Queue a batch."""
        self.waiting += 1
        if self._copies is None:
            return self._pool.submit(self._run, batch)
        sent = self._copies.send([piece.prepared for piece in batch.pieces])
        encoding = self._pool.submit(self._compute, batch, sent, self._copies)
        return self._receiver.submit(self._receive, batch, encoding, self._copies)

    def _run(self, batch: _Batch) -> _Batch:
        encoded = self._encode(batch, [piece.prepared for piece in batch.pieces])
        self._take(batch, encoded, to_host)
        self._ended = time.perf_counter()
        return batch

    def _compute(self, batch: _Batch, sent: Sent | None, copies: Copies) -> _Computed:
        prepared = [piece.prepared for piece in batch.pieces] if sent is None else copies.arrived(sent)
        encoded = self._encode(batch, prepared)
        self._ended = time.perf_counter()
        return encoded, copies.port.computed()

    def _receive(self, batch: _Batch, encoding: Future[_Computed], copies: Copies) -> _Batch:
        encoded, computed = encoding.result()
        with copies.receiving(computed) as received:
            self._take(batch, encoded, received)
        return batch

    def _encode(self, batch: _Batch, prepared: Sequence[Prepared]) -> Sequence[Encoded | ItemError]:
        began = time.perf_counter()
        if self._ended:
            batch.seconds["encoder idle"] = began - self._ended
        with Timer(batch.seconds, "forward"):
            return self.encode(prepared)

    def _take(self, batch: _Batch, encoded: Sequence[Encoded | ItemError], received: ToHost) -> None:
        with Timer(batch.seconds, "copy"):
            for piece, one in zip(batch.pieces, encoded, strict=True):
                piece.outcome = one if isinstance(one, ItemError) else self.quantize(one, received)

    def close(self) -> None:
        """End soon: what is still in the encoder is given up."""
        self.encode.encoder.cancel()
        for pool in (self._pool, self._receiver):
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Devices:
    """Loaded encoders, ready to work: one worker for each device that was asked for."""

    encoder: Encoder
    prepare: Prepare
    workers: Sequence[DeviceWorker]
    patch_budget: int
    tensors: tuple[TensorSpec, ...] = ()
    slice_budget: int = 1 << 30  # of one slice of a clip


@dataclass(frozen=True)
class Load:
    """What gives a runner its encoders: called when the first item needs them, and not before.

    Attributes:
        devices: The encoder, on every device.
        clips: What videos need beside it; an ItemError where they cannot be encoded.
    """

    devices: Callable[[], Devices]
    clips: Callable[[], Clips | ItemError]


@dataclass(frozen=True)
class RunnerOptions:
    """Bounds of a run; None is none."""

    workers: int | None = None
    limit: int | None = None  # items that are begun
    deadline: float | None = None  # by active_seconds(): after it no item is begun
    item_timeout: float = ITEM_SECONDS
    fetch: Fetch = local_file  # the source's
    videos: bool = True  # else they fail, with a reason
    gifs_are_videos: bool = False
    scratch: Path | None = None  # the folder for features of a video that are too many for memory
    max_image_pixels: int = MAX_IMAGE_PIXELS


class LocalRunner:
    """Runs entries through the stages on this machine. Everything but the workers' part happens in the caller's thread.

    Args:
        options: Bounds.
        load: Gives the encoder.
        is_held: Whether features of a content exist already, so that it need not be decoded.

    Attributes:
        seconds: What was waited for, by stage.
        stopped: "limit" or "max-runtime" where that left entries.
        decoder_memory_bytes: The most that the decoders took, once it is closed.
    """

    def __init__(self, options: RunnerOptions, load: Load, is_held: Callable[[Content], bool]) -> None:
        self.seconds: dict[str, float] = {}
        self.stopped = ""
        self.decoder_memory_bytes = 0
        self._options = options
        self._load = load
        self._is_held = is_held
        self._devices: Devices | None = None
        self._pool = DecoderPool(options.item_timeout, options.fetch, options.gifs_are_videos, options.max_image_pixels)
        self._read, self._decode, self._scan = Read(self._pool), Decode(self._pool), Scan(self._pool)
        self._clips: Loaded | ItemError | None = None
        self._clips_loaded = threading.Event()
        self._channels: set[Channel[_Made]] = set()  # of items that are not through
        self._budget = PixelBudget(PIXELS_IN_FLIGHT)
        self._pending: list[_Piece] = []  # the batch that is being filled
        self._in_flight: deque[tuple[DeviceWorker, Future[_Batch]]] = deque()  # batches in the workers, in order
        self._contents: set[Content] = set()  # pending or in flight
        self._ready: deque[Result] = deque()  # through the encoder, not yet given

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give each entry's result; close the generator, or exhaust it, before `close`."""
        with closing(self._loaded(entries)) as loaded:
            for item, made in loaded:
                yield from self._take(item, made)
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

    def _loaded(self, entries: Sequence[Entry]) -> Generator[tuple[Result, Iterator[_Made]], None, None]:
        """Give the entries in order, read and decoded by worker threads, a bounded number ahead.

        With each comes what more its worker makes of it: the slices of a video. Until the devices are there images wait
        decoded, which are larger than patches: then fewer wait.
        """
        workers = self._options.workers or default_workers()
        window: deque[tuple[int, Channel[_Made]]] = deque()
        threads = ThreadPoolExecutor(workers, "qvsplit-decode")
        remaining = enumerate(entries)
        try:
            while True:
                ahead = workers if self._devices is None else 2 * workers
                while len(window) < ahead and (following := self._next(remaining)) is not None:
                    number, entry = following
                    channel: Channel[_Made] = Channel()
                    self._channels.add(channel)
                    window.append((number, channel))
                    threads.submit(self._work, number, entry, channel)
                if not window:
                    return
                number, channel = window.popleft()
                self._budget.serve(number)
                made = iter(channel)
                with Timer(self.seconds, "wait for images"):
                    item = next(made)
                assert isinstance(item, Result), "first comes the item itself"
                yield item, made
                channel.close()
                self._channels.discard(channel)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._budget.close()
            for channel in self._channels:
                channel.close()
            self._clips_loaded.set()
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

    def _work(self, number: int, entry: Entry, channel: Channel[_Made]) -> None:
        """Make what is to be made of one entry. In a thread."""
        error: BaseException | None = None
        try:
            item = self._load_item(number, entry)
            channel.put(item)
            if item.video is not None and item.outcome is None:
                self._make_slices(number, item, channel)
        except Closed as closed:
            error = closed  # nobody takes any more, or somebody closed the decoders
        except BaseException as raised:  # the taker's thread is where it is raised
            error = raised
        finally:
            channel.end(error)

    def _load_item(self, number: int, entry: Entry) -> Result:
        """Read and hash. Where the content is not known, scan a video; decode an image and, if there are devices,
        prepare it.
        """
        item = Result(entry)

        def on_size(width: int, height: int) -> None:
            self._release(item)  # what a decoder had that died of it
            self._take_pixels(number, item, width * height)

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
            item._image = image
            item.width, item.height = image.width, image.height
            item.taken_at, item.format, item.cut_rows = image.taken_at, image.format, image.cut_rows
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
            if prepared.decoded_bytes:
                return  # its pixels wait for the encoder; they count until it is queued
        self._release(item)

    def _take_pixels(self, number: int, item: Result, pixels: int) -> None:
        self._budget.take(number, pixels)
        item._pixels = pixels

    def _release(self, item: Result) -> None:
        """Let go of an item's pixels, if it still has any."""
        item._image = None
        self._budget.give_back(item._pixels)
        item._pixels = 0

    # ---------------------------------------------------------------------------------------------------- videos

    def _scan_video(self, item: Result, info: FileInfo) -> None:
        if not self._options.videos:
            item.outcome = ItemError("is a video, and `videos=False` leaves videos out", "reader-missing")
            return
        video = self._scan(item.entry, info)
        if isinstance(video, ItemError):
            item.outcome = video
        else:
            item.video, item.width, item.height = video, video.width, video.height

    def _make_slices(self, number: int, item: Result, channel: Channel[_Made]) -> None:
        """Decode sampled frames of a video and prepare them; what is wrong with it comes as a value. In a thread."""
        self._clips_loaded.wait()
        if not isinstance(self._clips, Loaded):
            return  # what has loaded them knows why
        assert item.video is not None
        assert item.info is not None
        self._take_pixels(number, item, DECODED_FRAMES * item.video.width * item.video.height)
        slices = self._clips.prepare(self._pool, item)
        try:
            with closing(slices):
                while True:
                    with Timer(item.seconds, "decode and prepare videos"):
                        made = next(slices, None)
                    if made is None:
                        return
                    channel.put(_Piece(item, made[1], made[0]))
        except ItemError as error:
            channel.put(error.with_traceback(None))
        finally:
            self._release(item)

    def _loaded_clips(self) -> Loaded | ItemError:
        """Give what videos need beside the encoder, loaded when the first one does."""
        if self._clips is None:
            devices = self._loaded_devices()
            loaded = self._load.clips()
            self._clips = loaded if isinstance(loaded, ItemError) else Loaded(loaded, devices)
            self._clips_loaded.set()
        return self._clips

    def _take_video(self, item: Result, made: Iterator[_Made]) -> Iterator[Result]:
        """Queue the slices of a video as they come."""
        clips = self._loaded_clips()
        if isinstance(clips, ItemError):
            item.outcome = clips
            yield item
            return
        assert item.content is not None
        self._contents.add(item.content)
        item._parts = Parts(clips.join, self._options.scratch)
        while item.outcome is None:
            with Timer(self.seconds, "wait for images"):
                one = next(made, None)
            if one is None:
                break
            interrupts.check()
            if isinstance(one, ItemError):
                item.outcome = one
            elif isinstance(one, _Piece):
                yield from self._queue(one)
        item._sent = True
        if not item._encoding:
            self._end_item(item)
        yield from self._given()

    # -------------------------------------------------------------------------------------------------- encoding

    def _take(self, item: Result, made: Iterator[_Made]) -> Iterator[Result]:
        """Queue an item that has to be encoded; give any other."""
        if item.outcome is None and (self._is_known(item) or item.content in self._contents):
            item.outcome = KNOWN  # decoded beside another item of the same bytes
        if item.outcome is None and item.video is not None:
            yield from self._take_video(item, made)
            return
        if item.outcome is None and item._prepared is None:  # decoded before the devices were there
            self._prepare(item, self._loaded_devices().prepare)
        if item.video is None:  # the pixels of one are its worker's, who may still be at it
            self._release(item)
        if item.outcome is not None:
            yield item
            return
        assert item._prepared is not None
        assert item.content is not None
        self._contents.add(item.content)
        item._parts, item._sent = Parts(_only_slice, None), True
        prepared, item._prepared = item._prepared, None
        yield from self._queue(_Piece(item, prepared))

    def _queue(self, piece: _Piece) -> Iterator[Result]:
        """Put a piece into the batch that is being filled, which is submitted once it is full."""
        budget = self._loaded_devices().patch_budget
        alone = piece.clip is not None  # a slice, which is large enough, and has the bits that it has alone
        if self._pending and (alone or not _Batch([*self._pending, piece]).is_within(budget)):
            yield from self._submit()
        self._pending.append(piece)
        piece.item._encoding += 1
        if alone or _Batch(self._pending).patches >= budget:
            yield from self._submit()

    def _loaded_devices(self) -> Devices:
        if self._devices is None:
            self._devices = self._load.devices()
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
        for piece in batch.pieces:
            self._receive(piece)
        yield from self._given()

    def _receive(self, piece: _Piece) -> None:
        """Take up what came of a piece; with its last one an item is through."""
        item = piece.item
        item._encoding -= 1
        if isinstance(item.outcome, ItemError):
            pass  # what is left of an item that failed
        elif isinstance(piece.outcome, ItemError):
            item.outcome = piece.outcome
        else:
            assert piece.outcome is not None
            assert item._parts is not None
            try:
                item._parts.add(piece.outcome, piece.clip)
            except ItemError as error:
                item.outcome = error.with_traceback(None)
        if item._sent and not item._encoding:
            self._end_item(item)

    def _end_item(self, item: Result) -> None:
        if item.outcome is None:
            assert item._parts is not None
            try:
                item.outcome = item._parts.finish()
            except ItemError as error:
                item.outcome = error.with_traceback(None)
        item._parts = None
        if item.video is not None:
            give_back_now()
        self._ready.append(item)

    def _given(self) -> Iterator[Result]:
        while self._ready:
            item = self._ready.popleft()
            assert item.content is not None
            self._contents.discard(item.content)
            yield item


class Loaded:
    """What videos need, ready to work: stages with the devices' bounds."""

    def __init__(self, clips: Clips, devices: Devices) -> None:
        self.join = JoinSlices(clips.config, devices.tensors)
        self._clips = clips
        self._devices = devices

    def prepare(self, pool: DecoderPool, item: Result) -> Generator[tuple[Clip, Prepared], None, None]:
        """Give the slices of a video."""
        assert item.info is not None
        assert item.video is not None
        stage = PrepareClips(pool, self._clips.preparer, self._devices.tensors, self._devices.slice_budget)
        yield from stage(item.entry, item.info, item.video)


def _only_slice(slices: Sequence[Features]) -> Features:
    (only,) = slices
    return only
