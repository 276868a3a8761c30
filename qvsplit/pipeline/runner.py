"""The local runner: concurrency, back-pressure, deadlines, and nothing else.

Threads read and decode, a bounded number ahead, each with a decoder process of its own; the encoding queue has every
device encode one batch after the other. A video comes through slice by slice, so that no more than a few of its frames
are in memory. Results come out as they are known, those of encoded items in the order of the entries. The runner knows
nothing of rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from qvsplit.errors import ItemError
from qvsplit.models.encoder import Clips
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import Clip
from qvsplit.pipeline.channel import Channel
from qvsplit.pipeline.encoding import Devices, EncodingQueue
from qvsplit.pipeline.items import KNOWN, Piece, Result
from qvsplit.pipeline.reading import ItemReader
from qvsplit.pipeline.stages import JoinSlices, PrepareClips
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime import interrupts
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.cpus import default_workers
from qvsplit.sources.decoder import ITEM_SECONDS, Closed, DecoderPool, Fetch
from qvsplit.sources.images import MAX_IMAGE_PIXELS
from qvsplit.sources.source import Entry, local_file
from qvsplit.store.row import Content

DECODED_FRAMES = 2  # of a video that are in memory as pixels

_Made: TypeAlias = "Result | Piece | ItemError"  # what a worker makes: the item itself, then the slices of a video


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

    def decoders(self) -> DecoderPool:
        """Give decoder processes that keep to these bounds; none is started yet."""
        return DecoderPool(self.item_timeout, self.fetch, self.gifs_are_videos, self.max_image_pixels)


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
        self._pool = options.decoders()
        self._reader = ItemReader(self._pool, self._is_known, videos=options.videos)
        self._queue = EncodingQueue(self._loaded_devices, self.seconds)
        self._clips: Loaded | ItemError | None = None
        self._clips_loaded = threading.Event()
        self._channels: set[Channel[_Made]] = set()  # of items that are not through

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give each entry's result; close the generator, or exhaust it, before `close`."""
        with closing(self._loaded(entries)) as loaded:
            for item, made in loaded:
                yield from self._take(item, made)
                yield from self.finished()
        yield from self._queue.drain()

    def finished(self) -> Iterator[Result]:
        """Give the results of batches that are through; what failed in a worker is left for `run` to raise."""
        yield from self._queue.finished()

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
                self._reader.budget.serve(number)
                made = iter(channel)
                with Timer(self.seconds, "wait for images"):
                    item = next(made)
                assert isinstance(item, Result), "first comes the item itself"
                yield item, made
                channel.close()
                self._channels.discard(channel)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._reader.budget.close()
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
            item = self._reader.read(number, entry, None if self._devices is None else self._devices.prepare)
            channel.put(item)
            if item.video is not None and item.outcome is None:
                self._make_slices(number, item, channel)
        except Closed as closed:
            error = closed  # nobody takes any more, or somebody closed the decoders
        except BaseException as raised:  # the taker's thread is where it is raised
            error = raised
        finally:
            channel.end(error)

    def _is_known(self, item: Result) -> bool:
        assert item.content is not None
        return self._is_held(item.content)

    # ---------------------------------------------------------------------------------------------------- videos

    def _make_slices(self, number: int, item: Result, channel: Channel[_Made]) -> None:
        """Decode sampled frames of a video and prepare them; what is wrong with it comes as a value. In a thread."""
        self._clips_loaded.wait()
        if not isinstance(self._clips, Loaded):
            return  # what has loaded them knows why
        assert item.video is not None
        assert item.info is not None
        self._reader.take_pixels(number, item, DECODED_FRAMES * item.video.width * item.video.height)
        slices = self._clips.prepare(self._pool, item)
        try:
            with closing(slices):
                while True:
                    with Timer(item.seconds, "decode and prepare videos"):
                        made = next(slices, None)
                    if made is None:
                        return
                    channel.put(Piece(item, made[1], made[0]))
        except ItemError as error:
            channel.put(error.with_traceback(None))
        finally:
            self._reader.release(item)

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
        self._queue.begin_video(item, clips.join, self._options.scratch)
        while item.outcome is None:
            with Timer(self.seconds, "wait for images"):
                one = next(made, None)
            if one is None:
                break
            interrupts.check()
            if isinstance(one, ItemError):
                item.outcome = one
            elif isinstance(one, Piece):
                yield from self._queue.add_slice(one)
        yield from self._queue.end_video(item)

    # -------------------------------------------------------------------------------------------------- encoding

    def _take(self, item: Result, made: Iterator[_Made]) -> Iterator[Result]:
        """Queue an item that has to be encoded; give any other."""
        if item.outcome is None and (self._is_known(item) or item.content in self._queue.contents):
            item.outcome = KNOWN  # decoded beside another item of the same bytes
        if item.outcome is None and item.video is not None:
            yield from self._take_video(item, made)
            return
        if item.outcome is None and item.prepared is None:  # decoded before the devices were there
            self._reader.prepare(item, self._loaded_devices().prepare)
        if item.video is None:  # the pixels of one are its worker's, who may still be at it
            self._reader.release(item)
        if item.outcome is not None:
            yield item
            return
        yield from self._queue.add_image(item)

    def _loaded_devices(self) -> Devices:
        if self._devices is None:
            self._devices = self._load.devices()
        return self._devices


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
