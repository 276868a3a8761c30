"""What runs on the nodes of a cluster, as actors: readers, encoders, and the writers of shards.

The stages are those of the local runner. Each worker loads what it needs from paths: it can be started again anywhere.
What is wrong with an item, or with the run, comes back as a value.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from qvsplit.errors import ItemError, ModelError, ProcessError, QvsplitError
from qvsplit.models.encoder import Clips
from qvsplit.pipeline import devices
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.messages import Declared
from qvsplit.pipeline.cluster.packing import items_in, numbered_in, result_table, rows_in
from qvsplit.pipeline.encoding import EncodingQueue
from qvsplit.pipeline.items import Result, Staged
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.parts import Part
from qvsplit.pipeline.reading import ItemReader
from qvsplit.pipeline.rows import encoded_rows
from qvsplit.pipeline.runner import Load, LocalRunner
from qvsplit.pipeline.stages import Prepare
from qvsplit.pipeline.summary import Summary
from qvsplit.runtime.loading import nobody
from qvsplit.sources.files import CHANGED
from qvsplit.store.row import Row, is_whole
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shard_writer import EncodedRow, ShardWriter, encoded
from qvsplit.store.staging import Staging
from qvsplit.store.store_writer import ITEM_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
ItemOrError: TypeAlias = "Result | QvsplitError"  # an item without what is large, or why the run cannot go on
Claim = Callable[[str, int], bool]  # SHA-256 and number of an item → whether it is the one to be encoded


def declare(options: ExtractOptions, own: devices.StoreDeclares) -> Declared | QvsplitError:
    """Load an encoder as every one of the run will be, held against the store, and say what it declares."""
    notes: list[str] = []
    summary = Summary()
    try:
        loaded = devices.load_devices(options, own, summary, notes.append)
    except QvsplitError as error:
        return error.with_traceback(None)
    return Declared(
        loaded.schema, loaded.schema.provenance[0], summary.model, tuple(notes), summary.encoder_bytes,
        summary.weights_bytes_read, summary.patch_budget, summary.stages,
    )  # fmt: skip


class ReadItems:
    """Reads, hashes, decodes and prepares items, one after the other, in a decoder process of its own.

    Args:
        job: The run.
        claim: Whether an item is the one to be encoded for its content.
    """

    def __init__(self, job: Job, claim: Claim) -> None:
        self._job = job
        self._claim = claim
        self._number = 0  # of the item in hand, in the plan
        self._read = 0
        self._pool = job.bounds.decoders()
        self._reader = ItemReader(self._pool, self._is_known, videos=job.bounds.videos)
        self._prepare = _value_or_error(self._load)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Take a block of numbered entries; give each item, an image with what was prepared of it."""
        if isinstance(self._prepare, QvsplitError):
            yield result_table(self._prepare)
            return
        try:
            for item in numbered_in(block):
                result = Result(item.entry)
                if self._job.ends_at is None or time.time() < self._job.ends_at:
                    result = self._read_item(item.number, result, self._prepare)
                prepared, result.prepared = result.prepared, None
                yield result_table(result, prepared)
        except QvsplitError as error:
            yield result_table(error.with_traceback(None))

    def _read_item(self, number: int, result: Result, prepare: Prepare) -> Result:
        self._number, self._read = number, self._read + 1
        self._reader.budget.serve(self._read)
        result = self._reader.read(self._read, result.entry, prepare)
        if result.prepared is not None:
            self._reader.release(result)
        return result

    def _is_known(self, item: Result) -> bool:
        assert item.info is not None
        return not self._claim(item.info.sha256, self._number)

    def _load(self) -> Prepare:
        self._job.check_node()
        return devices.load_prepare(self._job.options, self._job.own)


class EncodeItems:
    """Encodes images that were prepared, and videos, which it also decodes.

    Args:
        job: The run.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded = _value_or_error(self._load)
        self._clips: Clips | ItemError | None = None
        self._seconds: dict[str, float] = {}  # that stages took, and no item has told yet

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Take a block of items; give each, and those that were encoded with rows and features."""
        if isinstance(self._loaded, QvsplitError):
            yield result_table(self._loaded)
            return
        try:
            yield from self._encoded(block, self._loaded)
        except QvsplitError as error:
            yield result_table(error.with_traceback(None))

    def _encoded(self, block: pa.Table, loaded: devices.Loaded) -> Iterator[pa.Table]:
        queue = EncodingQueue(lambda: loaded.devices, self._seconds)
        stage = functools.partial(self._staged, loaded.schema)
        videos = []
        for item, prepared in rows_in(block):
            if isinstance(item, QvsplitError) or (prepared is None and item.video is None):
                yield result_table(item)
            elif prepared is None:
                videos.append(item)
            else:
                item.prepared = prepared
                yield from map(stage, queue.add_image(item))
        yield from map(stage, queue.drain())
        if videos:
            yield from map(stage, self._video_results(videos, loaded))

    def _video_results(self, scanned: Sequence[Result], loaded: devices.Loaded) -> Iterator[Result]:
        """Have the local runner read videos again, decode and encode them slice by slice."""
        bounds = replace(self._job.bounds, workers=1, limit=None, deadline=None)
        runner = LocalRunner(
            bounds, Load(lambda: loaded.devices, lambda: self._loaded_clips(loaded)), lambda content: False
        )
        before = {item.entry.key: item for item in scanned}
        # it is not closed, which would end the encoder: what it started itself ends with `run`
        for result in runner.run([item.entry for item in scanned]):
            first = before[result.entry.key]
            if result.content is None:  # it is not there any more
                result = replace(first, outcome=result.outcome)
            elif result.content != first.content:
                result = replace(first, outcome=ItemError(CHANGED))
            self._seconds |= runner.seconds
            runner.seconds.clear()
            yield result

    def _staged(self, schema: ShardSchema, result: Result) -> pa.Table:
        """Give an item with the rows that a shard will have of it."""
        outcome, result.image = result.outcome, None
        for stage, seconds in self._seconds.items():
            result.seconds[stage] = result.seconds.get(stage, 0.0) + seconds
        self._seconds.clear()
        if not isinstance(outcome, list):
            return result_table(result)
        if result.video is not None and isinstance(self._clips, Clips):
            schema = replace(schema, config=self._clips.config)
        result.outcome, rows = self._stage(schema, result, outcome)
        return result_table(result, rows)

    def _stage(self, schema: ShardSchema, result: Result, parts: list[Part]) -> tuple[Staged, list[EncodedRow] | None]:
        """Encode the rows of an item; one that is too large to share a shard is written at once."""
        rows: list[Row] = []
        waiting: list[EncodedRow] = []
        size, name, shard = 0, None, None
        try:
            for row, features in encoded_rows(result, parts, self._job.generation):
                one = encoded(row, features, schema)
                rows.append(row)
                waiting.append(one)
                size += one.bytes
                if size >= ITEM_BYTES and not (row.is_last and shard is None):
                    if shard is None:
                        name = Staging.new_name()
                        shard = ShardWriter(self._job.staging, name, schema)
                    _add(shard, waiting)
            if not is_whole(rows):
                raise ValueError("is not followed by all its parts")
            if shard is not None:
                shard.finish()
        except BaseException:
            if shard is not None:
                shard.abandon()
            raise
        return Staged(tuple(rows), schema.config.videos, name, size), None if shard is not None else waiting

    def _load(self) -> devices.Loaded:
        self._job.check_node()
        _use_threads(self._job.threads)
        return devices.load_devices(self._job.options, self._job.own, Summary(), lambda line: None)

    def _loaded_clips(self, loaded: devices.Loaded) -> Clips | ItemError:
        if self._clips is None:
            self._clips = devices.load_clips(loaded, self._job.own, nobody)
        return self._clips


class Writer:
    """Knows what is in the blocks of its node, and writes shards of them."""

    def describe(self, block: pa.Table) -> list[ItemOrError]:
        """Give the items of a block, without what is large."""
        return list(items_in(block))

    def write_shard(
        self, staging: Staging, schema: ShardSchema, expected: Sequence[Sequence[Row]], *blocks: pa.Table
    ) -> tuple[str, int] | QvsplitError:
        """Write the encoded items of some blocks into a staged shard; gives its name, and its size in bytes.

        Args:
            staging: Where.
            schema: What the shard declares.
            expected: The rows of each item that the blocks were said to have, in order.
            blocks: Of encoders. A block that was lost with its node has been made again.
        """
        try:
            name = Staging.new_name()
            shard = ShardWriter(staging, name, schema)
            try:
                found = []
                for item, rows in (one for block in blocks for one in rows_in(block)):
                    if rows is not None:
                        found.append(item.outcome.rows)
                        for row in rows:
                            shard.add_encoded(row)
                if found != list(expected):
                    raise ProcessError(
                        "a node was lost while files changed, and what was made again is not what had been counted; "
                        "what was written before is kept: run again"
                    )
                return name, shard.finish()
            except BaseException:
                shard.abandon()
                raise
        except QvsplitError as error:
            return error.with_traceback(None)


def _add(shard: ShardWriter, rows: list[EncodedRow]) -> None:
    """Add rows, and take them out of the list."""
    while rows:
        shard.add_encoded(rows.pop(0))


def _value_or_error(load: Callable[[], T]) -> T | QvsplitError:
    """Load, as an actor starts; what is wrong can be told only later, with its first block."""
    try:
        return load()
    except ModelError as error:
        return ModelError(f"on {socket.gethostname()}: {error}")
    except QvsplitError as error:
        return error.with_traceback(None)


def _use_threads(number: int) -> None:
    """Have torch compute with so many threads: Ray leaves it one a CPU share."""
    import torch

    torch.set_num_threads(number)
