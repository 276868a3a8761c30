"""The driver of a run on a cluster, a process of its own: a Ray Data job reads and encodes, writers write shards.

It asks for no features. Of every block that leaves an encoder it asks the writer of that block's node what is in it
(`describe`), and tells the run. It keeps the references until a node has enough for a shard, has the node's writer
write it, and tells the run, which commits it.

A process of its own, as Ray ends the one that has joined a cluster, without a word and with exit code 1, when its node
is lost, prints what it likes, and takes over its signals.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ConfigError, DiskError, ItemError, ItemNotFound, ProcessError, QvsplitError, some_of
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster.connection import Cluster, as_ours, connected, value_of
from qvsplit.pipeline.cluster.contents import Contents
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import Numbered, numbered_table
from qvsplit.pipeline.cluster.shares import Shares, device_of, shares_of
from qvsplit.pipeline.cluster.workers import EncodeItems, ItemOrError, ReadItems, Writer, declare
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.items import Result, Staged
from qvsplit.pipeline.options import ExtractOptions, encoders_of
from qvsplit.pipeline.summary import Timer
from qvsplit.runtime.clock import active_seconds
from qvsplit.sources.source import Entry, Key
from qvsplit.store.row import Row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.store_writer import is_full

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
PASSES = 3  # over items of which nothing came
FILES_ELSEWHERE = 10  # that a node does not find, and this one does: more are no accident


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
        return is_full(self.bytes, sum(map(len, self.rows)), self.began, most_bytes)


class Driver:
    """Runs entries through readers, encoders and writers.

    Args:
        job: The run.
        schema: What shards declare.
        cluster: Where it runs; this process has joined it.
        shares: What each worker takes.
        encoders: The least and the most encoders at a time.
        send: Tells the run.
    """

    def __init__(
        self,
        job: Job,
        schema: ShardSchema,
        cluster: Cluster,
        shares: Shares,
        encoders: tuple[int, int],
        send: Callable[[messages.FromDriver], None],
    ) -> None:
        self._job = job
        self._schema = schema
        self._cluster = cluster
        self._shares = shares
        self._encoders = encoders
        self._send = send
        self._shard_bytes = int(cluster.object_store_bytes * SHARD_SHARE)
        self._seconds: dict[str, float] = {}
        self._stopped = ""
        self._blocks: queue.Queue[Any] = queue.Queue(BLOCKS_AHEAD)
        self._is_finishing = False  # no block is taken any more
        self._contents: Any = None
        self._writers: dict[str, Any] = {}  # by node
        self._describing: dict[Any, tuple[str, Any]] = {}  # task → node and block
        self._shards: dict[str, _Shard] = {}  # that are being filled, by node
        self._writing: dict[Any, _Shard] = {}  # task → what it writes
        self._error: BaseException | None = None  # that ends the run
        self._disk_failed = False
        self._begun = 0  # items, in all calls of `run`
        self._pending: dict[Key, Numbered] = {}  # items that have not come to an end
        self._elsewhere: list[Result] = []  # that a node did not find, and this one does
        self._videos = None if job.own.config is None else job.own.config.videos  # how videos were looked at

    def run(self, entries: Sequence[Entry], is_to_finish: Callable[[], bool]) -> None:
        """Run entries; no further one is begun once `is_to_finish`.

        Raises:
            QvsplitError: The run cannot go on. What was told of is in shards, unless the disk is at fault.
        """
        self._pending = {entry.key: Numbered(self._begun + number, entry) for number, entry in enumerate(entries)}
        self._begun += len(entries)
        for _ in range(PASSES):
            self._run_once(list(self._pending.values()), is_to_finish)
            if not self._pending or is_to_finish():
                break
        else:
            self._check_elsewhere(0)
            names = some_of(path for _, path in self._pending)
            raise ProcessError(
                f"the Ray cluster gave nothing for {len(self._pending):,} items ({names}); what was finished is kept: "
                "run again"
            )
        self._send(messages.Done(self._stopped, self._seconds))
        self._seconds = {}

    def _run_once(self, items: Sequence[Numbered], is_to_finish: Callable[[], bool]) -> None:
        self._is_finishing = False
        threading.Thread(target=self._feed, args=(self._dataset(items),), name="qvsplit-ray", daemon=True).start()
        running = True
        while (running or self._describing) and self._error is None and not is_to_finish():
            running = running and self._take_blocks()
            self._take_turn(all_of_them=False)
        self._is_finishing = is_to_finish() or self._error is not None
        self._finish(active_seconds() + LAST_SECONDS if self._is_finishing else math.inf)

    def _take_turn(self, *, all_of_them: bool) -> None:
        """Take up what is done, and have shards written that are full, or all. What goes wrong ends the run later."""
        try:
            self._take_descriptions()
            self._write_shards(all_of_them=all_of_them and not self._describing)
            self._take_written()
        except Exception as error:
            self._error = self._error or error
            time.sleep(WAIT_SECONDS)  # it may come again at once

    def _finish(self, deadline: float) -> None:
        """Have written what has left the encoders. Raises what has ended the run."""
        self._take_blocks()
        while (self._describing or self._shards or self._writing) and not self._disk_failed:
            self._take_turn(all_of_them=True)
            if self._is_finishing:
                self._take_blocks()
            if self._error is not None:
                deadline = min(deadline, active_seconds() + LAST_SECONDS)
            if active_seconds() > deadline:
                late = "what had left the encoders could not be written in time; it is for the next run"
                self._error = self._error or ProcessError(late)
                break
        if self._error is not None:
            raise self._error

    # --------------------------------------------------------------------------------------------------- the job

    def _dataset(self, items: Sequence[Numbered]) -> ray.data.Dataset:
        """Describe the job: entries, in blocks, through readers and encoders."""
        import ray

        shares = self._shares
        readers = self._job.bounds.workers or max(1, int(self._cluster.cpus / shares.reader_cpus))
        if self._contents is None:
            self._contents = _contents(str(self._job.staging.store))
        size = max(1, min(BLOCK_ITEMS, len(items) // (TASKS_A_READER * readers)))
        blocks = [numbered_table(items[start : start + size]) for start in range(0, len(items), size)]
        dataset = ray.data.from_arrow(blocks)
        context = dataset.context
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # a long video has none for as long as it takes
        context.execution_options.preserve_order = False
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=self._cluster.object_store_bytes * self._cluster.nodes * STORE_SHARE
        )
        return dataset.map_batches(
            ReadItems, fn_constructor_args=(self._job, _Asked(self._contents.claim)), batch_size=None,
            batch_format="pyarrow", num_cpus=shares.reader_cpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=readers), max_task_retries=ATTEMPTS,
        ).map_batches(
            EncodeItems, fn_constructor_args=(self._job,), batch_size=None, batch_format="pyarrow",
            num_cpus=shares.encoder_cpus, num_gpus=shares.encoder_gpus,
            compute=ray.data.ActorPoolStrategy(min_size=self._encoders[0], max_size=self._encoders[1]),
            max_task_retries=ATTEMPTS,
        )  # fmt: skip

    def _feed(self, dataset: ray.data.Dataset) -> None:
        """Queue the blocks that leave the encoders, then None, or what has ended the job. In a thread."""
        ended: BaseException | None = None
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                for block in bundle.blocks:
                    self._put(block.ref)
                if self._is_finishing:
                    return
        except BaseException as error:
            ended = error
        self._put(ended)

    def _put(self, value: Any) -> None:
        while not self._is_finishing:
            try:
                self._blocks.put(value, timeout=WAIT_SECONDS)
                return
            except queue.Full:
                pass

    # ------------------------------------------------------------------------------------------ blocks to results

    def _take_blocks(self) -> bool:
        """Have the blocks described that have left the encoders; say whether there may be others."""
        is_idle = not (self._describing or self._writing)
        full = any(shard.is_full(self._shard_bytes) for shard in self._shards.values())
        if full and len(self._writing) >= SHARDS_IN_FLIGHT:
            return True  # the disk is slower than the encoders, which wait once the object store has enough
        while len(self._describing) < BLOCKS_AHEAD:
            try:
                with Timer(self._seconds, "wait for the encoder"):
                    block = self._blocks.get(timeout=WAIT_SECONDS if is_idle else 0.001)
            except queue.Empty:
                return True
            if block is None:
                return False
            if isinstance(block, BaseException):
                self._error = self._error or as_ours(block)
                return False
            node = _node_of(block)
            self._describing[self._writer(node).describe.remote(block)] = node, block
            is_idle = False
        return True

    def _take_descriptions(self) -> None:
        """Take up what is in the blocks that have been described: results, and what is to be written."""
        for task in _ready(self._describing):
            node, block = self._describing.pop(task)
            items = value_of(task)
            self._check(items)
            self._tell(items)
            shared = [item.outcome for item in items if _shares_a_shard(item)]
            if shared:
                shard = self._shards.setdefault(node, _Shard())
                shard.blocks.append(block)
                shard.rows += [staged.rows for staged in shared]
                shard.bytes += sum(staged.bytes for staged in shared)
                shard.videos = next((one.videos for one in shared if one.videos is not None), shard.videos)

    def _tell(self, items: Sequence[ItemOrError]) -> None:
        """Tell the run of the items of a block, and of the shards that large ones have to themselves."""
        for item in items:
            if isinstance(item, QvsplitError):
                self._error = self._error or item
        results = [item for item in items if isinstance(item, Result) and self._is_told(item)]
        self._send(messages.Described(results))
        for item in results:
            if isinstance(staged := item.outcome, Staged) and staged.shard is not None:
                self._send(messages.Shard(staged.shard, self._job.staging.size(staged.shard), [staged.rows]))

    def _is_told(self, item: Result) -> bool:
        """Say whether the run is to hear of an item; one that is not has still to be run, or is not begun any more."""
        if item.outcome is None:  # the time was over before that
            self._stopped = "max-runtime"
            self._pending.pop(item.entry.key)
            return False
        if isinstance(item.outcome, ItemNotFound) and os.path.lexists(item.entry.file):
            self._elsewhere.append(item)
            return False
        if isinstance(item.outcome, ItemError) and item.info is not None:
            self._contents.release.remote(item.info.sha256)  # another item with it may fare better
        self._pending.pop(item.entry.key)
        return True

    def _check(self, items: Sequence[ItemOrError]) -> None:
        """Refuse a block before it is told of, or written.

        Raises:
            ProcessError: It has an item that has come before: what a worker that died has given was cut otherwise.
            ConfigError: Its videos were looked at otherwise than others.
            DiskError: Files that nodes do not find are here: a disk is not there, and all that it has would be gone.
        """
        keys = [item.entry.key for item in items if isinstance(item, Result)]
        if len(set(keys)) < len(keys) or not self._pending.keys() >= set(keys):
            raise ProcessError(
                "a worker died, and what was done again came twice; what was finished is kept: run again"
            )
        for item in items:
            videos = item.outcome.videos if isinstance(item, Result) and isinstance(item.outcome, Staged) else None
            self._videos = self._videos or videos
            if videos not in (None, self._videos):
                raise ConfigError(
                    "videos were looked at otherwise on one node than on another; install the same libraries on all"
                )
        self._check_elsewhere(FILES_ELSEWHERE)

    def _check_elsewhere(self, most: int) -> None:
        """DiskError where nodes did not find more than so many files that are here."""
        if len(self._elsewhere) > most:
            file, why = self._elsewhere[-1].entry.file, self._elsewhere[-1].outcome
            raise DiskError(
                f"{file} is there, but not on every node of the cluster ({why}); every node needs the store, and what "
                "is extracted, under the same paths"
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
            task = self._writer(node).write_shard.remote(self._job.staging, schema, shard.rows, *shard.blocks)
            self._writing[task] = self._shards.pop(node)

    def _take_written(self) -> None:
        for task in _ready(self._writing):
            shard = self._writing.pop(task)
            written = value_of(task)
            if isinstance(written, QvsplitError):
                self._error, self._disk_failed = self._error or written, True
            else:
                name, size = written
                self._send(messages.Shard(name, size, shard.rows))

    def _writer(self, node: str) -> Any:
        """Give the writer on this node; where that is lost it goes on elsewhere."""
        if node not in self._writers:
            self._writers[node] = _actor(Writer, node, is_bound=False, max_restarts=ATTEMPTS, max_task_retries=ATTEMPTS)
        return self._writers[node]


def _shares_a_shard(item: ItemOrError) -> bool:
    """Say whether the item's rows and features are in its block, to be written with those of others."""
    return isinstance(item, Result) and isinstance(item.outcome, Staged) and item.outcome.shard is None


class _Asked:
    """A method of an actor, called and waited for. Picklable."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, *args: Any) -> Any:
        import ray

        try:
            return ray.get(self._method.remote(*args))
        except ray.exceptions.RayError:
            raise ProcessError(
                "the process that knows which contents are encoded has died; what was finished is kept: run again"
            ) from None


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


# --------------------------------------------------------------------------------------------------- the process


def main(descriptor: int, folder: str) -> None:
    """Serve one run, on a connection that it has opened; a cluster that is started here writes into `folder`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run hears it, and says what is to be done
    connection = Connection(descriptor)
    inbox: queue.Queue[messages.ToDriver] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, inbox, folder), daemon=True).start()
    try:
        _serve(inbox, connection.send, folder)
    except QvsplitError as error:
        connection.send(messages.Failed(error.with_traceback(None)))
    except Exception as error:
        connection.send(messages.Failed(RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc()))


def _listen(connection: Connection, inbox: queue.Queue[messages.ToDriver], folder: str) -> None:
    """Take in what the run says; a run that is gone needs no driver. In a thread."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _serve(inbox: queue.Queue[messages.ToDriver], send: Callable[[messages.FromDriver], None], folder: str) -> None:
    begin = inbox.get()
    assert isinstance(begin, messages.Begin)
    assert begin.options.ray is not None
    with connected(begin.options.ray, folder) as cluster:
        driver = _declared_driver(begin, cluster, send)
        entries: list[Entry] = []
        while not isinstance(message := inbox.get(), messages.Finish):
            if isinstance(message, messages.Entries):
                entries += message.entries
            else:
                driver.run(entries, lambda: not inbox.empty())
                entries = []


def _declared_driver(begin: messages.Begin, cluster: Cluster, send: Callable[[messages.FromDriver], None]) -> Driver:
    """Load the first encoder, tell the run what it declares, and give the driver of all that follow."""
    device = device_of(begin.options.device, cluster)
    gpus = device == "cuda"
    encoders = encoders_of(begin.options) or (1, max(1, int(cluster.gpus) if gpus else cluster.nodes))
    options = replace(begin.options, ray=None, ray_encoders=None, device=device)
    shares = shares_of(cluster, encoders[1], gpus=gpus)
    declared = _declared(options, begin.own, shares)
    own = StoreDeclares(
        begin.own.where, begin.own.config or declared.schema.config, declared.schema.tensors, declared.provenance
    )
    send(declared)
    options = replace(options, model=None, adapter=None)  # of every node: the one that was declared, in its revision
    ends_at = None if begin.seconds_left is None else time.time() + begin.seconds_left
    job = Job(options, begin.bounds, own, begin.generation, begin.staging, shares.encoder_threads, ends_at)
    return Driver(job, declared.schema, cluster, shares, encoders, send)


def _declared(options: ExtractOptions, own: StoreDeclares, shares: Shares) -> messages.Declared:
    """Load an encoder there. Its process has the libraries then, and may become one of the workers."""
    import ray

    task = ray.remote(num_cpus=shares.encoder_cpus, num_gpus=shares.encoder_gpus)(declare)
    declared: messages.Declared | QvsplitError = value_of(task.remote(options, own))
    if isinstance(declared, QvsplitError):
        raise declared
    return declared
