"""The cluster's runner: a Ray Data job reads and encodes, writers write shards, and this process commits them.

The driver never holds features. Of every block that leaves an encoder it asks the writer of that block's node what is
in it (`describe`): that is what the run counts and shows. It keeps the references until a node has enough for a shard,
has the node's writer write it, and commits it, by renaming. What is not committed is nobody's: whatever dies, a shard
is in the store whole and once.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qvsplit.errors import DiskError, ItemNotFound, QvsplitError
from qvsplit.pipeline.cluster.connection import Cluster, check_alive, raise_ours, value_of
from qvsplit.pipeline.cluster.contents import Contents
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import Numbered, numbered_table
from qvsplit.pipeline.cluster.stages import Described, EncodeItems, ReadItems, Writer
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
STORE_SHARE = 0.5  # of the nodes' object stores that Ray Data may fill
SHARD_SHARE = 0.0625  # of a node's object store that the features of one shard may have
WAIT_SECONDS = 0.1  # after which signals and the clock are looked at
LAST_SECONDS = 60.0  # for what had left the encoders when a run is interrupted
ATTEMPTS = 20  # at what a worker does that dies


@dataclass
class _Shard:
    """Blocks of one node whose items with features go into one shard."""

    blocks: list[Any] = field(default_factory=list)  # references
    rows: list[tuple[Row, ...]] = field(default_factory=list)
    videos: Any = None
    bytes: int = 0
    began: float = field(default_factory=active_seconds)

    def is_full(self, most_bytes: int) -> bool:
        """Say whether it is to be written, though more may come."""
        full = self.bytes >= most_bytes or sum(map(len, self.rows)) >= SHARD_ROWS
        return full or active_seconds() - self.began > SHARD_SECONDS


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
        self._ended = False  # nobody takes blocks any more
        self._writers: dict[str, Any] = {}  # by node
        self._describing: dict[Any, tuple[str, Any]] = {}  # task → node and block
        self._results: deque[Result] = deque()  # of blocks that were described
        self._shards: dict[str, _Shard] = {}  # that are being filled, by node
        self._writing: dict[Any, _Shard] = {}  # task → what it writes
        self._error: QvsplitError | None = None  # that ends the run

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give the result of each entry that is begun, as it is known."""
        bounds = self._job.bounds
        begun = entries if bounds.limit is None else entries[: bounds.limit]
        self.stopped = "limit" if len(begun) < len(entries) else ""
        threading.Thread(target=self._feed, args=(self._dataset(begun),), name="qvsplit-ray", daemon=True).start()
        running = True
        while running or self._describing or self._shards or self._writing:
            check_alive()
            if running:
                running = self._take_blocks()
            self._take_descriptions()
            while self._results:
                yield self._results.popleft()
            self._write_shards(all_of_them=not running and not self._describing)
            self._commit_written()
            if self._error is not None:
                raise self._error

    def finished(self) -> Iterator[Result]:
        """Give the results of what has left the encoders, and commit it; nothing else is begun."""
        self._ended = True
        deadline = active_seconds() + LAST_SECONDS
        while active_seconds() < deadline:
            self._take_blocks()
            if not self._describing:
                break
            self._take_descriptions()
        while self._results:
            yield self._results.popleft()
        self._write_rest(deadline)

    def close(self) -> None:
        """End everything. What was counted is committed, unless the disk is at fault; the rest is given up."""
        self._ended = True
        try:
            if not isinstance(self._error, DiskError):
                self._write_rest(active_seconds() + LAST_SECONDS)
        finally:
            self._job.staging.remove()

    # --------------------------------------------------------------------------------------------------- the job

    def _dataset(self, entries: Sequence[Entry]) -> ray.data.Dataset:
        """Describe the job: entries, in blocks, through readers and encoders."""
        import ray

        shares = shares_of(self._cluster, self._encoders[1], gpus=self._job.options.device == "cuda")
        readers = self._job.bounds.workers or max(1, int(self._cluster.cpus / shares.reader_cpus))
        contents = _contents(str(self._job.staging.store))
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
        return dataset.map_batches(
            ReadItems, fn_constructor_args=(self._job, _Asked(contents.claim)), batch_size=None, batch_format="pyarrow",
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
                    self._put(block.ref)
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

    def _take_blocks(self) -> bool:
        """Have the blocks described that have left the encoders; say whether there may be others."""
        is_idle = not (self._describing or self._writing)
        while len(self._describing) < BLOCKS_AHEAD:
            try:
                with Timer(self.seconds, "wait for the encoder"):
                    block = self._blocks.get(timeout=WAIT_SECONDS if is_idle else 0.001)
            except queue.Empty:
                return True
            if block is None:
                return False
            if isinstance(block, BaseException):
                raise_ours(block)
            node = _node_of(block)
            self._describing[self._writer(node).describe.remote(block)] = node, block
            is_idle = False
        return True

    def _take_descriptions(self) -> None:
        """Take up what is in the blocks that have been described: results, and what is to be written."""
        for task in _ready(self._describing):
            node, block = self._describing.pop(task)
            for item in (items := value_of(task)):
                self._take_item(item)
            shared = [item.outcome for item in items if _shares_a_shard(item)]
            if shared:
                shard = self._shards.setdefault(node, _Shard())
                shard.blocks.append(block)
                shard.rows += [staged.rows for staged in shared]
                shard.bytes += sum(staged.bytes for staged in shared)
                shard.videos = next((one.videos for one in shared if one.videos is not None), shard.videos)

    def _take_item(self, item: Described) -> None:
        if isinstance(item, QvsplitError):
            self._error = self._error or item
            return
        staged = item.outcome
        if isinstance(staged, ItemNotFound):
            self._check_gone(item)
        if staged is None:  # the time was over before it was begun
            self.stopped = self.stopped or "max-runtime"
            return
        self._results.append(item)
        if isinstance(staged, Staged):
            if staged.videos is not None:
                self._commits.on_videos(staged.videos)
            if staged.shard is not None:
                self._commit(staged.shard, self._job.staging.size(staged.shard), [staged.rows])

    def _check_gone(self, item: Result) -> None:
        """DiskError where a file that a node did not find is here: else all of a disk's items would have gone."""
        if os.path.lexists(item.entry.file):
            self._error = self._error or DiskError(
                f"{item.entry.file} is there, but not on every node of the cluster ({item.outcome}); every node needs "
                "the store, and what is extracted, under the same paths"
            )

    # ------------------------------------------------------------------------------------------------- the shards

    def _write_shards(self, *, all_of_them: bool) -> None:
        """Have the nodes' writers write the shards that are full, or all of them."""
        for node, shard in list(self._shards.items()):
            if len(self._writing) >= SHARDS_IN_FLIGHT or not (all_of_them or shard.is_full(self._shard_bytes)):
                continue
            schema = self._schema
            if shard.videos is not None:
                schema = replace(schema, config=replace(schema.config, videos=shard.videos))
            self._commits.on_begin()
            task = self._writer(node).write_shard.remote(self._job.staging, schema, shard.rows, *shard.blocks)
            self._writing[task] = self._shards.pop(node)

    def _commit_written(self) -> None:
        for task in _ready(self._writing):
            shard = self._writing.pop(task)
            written = value_of(task)
            if isinstance(written, QvsplitError):
                self._error = self._error or written
            else:
                name, size = written
                self._commit(name, size, shard.rows)

    def _commit(self, name: str, size: int, rows: Sequence[Sequence[Row]]) -> None:
        with held_back():  # the shard, and what is known of it
            try:
                self._job.staging.commit(self._commits.storage, name, self._commits.numbers.take())
            except DiskError as error:
                self._error = error
                raise
            self.written.shards += 1
            self.written.bytes += size
            self.written.rows += sum(map(len, rows))
            self._commits.on_commit(rows)

    def _write_rest(self, deadline: float) -> None:
        while (self._shards or self._writing) and active_seconds() < deadline:
            check_alive()
            self._write_shards(all_of_them=True)
            self._commit_written()

    def _writer(self, node: str) -> Any:
        """Give the writer on this node; where that is lost it goes on elsewhere."""
        if node not in self._writers:
            self._writers[node] = _actor(Writer, node, is_bound=False, max_restarts=ATTEMPTS, max_task_retries=ATTEMPTS)
        return self._writers[node]


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
    share = math.floor(share) if share >= 1 else max(math.floor(share * 10_000), 1) / 10_000  # as Ray counts them
    return Shares(reader, share, 0.0, max(1, int(cluster.most_cpus / math.ceil(encoders / cluster.nodes))))


def _shares_a_shard(item: Described) -> bool:
    """Say whether the item's rows and features are in its block, to be written with those of others."""
    return isinstance(item, Result) and isinstance(item.outcome, Staged) and item.outcome.shard is None


class _Asked:
    """A method of an actor, called and waited for. Picklable."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, *args: Any) -> Any:
        import ray

        return ray.get(self._method.remote(*args))


def _contents(store: str) -> Any:
    """Start the actor that knows which contents are encoded, on this machine, and wait for it."""
    import ray

    actor = _actor(Contents, ray.get_runtime_context().get_node_id(), store, is_bound=True, max_restarts=0)
    value_of(actor.__ray_ready__.remote())
    return actor


def _actor(kind: type, node: str, *args: object, is_bound: bool, **options: int) -> Any:
    """Start an actor on a node. It takes no share of a CPU: it must not wait for readers and encoders to end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=not is_bound)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=place, **options).remote(*args)


def _node_of(block: Any) -> str:
    """Give the node that has a block, by its id; this one where that is not known."""
    import ray
    from ray.experimental import get_object_locations

    nodes: list[str] = get_object_locations([block])[block].get("node_ids", [])
    return nodes[0] if nodes else str(ray.get_runtime_context().get_node_id())


def _ready(tasks: Iterable[Any]) -> list[Any]:
    """Give the tasks that are done, after a short wait for one of them."""
    import ray

    waiting = list(tasks)
    if not waiting:
        return []
    done, rest = ray.wait(waiting, num_returns=1, timeout=WAIT_SECONDS / 2, fetch_local=False)
    if done and rest:
        done += ray.wait(rest, num_returns=len(rest), timeout=0.0, fetch_local=False)[0]
    return list(done)
