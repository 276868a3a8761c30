"""The cluster's runner: a Ray Data job reads and encodes, tasks write shards, and this process commits them.

The driver never holds features. Of every block that leaves an encoder it asks what is in it (`describe`), which is what
the run counts and shows; it keeps the reference until there is enough for a shard, has that written (`write_shard`) and
commits it, by renaming. What is not committed is nobody's: whatever dies, a shard is in the store whole and once.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qvsplit.errors import DiskError, ItemNotFound, ProcessError, QvsplitError
from qvsplit.pipeline.cluster.connection import Cluster
from qvsplit.pipeline.cluster.contents import Contents
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import Numbered, numbered_table
from qvsplit.pipeline.cluster.stages import Described, EncodeItems, ReadItems, describe, write_shard
from qvsplit.pipeline.items import Result, Staged
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.interrupts import held_back
from qvsplit.sources.source import Entry
from qvsplit.store.row import Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shards import ShardNumbers
from qvsplit.store.storage import Storage
from qvsplit.store.store_writer import SHARD_BYTES, SHARD_ROWS, SHARD_SECONDS, Written

if TYPE_CHECKING:
    import ray

BLOCK_ITEMS = 32  # at most, that are read by one task: what is done again when a reader dies
TASKS_A_READER = 8  # at least, so that readers end together
BLOCKS_AHEAD = 8  # that have left the encoders, and nobody has described
SHARDS_IN_FLIGHT = 4  # that are being written
STORE_SHARE = 0.5  # of a node's object store that Ray Data may fill
SHARD_SHARE = 0.0625  # of it that one shard's features may have
WAIT_SECONDS = 0.1  # after which signals and the clock are looked at
LAST_SECONDS = 60.0  # for what had left the encoders when a run is interrupted
ATTEMPTS = 10  # at a task whose worker or node dies


@dataclass
class _Shard:
    """Blocks whose items with features go into one shard."""

    blocks: list[Any] = field(default_factory=list)  # references
    rows: list[tuple[Row, ...]] = field(default_factory=list)
    videos: Any = None
    bytes: int = 0
    began: float = field(default_factory=active_seconds)


@dataclass(frozen=True)
class Commits:
    """How what is written becomes a part of the store.

    Attributes:
        storage: The store, locked by this process.
        numbers: Gives each shard its number.
        on_begin: Called before a shard is written.
        on_commit: Hears the rows of each item of a shard that has become one of the store's.
        on_videos: Hears how videos were looked at, before the rows of one are counted.
    """

    storage: Storage
    numbers: ShardNumbers
    on_begin: Callable[[], None]
    on_commit: Callable[[Iterable[Sequence[Row]]], None]
    on_videos: Callable[[Any], None]


class ClusterRunner:
    """Runs entries through the stages on a cluster.

    Args:
        job: The run.
        schema: What shards declare.
        cluster: Where it runs; this process has joined it.
        commits: How shards are committed.
        encoders: The least and the most encoders at a time.

    Attributes:
        seconds: What was waited for, by stage.
        stopped: "limit" or "max-runtime" where that left entries.
        decoder_memory_bytes: Not known of other machines: 0.
        written: Shards that were committed.
    """

    def __init__(
        self, job: Job, schema: ShardSchema, cluster: Cluster, commits: Commits, encoders: tuple[int, int]
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.stopped = ""
        self.decoder_memory_bytes = 0
        self.written = Written()
        self._job = job
        self._schema = schema
        self._cluster = cluster
        self._commits = commits
        self._encoders = encoders
        self._shard_bytes = min(SHARD_BYTES, int(cluster.object_store_bytes * SHARD_SHARE))
        self._blocks: queue.Queue[Any] = queue.Queue(BLOCKS_AHEAD)
        self._disk_failed = False
        self._ended = False  # nobody takes blocks any more
        self._contents: Any = None
        self._describing: dict[Any, list[tuple[Any, int]]] = {}  # task → blocks and their sizes
        self._shard = _Shard()  # that is being filled
        self._writing: dict[Any, _Shard] = {}  # task → what it writes

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give the result of each entry that is begun, as it is known."""
        bounds = self._job.bounds
        begun = entries if bounds.limit is None else entries[: bounds.limit]
        self.stopped = "limit" if len(begun) < len(entries) else ""
        self._job.staging.create()
        threading.Thread(target=self._feed, args=(self._dataset(begun),), name="qvsplit-ray", daemon=True).start()
        running = True
        while running or self._describing or self._shard.blocks or self._writing:
            if bounds.deadline is not None and active_seconds() > bounds.deadline and self._contents is not None:
                self._contents.stop.remote()
            if running and len(self._describing) < BLOCKS_AHEAD:
                running = self._take_block(wait=not self._describing)
            yield from self._described()
            self._write_if_full(last=not running and not self._describing)
            self._commit_written()

    def finished(self) -> Iterator[Result]:
        """Give the results of what has left the encoders, and commit it; nothing else is begun."""
        self._stop()
        deadline = active_seconds() + LAST_SECONDS
        while not self._blocks.empty() and isinstance(self._blocks.queue[0], tuple):
            self._take_block(wait=False)
        while self._describing and active_seconds() < deadline:
            yield from self._described()
        self._write_rest(deadline)

    def close(self) -> None:
        """End everything. What was counted is committed, unless the disk is at fault; the rest is given up."""
        self._stop()
        try:
            if not self._disk_failed:
                self._write_rest(active_seconds() + LAST_SECONDS)
        finally:
            self._job.staging.remove()

    def _write_rest(self, deadline: float) -> None:
        while (self._shard.blocks or self._writing) and active_seconds() < deadline:
            self._write_if_full(last=True)
            self._commit_written()

    def _stop(self) -> None:
        self._ended = True
        if self._contents is not None:
            self._contents.stop.remote()

    # --------------------------------------------------------------------------------------------------- the job

    def _dataset(self, entries: Sequence[Entry]) -> ray.data.Dataset:
        """Describe the job: entries, in blocks, through readers and encoders."""
        import ray

        shares = shares_of(self._cluster, self._encoders[1], gpus=self._job.options.device == "cuda")
        readers = self._job.bounds.workers or max(1, int(self._cluster.cpus / shares.reader_cpus))
        self._contents = _contents(str(self._job.staging.store))
        size = max(1, min(BLOCK_ITEMS, len(entries) // (TASKS_A_READER * readers)))
        numbered = [Numbered(number, entry) for number, entry in enumerate(entries)]
        blocks = [numbered_table(numbered[start : start + size]) for start in range(0, len(numbered), size)]
        dataset = ray.data.from_arrow(blocks)
        context = dataset.context
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=self._cluster.object_store_bytes * self._cluster.nodes * STORE_SHARE
        )
        asking = self._contents.may_begin, self._contents.claim
        return dataset.map_batches(
            ReadItems, fn_constructor_args=(self._job, *map(_Asked, asking)), batch_size=None, batch_format="pyarrow",
            num_cpus=shares.reader_cpus, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=readers),
        ).map_batches(
            EncodeItems, fn_constructor_args=(self._job,), batch_size=None, batch_format="pyarrow",
            num_cpus=shares.encoder_cpus, num_gpus=shares.encoder_gpus,
            compute=ray.data.ActorPoolStrategy(min_size=self._encoders[0], max_size=self._encoders[1]),
        )  # fmt: skip

    def _feed(self, dataset: ray.data.Dataset) -> None:
        """Queue the blocks that leave the encoders, then None, or what has ended the job. In a thread."""
        ended: BaseException | None = None
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                for block in bundle.blocks:
                    self._put((block.ref, block.metadata.size_bytes or 0))
                if self._ended:
                    return
        except BaseException as error:
            ended = error
        self._put(ended)

    def _put(self, value: Any) -> None:
        while not self._ended:
            try:
                self._blocks.put(value, timeout=WAIT_SECONDS)
                return
            except queue.Full:
                pass

    # ------------------------------------------------------------------------------------------ blocks to results

    def _take_block(self, *, wait: bool) -> bool:
        """Have a block described that has left an encoder, if there is one; say whether there may be others."""
        try:
            with Timer(self.seconds, "wait for the encoder"):
                block = self._blocks.get(timeout=WAIT_SECONDS if wait and not self._writing else 0.001)
        except queue.Empty:
            return True
        if block is None:
            return False
        if isinstance(block, BaseException):
            raise _as_ours(block)
        task = _remote(describe).remote(block[0])
        self._describing[task] = [block]
        return True

    def _described(self) -> Iterator[Result]:
        """Give the results of blocks that have been described."""
        for task in _ready(self._describing):
            blocks = self._describing.pop(task)
            for (block, _), items in zip(blocks, value_of(task), strict=True):
                yield from self._take_items(block, items)

    def _take_items(self, block: Any, items: Sequence[Described]) -> Iterator[Result]:
        is_used = False
        for item in items:
            if isinstance(item, QvsplitError):
                raise item
            if isinstance(item.outcome, ItemNotFound):
                self._check_gone(item)
            if item.outcome is None:  # the time was over before it was begun
                self.stopped = self.stopped or "max-runtime"
                continue
            if isinstance(item.outcome, Staged):
                self._stage(item.outcome)
                is_used = is_used or item.outcome.shard is None
            yield item
        if is_used:
            self._shard.blocks.append(block)

    def _check_gone(self, item: Result) -> None:
        """DiskError where a file that a node did not find is here: else all of a disk's items would have gone."""
        if os.path.lexists(item.entry.file):
            raise DiskError(
                f"{item.entry.file} is there, but not on every node of the cluster ({item.outcome}); every node needs "
                "the store, and what is extracted, under the same paths"
            )

    # ------------------------------------------------------------------------------------------------- the shards

    def _stage(self, staged: Staged) -> None:
        if staged.videos is not None:
            self._commits.on_videos(staged.videos)
        if staged.shard is not None:
            self._commit(staged.shard, (self._job.staging.folder / staged.shard).stat().st_size, [staged.rows])
            return
        self._shard.rows.append(staged.rows)
        self._shard.bytes += staged.bytes
        self._shard.videos = staged.videos or self._shard.videos

    def _write_if_full(self, *, last: bool) -> None:
        """Have the shard in hand written, once it is full or the last one."""
        shard = self._shard
        if not shard.blocks or len(self._writing) >= SHARDS_IN_FLIGHT:
            return
        full = shard.bytes >= self._shard_bytes or sum(map(len, shard.rows)) >= SHARD_ROWS
        if not (full or last or active_seconds() - shard.began > SHARD_SECONDS):
            return
        schema = self._schema
        if shard.videos is not None:
            schema = replace(schema, config=replace(schema.config, videos=shard.videos))
        self._commits.on_begin()
        task = _remote(write_shard).remote(self._job.staging, schema, shard.rows, *shard.blocks)
        self._shard, self._writing[task] = _Shard(), shard

    def _commit_written(self) -> None:
        for task in _ready(self._writing):
            shard = self._writing.pop(task)
            written = value_of(task)
            if isinstance(written, QvsplitError):
                self._disk_failed = isinstance(written, DiskError)
                raise written
            name, size = written
            self._commit(name, size, shard.rows)

    def _commit(self, name: str, size: int, rows: Sequence[Sequence[Row]]) -> None:
        with held_back():  # the shard, and what is known of it
            self._job.staging.commit(self._commits.storage, name, self._commits.numbers.take())
            self.written.shards += 1
            self.written.bytes += size
            self.written.rows += sum(map(len, rows))
            self._commits.on_commit(rows)


@dataclass(frozen=True)
class Shares:
    """What of a node each worker takes, as Ray counts it."""

    reader_cpus: float
    encoder_cpus: float
    encoder_gpus: float
    encoder_threads: int


def shares_of(cluster: Cluster, encoders: int, *, gpus: bool) -> Shares:
    """Share the CPUs out: on a GPU an encoder needs none; without, all encoders have one half, and readers the other.

    An encoder's threads are as many as its node has CPUs for it: reading leaves most of its half idle.
    """
    reader = min(1.0, cluster.most_cpus / 2)
    if gpus:
        return Shares(reader, 0.0, 1.0, 1)
    share = min(cluster.cpus / encoders, cluster.most_cpus) / 2
    threads = max(1, int(cluster.most_cpus / math.ceil(encoders / cluster.nodes)))
    return Shares(reader, math.floor(share) if share >= 1 else math.floor(share * 100) / 100 or 0.01, 0.0, threads)


class _Asked:
    """A method of an actor, called and waited for. Picklable."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, *args: Any) -> Any:
        return value_of(self._method.remote(*args))


def _contents(store: str) -> Any:
    """Start the actor that knows which contents are encoded, on this machine, and wait for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Contents).options(num_cpus=0, max_restarts=0, scheduling_strategy=here).remote(store)
    value_of(actor.may_begin.remote())
    return actor


def _remote(function: Callable[..., Any]) -> Any:
    """Give a function as a task that takes no share of a CPU: it must not wait for readers and encoders to end."""
    import ray

    return ray.remote(function).options(num_cpus=0, max_retries=ATTEMPTS)


def _ready(tasks: Iterable[Any]) -> list[Any]:
    """Give the tasks that are done, after a short wait for one of them."""
    import ray

    waiting = list(tasks)
    if not waiting:
        return []
    done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0.0, fetch_local=False)
    if not done:
        done, _ = ray.wait(waiting, num_returns=1, timeout=WAIT_SECONDS / 2, fetch_local=False)
    return list(done)


def value_of(task: Any) -> Any:
    """Wait for a task, and give its value. Raises ProcessError where its process or node died too often."""
    import ray

    try:
        return ray.get(task)
    except Exception as error:
        raise _as_ours(error) from None


def _as_ours(error: BaseException) -> BaseException:
    """Give what a user can be told of an error of Ray's; an error of our own code, or of Ray Data's, as it is."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, QvsplitError) else error
    what = str(error).strip().splitlines()[0]
    return ProcessError(
        f"the Ray cluster has lost what the run depends on ({what}); what was finished is kept: run again"
    )
