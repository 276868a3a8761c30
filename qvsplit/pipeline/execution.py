"""Carry out a plan: the runner's results become rows of a store, and whatever ends the run, finished rows are kept."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError
from qvsplit.models.encoder import Clips
from qvsplit.pipeline.devices import Loaded, StoreDeclares, load_clips, load_devices
from qvsplit.pipeline.encoding import Devices
from qvsplit.pipeline.items import Result
from qvsplit.pipeline.options import ExtractOptions, with_videos_of
from qvsplit.pipeline.plan import Cures, Plan
from qvsplit.pipeline.record import RowRecorder
from qvsplit.pipeline.runner import Load, LocalRunner, RunnerOptions
from qvsplit.pipeline.summary import ExtractCallbacks, Summary, Timer
from qvsplit.runtime import interrupts
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.interrupts import held_back
from qvsplit.sources.decoder import Fetch
from qvsplit.sources.source import local_file
from qvsplit.store import layout
from qvsplit.store.lock import Lock
from qvsplit.store.schema import ShardSchema
from qvsplit.store.shards import ShardNumbers
from qvsplit.store.staging import Staging
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store
from qvsplit.store.store_writer import StoreWriter, Written

if TYPE_CHECKING:
    from qvsplit.pipeline.cluster.messages import Declared
    from qvsplit.pipeline.cluster.runner import ClusterRunner, Commits


@dataclass(frozen=True)
class Target:
    """Where rows are written.

    Attributes:
        storage: The store's, or that of a rebuild.
        store: What is in it.
        lock: On the store.
        generation: Of every row that is written.
        first: The lowest number that a new shard may have.
        cures: What this run can read, and under which limits.
        fetch: Gives an item as a local file; the source's.
    """

    storage: Storage
    store: Store
    lock: Lock
    generation: int
    first: int = 1
    cures: Cures = field(default_factory=Cures)
    fetch: Fetch = local_file


class Execution:
    """One plan that is carried out.

    Attributes:
        recorder: What has been written.
        schema: What new shards declare; None where the store has no shards and no encoder was needed.
    """

    def __init__(
        self, planned: Plan, target: Target, options: ExtractOptions, summary: Summary, callbacks: ExtractCallbacks
    ) -> None:
        self.schema = _schema_of(target.store)
        self.recorder = RowRecorder(
            target.store, planned, target.generation, self._opened_writer, summary, callbacks, target.cures
        )
        self._plan = planned
        self._target = target
        self._options = options
        self._summary = summary
        self._callbacks = callbacks
        self._loaded: Loaded | None = None
        self._writer: StoreWriter | None = None
        self._numbers = ShardNumbers(target.storage, target.first)
        self._committed = Written()  # by a cluster's runner

    def run(self) -> None:
        """Carry it out.

        Raises:
            KeyboardInterrupt: The rows so far are kept, also those of batches that had left the encoder.
            DiskError: Finished shards are kept; the rows of a shard that could not be written are for the next run.
            QvsplitError: The rows so far are kept.
        """
        options = self._options
        deadline = None if options.max_runtime is None else active_seconds() + options.max_runtime
        bounds = RunnerOptions(
            options.workers, options.limit, deadline, options.item_timeout, self._target.fetch, options.videos,
            with_videos_of(self._target.store.config, options).gif == "video",
            self._target.storage.local_path(layout.STAGING), options.max_image_pixels,
        )  # fmt: skip
        self._summary.remaining = self._summary.to_read
        if options.ray is not None and self._plan.to_read:
            self._carry_out(self._cluster_runner(bounds))
        else:
            self._carry_out(LocalRunner(bounds, Load(self._load, self._load_clips), self.recorder.holds))

    def _carry_out(self, runner: LocalRunner | ClusterRunner) -> None:
        try:
            self._take_all(runner.run(self._plan.to_read))
            if self._options.ray is not None and not runner.stopped and (again := self.recorder.to_try_again()):
                self._take_all(runner.run(again))
            self.recorder.finish()
            self._summary.stopped = runner.stopped
            if self._options.prune and not runner.stopped:
                self.recorder.delete_absent()
        except KeyboardInterrupt:
            with held_back():
                for result in runner.finished():
                    self.recorder.take(result)
            raise
        finally:
            with held_back():
                try:
                    runner.close()
                finally:
                    self._end_shard()
            self._note_costs(runner)

    def _take_all(self, results: Generator[Result, None, None]) -> None:
        with closing(results):
            for result in results:
                self.recorder.take(result)
                interrupts.check()

    def _cluster_runner(self, bounds: RunnerOptions) -> ClusterRunner:
        """Join the cluster, and have its first encoder held against the store's extraction config."""
        from qvsplit.pipeline.cluster.launch import launch

        storage, generation = self._target.storage, self._target.generation
        store = storage.local_path("")
        assert store is not None, "a store that is not a folder"
        staging = Staging(store.absolute(), f"run-{generation}")
        with Timer(self._summary.stages, "load"):
            runner = launch(self._options, bounds, self._own(), staging, generation, self._commits, self._callbacks)
        self._committed = runner.written
        return runner

    def _commits(self, declared: Declared) -> Commits:
        """Take up what the first encoder of a cluster declares; give how shards are committed."""
        from qvsplit.pipeline.cluster.runner import Commits

        summary = self._summary
        summary.model, summary.patch_budget = declared.model, declared.patch_budget
        summary.encoder_bytes, summary.weights_bytes_read = declared.encoder_bytes, declared.weights_bytes_read
        summary.add_seconds(declared.seconds)
        self._set_schema(declared.schema)
        self._target.lock.announce()
        return Commits(self._target.storage, self._numbers, self.recorder.commit, self._see_videos)

    def _see_videos(self, videos: Mapping[str, Any]) -> None:
        """Have shards declare how videos were looked at, from the first one on."""
        assert self.schema is not None
        if self.schema.config.videos is None:
            with held_back():
                self._end_shard()
            self._set_schema(replace(self.schema, config=replace(self.schema.config, videos=videos)))

    def _load(self) -> Devices:
        """Load the encoder, held against the store's extraction config before anything is encoded."""
        if self._loaded is None:
            with held_back():
                self._end_shard()  # then nothing is at stake while libraries and weights are loaded
            with Timer(self._summary.stages, "load"), interrupts.at_once():
                self._loaded = load_devices(
                    self._options, self._own(), self._summary, self._callbacks.on_note, self._callbacks.on_load
                )
            self._set_schema(self._loaded.schema)  # its next shards have rows of this encoder
        return self._loaded.devices

    def _load_clips(self) -> Clips | ItemError:
        """Load what videos need beside the encoder; from here on shards declare how they were looked at."""
        self._load()
        assert self._loaded is not None
        with Timer(self._summary.stages, "load"):
            clips = load_clips(self._loaded, self._own(), self._callbacks.on_load)
        if not isinstance(clips, ItemError):
            with held_back():
                self._end_shard()
            self._set_schema(replace(self._loaded.schema, config=clips.config))
        return clips

    def _set_schema(self, schema: ShardSchema) -> None:
        self.schema = schema
        if self._writer is not None:
            self._writer.schema = schema

    def _own(self) -> StoreDeclares:
        store = self._target.store
        return StoreDeclares(self._target.storage.location, store.config, store.tensors, store.provenance)

    def _opened_writer(self) -> StoreWriter:
        """Open the writer; a first row without features, too, must say under which extraction config it was made."""
        if self._writer is None:
            if self.schema is None:
                self._load()
            assert self.schema is not None
            target = self._target
            self._writer = StoreWriter(
                target.storage, self.schema, is_held=target.store.holds, numbers=self._numbers,
                on_begin=target.lock.announce,
            )  # fmt: skip
        return self._writer

    def _end_shard(self) -> None:
        if self._writer is not None:
            with Timer(self._summary.stages, "store"):
                self._writer.end_shard()
        written = [self._committed] if self._writer is None else [self._committed, self._writer.written]
        self._summary.bytes, self._summary.shards = (
            sum(one.bytes for one in written),
            sum(one.shards for one in written),
        )

    def _note_costs(self, runner: LocalRunner | ClusterRunner) -> None:
        self._summary.add_seconds(runner.seconds)
        self._summary.decoder_memory_bytes = runner.decoder_memory_bytes
        if self._loaded is not None:
            from qvsplit.runtime.devices import peak_gpu_memory

            self._summary.peak_gpu_memory_bytes = peak_gpu_memory()


def _schema_of(store: Store) -> ShardSchema | None:
    """Give what the store's newest rows declare; None where there are none."""
    if store.config is None or store.tensors is None or store.provenance is None:
        return None
    return ShardSchema(store.config, store.tensors, (store.provenance,))
