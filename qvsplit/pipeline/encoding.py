"""Encode pieces of items in batches, on every device, and give the items whose last piece is through.

A batch is filled up to a number of patches. Every device has a thread that encodes one batch after the other. Items
come out in the order in which their last pieces were queued.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qvsplit.errors import ItemError
from qvsplit.models.copies import Copies, Sent, ToHost
from qvsplit.models.encoder import Encoded, Encoder
from qvsplit.models.preparing import Prepared
from qvsplit.pipeline.items import Piece, Result
from qvsplit.pipeline.parts import Parts
from qvsplit.pipeline.stages import Encode, JoinSlices, Prepare, Quantize, to_host
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime.memory import give_back_now
from qvsplit.store.features import Features, TensorSpec
from qvsplit.store.row import Content

if TYPE_CHECKING:
    import torch

# Of one batch, where images are prepared on the encoder's device. A larger image goes alone.
DECODED_BYTES = 1 << 27


@dataclass
class Batch:
    """Pieces that go through the encoder together."""

    pieces: list[Piece]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        """The sum of its pieces'."""
        return sum(piece.prepared.patches for piece in self.pieces)

    def is_within(self, budget: int) -> bool:
        """Say whether it has at most so many patches, and no more decoded pixels than may be in one batch."""
        decoded = sum(piece.prepared.decoded_bytes for piece in self.pieces)
        return self.patches <= budget and decoded <= DECODED_BYTES


_Computed: TypeAlias = "tuple[Sequence[Encoded | ItemError], torch.cuda.Event]"


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

    def submit(self, batch: Batch) -> Future[Batch]:
        """Queue a batch."""
        self.waiting += 1
        if self._copies is None:
            return self._pool.submit(self._run, batch)
        sent = self._copies.send([piece.prepared for piece in batch.pieces])
        encoding = self._pool.submit(self._compute, batch, sent, self._copies)
        return self._receiver.submit(self._receive, batch, encoding, self._copies)

    def _run(self, batch: Batch) -> Batch:
        encoded = self._encode(batch, [piece.prepared for piece in batch.pieces])
        self._take(batch, encoded, to_host)
        self._ended = time.perf_counter()
        return batch

    def _compute(self, batch: Batch, sent: Sent | None, copies: Copies) -> _Computed:
        prepared = [piece.prepared for piece in batch.pieces] if sent is None else copies.arrived(sent)
        encoded = self._encode(batch, prepared)
        self._ended = time.perf_counter()
        return encoded, copies.port.computed()

    def _receive(self, batch: Batch, encoding: Future[_Computed], copies: Copies) -> Batch:
        encoded, computed = encoding.result()
        with copies.receiving(computed) as received:
            self._take(batch, encoded, received)
        return batch

    def _encode(self, batch: Batch, prepared: Sequence[Prepared]) -> Sequence[Encoded | ItemError]:
        began = time.perf_counter()
        if self._ended:
            batch.seconds["encoder idle"] = began - self._ended
        with Timer(batch.seconds, "forward"):
            return self.encode(prepared)

    def _take(self, batch: Batch, encoded: Sequence[Encoded | ItemError], received: ToHost) -> None:
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


class EncodingQueue:
    """Fills batches, hands them to the devices, and gives the items that are through.

    Args:
        devices: Gives the loaded encoders.
        seconds: Where what was waited for is added up, by stage.

    Attributes:
        contents: Of items that were queued and not yet given.
    """

    def __init__(self, devices: Callable[[], Devices], seconds: dict[str, float]) -> None:
        self.contents: set[Content] = set()
        self._devices = devices
        self._seconds = seconds
        self._pending: list[Piece] = []  # the batch that is being filled
        self._in_flight: deque[tuple[DeviceWorker, Future[Batch]]] = deque()  # batches in the workers, in order
        self._ready: deque[Result] = deque()  # through the encoder, not yet given

    def add_image(self, item: Result) -> Iterator[Result]:
        """Queue an image that was prepared; give what is through."""
        assert item.prepared is not None
        self._begin(item, Parts(_only_slice, None))
        item.all_sent = True
        prepared, item.prepared = item.prepared, None
        yield from self._queue(Piece(item, prepared))

    def begin_video(self, item: Result, join: JoinSlices, scratch: Path | None) -> None:
        """Say that pieces of a video follow; features that are too many for memory go to the folder `scratch`."""
        self._begin(item, Parts(join, scratch))

    def add_slice(self, piece: Piece) -> Iterator[Result]:
        """Queue a slice of a video that was begun; give what is through."""
        yield from self._queue(piece)

    def end_video(self, item: Result) -> Iterator[Result]:
        """Say that a video has no more slices; give what is through."""
        item.all_sent = True
        if not item.encoding:
            self._end_item(item)
        yield from self._given()

    def drain(self) -> Iterator[Result]:
        """Give all items, waiting for those that are in the encoder."""
        yield from self._submit()
        while self._in_flight:
            yield from self._collect()

    def finished(self) -> Iterator[Result]:
        """Give the items of batches that are through; what failed in a worker is left for the others to raise."""
        yield from self._given()
        while self._in_flight and self._in_flight[0][1].done() and self._in_flight[0][1].exception() is None:
            yield from self._collect()

    def _begin(self, item: Result, parts: Parts) -> None:
        assert item.content is not None
        self.contents.add(item.content)
        item.parts = parts

    def _queue(self, piece: Piece) -> Iterator[Result]:
        """Put a piece into the batch that is being filled, which is submitted once it is full."""
        budget = self._devices().patch_budget
        alone = piece.clip is not None  # a slice, which is large enough, and has the bits that it has alone
        if self._pending and (alone or not Batch([*self._pending, piece]).is_within(budget)):
            yield from self._submit()
        self._pending.append(piece)
        piece.item.encoding += 1
        if alone or Batch(self._pending).patches >= budget:
            yield from self._submit()

    def _submit(self) -> Iterator[Result]:
        """Hand the batch to the worker with the least to do. One in the encoder and one behind it are enough."""
        if not self._pending:
            return
        workers = self._devices().workers
        batch, self._pending = Batch(self._pending), []
        while all(worker.waiting > 1 for worker in workers):
            yield from self._collect()
        worker = min(workers, key=lambda one: one.waiting)
        self._in_flight.append((worker, worker.submit(batch)))

    def _collect(self) -> Iterator[Result]:
        """Wait for the oldest batch in flight, and give its items."""
        worker, future = self._in_flight[0]
        with Timer(self._seconds, "wait for the encoder"):
            batch = future.result()
        self._in_flight.popleft()
        worker.waiting -= 1
        for stage, seconds in batch.seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        for piece in batch.pieces:
            self._receive(piece)
        yield from self._given()

    def _receive(self, piece: Piece) -> None:
        """Take up what came of a piece; with its last one an item is through."""
        item = piece.item
        item.encoding -= 1
        if isinstance(item.outcome, ItemError):
            pass  # what is left of an item that failed
        elif isinstance(piece.outcome, ItemError):
            item.outcome = piece.outcome
        else:
            assert piece.outcome is not None
            assert item.parts is not None
            try:
                item.parts.add(piece.outcome, piece.clip)
            except ItemError as error:
                item.outcome = error.with_traceback(None)
        if item.all_sent and not item.encoding:
            self._end_item(item)

    def _end_item(self, item: Result) -> None:
        if item.outcome is None:
            assert item.parts is not None
            try:
                item.outcome = item.parts.finish()
            except ItemError as error:
                item.outcome = error.with_traceback(None)
        item.parts = None
        if item.video is not None:
            give_back_now()
        self._ready.append(item)

    def _given(self) -> Iterator[Result]:
        while self._ready:
            item = self._ready.popleft()
            assert item.content is not None
            self.contents.discard(item.content)
            yield item


def _only_slice(slices: Sequence[Features]) -> Features:
    (only,) = slices
    return only
