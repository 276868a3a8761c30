"""The driver of a run on a cluster: what is counted is committed, whatever ends the run. Ray is a fake in this process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import closing, suppress
from types import SimpleNamespace

import pyarrow as pa
import pytest

from qvsplit.errors import DiskError, ItemError, ItemNotFound, ModelError, ProcessError, QvsplitError
from qvsplit.pipeline.cluster import runner as runner_module
from qvsplit.pipeline.cluster.connection import Cluster
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import result_table
from qvsplit.pipeline.cluster.runner import ClusterRunner, Commits
from qvsplit.pipeline.cluster.stages import Writer
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.items import KNOWN, Result, Staged
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.runtime.clock import active_seconds
from qvsplit.store import layout
from qvsplit.store.opening import read_store
from qvsplit.store.row import Row
from qvsplit.store.shard_writer import ShardWriter, encoded
from qvsplit.store.shards import ShardNumbers, shards_in
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.fake_source import entry

VIDEO_SCHEMA = rows.schema(config=rows.config(videos=rows.VIDEOS))


class Method:
    """A method of an actor, which is called when its value is asked for."""

    def __init__(self, call):
        self._call = call

    def remote(self, *words):
        return functools.partial(self._call, *words)


class Driver:
    """A runner of blocks that have left the encoders.

    Attributes:
        runner: It.
        given: What the job was given.
        results: Results that came.
        committed: Rows of items whose shard was committed.
        heard: What else was said, in order.
        in_flight: Shards that were being written when a writer was asked for something, at most.
    """

    def __init__(self, monkeypatch, folder, blocks: Sequence[pa.Table], *, nodes=(), ends=None, **bounds):
        self.storage = LocalStorage(folder / "store")
        self.staging = Staging(self.storage.folder, "run-7")
        self.staging.create()
        own = StoreDeclares("store", rows.config(), rows.specs(), rows.PROVENANCE)
        job = Job(ExtractOptions(device="cpu"), RunnerOptions(**bounds), own, 1, self.staging, 1)
        self.results, self.committed, self.heard, self.given = [], [], [], []
        commits = Commits(
            self.storage, ShardNumbers(self.storage), lambda: self.heard.append("begin"), self.committed.extend,
            self.heard.append,
        )  # fmt: skip
        self.in_flight, self.writers = 0, []
        self.runner = ClusterRunner(job, rows.schema(), Cluster(2, 4, 0, 2, 1 << 30), commits, (1, 1))
        node_of = {id(block): node for block, node in zip(blocks, nodes or ["head"] * len(blocks), strict=True)}

        def bundles():
            yield from (SimpleNamespace(blocks=[SimpleNamespace(ref=block)]) for block in blocks)
            if ends is not None:
                raise ends

        def dataset(entries):
            self.given.append(list(entries))
            return SimpleNamespace(iter_internal_ref_bundles=bundles)

        def writer(node):
            self.writers.append(node)
            self.in_flight = max(self.in_flight, len(self.runner._writing))
            return SimpleNamespace(describe=Method(Writer().describe), write_shard=Method(Writer().write_shard))

        monkeypatch.setattr(self.runner, "_dataset", dataset)
        monkeypatch.setattr(self.runner, "_writer", writer)
        monkeypatch.setattr(runner_module, "_node_of", lambda block: node_of.get(id(block), "head"))
        monkeypatch.setattr(runner_module, "_ready", list)
        monkeypatch.setattr(runner_module, "value_of", lambda task: task())
        monkeypatch.setattr(runner_module, "check_alive", lambda: None)

    def run(self, stop_after: int | None = None) -> Driver:
        """Run to the end, or up to so many results, where Ctrl-C ends it; as `Execution` does."""
        try:
            with closing(self.runner.run([entry(f"{number}") for number in range(10)])) as results:
                for number, result in enumerate(results):
                    if number == stop_after:
                        raise KeyboardInterrupt
                    self.results.append(result)
        except KeyboardInterrupt:
            self.results.extend(self.runner.finished())
        finally:
            self.runner.close()
        return self

    @property
    def encoded(self) -> list[str]:
        """Names of items that were counted as encoded."""
        return [one.entry.path for one in self.results if isinstance(one.outcome, Staged)]

    @property
    def stored(self) -> list[str]:
        """Names of items in the store, shard by shard."""
        with suppress(QvsplitError):
            return [row.path for shard in read_store(self.storage).shards for row in shard.rows if not row.part]
        return []

    def check(self) -> None:
        """What was counted is in the store, what is in it was heard of, and nothing is left."""
        assert sorted(self.stored) == sorted(self.encoded) == sorted(row[0].path for row in self.committed)
        assert not self.staging.folder.exists()
        written = self.runner.written
        assert written.shards == len(shards_in(self.storage))
        assert written.rows == sum(map(len, self.committed))
        assert written.bytes == sum(file.size for file in self.storage.list())


def image(name: str) -> pa.Table:
    """An image that was encoded."""
    pair = rows.item(name)
    one = encoded(*pair, rows.schema())
    return result_table(Result(entry(name), outcome=Staged((pair[0],), None, None, one.bytes)), [one])


def video(name: str, parts: int = 3) -> pa.Table:
    pairs = rows.parts(name, parts)
    every = [encoded(row, its, VIDEO_SCHEMA) for row, its in pairs]
    outcome = Staged(tuple(row for row, _ in pairs), rows.VIDEOS, None, sum(one.bytes for one in every))
    return result_table(Result(entry(name), outcome=outcome), every)


def other(name: str, outcome) -> pa.Table:
    return result_table(Result(entry(name), outcome=outcome))


def block(*tables: pa.Table) -> pa.Table:
    """A block as Ray Data makes it of what an encoder gives."""
    return pa.concat_tables(tables)


def blocks(number: int, of: int = 3) -> list[pa.Table]:
    return [block(*(image(f"{first}-{one}.png") for one in range(of))) for first in range(number)]


NAMES = [f"{first}-{one}.png" for first in range(4) for one in range(3)]


# --------------------------------------------------------------------------------------------------- to the very end


def test_all_that_leaves_the_encoders_is_given_and_committed(monkeypatch, tmp_path):
    more = block(other("bad", ItemError("is bad")), other("copy", KNOWN), other("gone", ItemNotFound("is gone")))
    driver = Driver(monkeypatch, tmp_path, [*blocks(4), more]).run()
    driver.check()
    assert [one.entry.path for one in driver.results] == [*NAMES, "bad", "copy", "gone"]
    assert driver.stored == NAMES  # in one shard, as there is little
    assert driver.runner.written.shards == 1
    assert (driver.runner.stopped, driver.heard, driver.given) == ("", ["begin"], [[entry(f"{n}") for n in range(10)]])


def test_without_features_nothing_is_written(monkeypatch, tmp_path):
    driver = Driver(monkeypatch, tmp_path, [other("bad", ItemError("is bad"))]).run()
    driver.check()
    assert (driver.stored, driver.heard, len(driver.results)) == ([], [], 1)


def test_a_shard_ends_when_it_is_full(monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "SHARD_ROWS", 6)
    monkeypatch.setattr(runner_module, "BLOCKS_AHEAD", 1)
    driver = Driver(monkeypatch, tmp_path, blocks(4)).run()
    driver.check()
    assert [len(shard.rows) for shard in read_store(driver.storage).shards] == [6, 6]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_what_is_on_a_node_is_written_there(monkeypatch, tmp_path, in_flight):
    monkeypatch.setattr(runner_module, "SHARDS_IN_FLIGHT", in_flight)
    driver = Driver(monkeypatch, tmp_path, blocks(4), nodes=["a", "b", "a", "c"]).run()
    driver.check()
    found = sorted(sorted(row.path for row in shard.rows) for shard in read_store(driver.storage).shards)
    assert found == [NAMES[:3] + NAMES[6:9], NAMES[3:6], NAMES[9:]]
    assert driver.in_flight == min(in_flight, 3) - 1  # when another one is begun
    assert driver.writers[:4] == ["a", "b", "a", "c"] and sorted(driver.writers[4:]) == ["a", "b", "c"]


def test_how_videos_were_looked_at_is_heard_and_declared(monkeypatch, tmp_path):
    driver = Driver(monkeypatch, tmp_path, [block(image("a.png"), video("b.mp4")), image("c.png")]).run()
    driver.check()
    assert driver.heard == [rows.VIDEOS, "begin"]
    (shard,) = read_store(driver.storage).shards
    assert shard.config.videos == rows.VIDEOS
    assert [(row.path, row.part) for row in shard.rows] == [
        ("a.png", 0), ("b.mp4", 0), ("b.mp4", 1), ("b.mp4", 2), ("c.png", 0)
    ]  # fmt: skip


def test_an_item_that_has_a_shard_of_its_own_is_committed_at_once(monkeypatch, tmp_path):
    leave = []
    driver = Driver(monkeypatch, tmp_path, leave)
    name, pairs = Staging.new_name(), rows.parts("long.mp4", 4)
    shard = ShardWriter(driver.staging, name, VIDEO_SCHEMA)
    for pair in pairs:
        shard.add(*pair)
    shard.finish()
    outcome = Staged(tuple(row for row, _ in pairs), rows.VIDEOS, name, 1 << 40)
    leave.append(block(image("a.png"), other("long.mp4", outcome), image("z.png")))
    driver.run()
    driver.check()
    assert [[row.path for row in shard.rows] for shard in read_store(driver.storage).shards] == [
        ["long.mp4"] * 4, ["a.png", "z.png"]
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "stopped"), [(3, "limit"), (10, ""), (None, "")])
def test_a_limit_is_of_items_that_are_begun(monkeypatch, tmp_path, limit, stopped):
    driver = Driver(monkeypatch, tmp_path, blocks(1), limit=limit).run()
    assert (len(driver.given[0]), driver.runner.stopped) == (limit or 10, stopped)


def test_after_the_deadline_nothing_is_begun_and_what_was_not_is_not_given(monkeypatch, tmp_path):
    late = block(image("a.png"), other("late", None), image("b.png"))
    driver = Driver(monkeypatch, tmp_path, [late, other("later", None)], deadline=active_seconds() - 1).run()
    driver.check()
    assert (driver.encoded, len(driver.results)) == (["a.png", "b.png"], 2)
    assert driver.runner.stopped == "max-runtime"


# --------------------------------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("in_shard", [4, 10_000])
@pytest.mark.parametrize("ahead", [1, 8])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4, 7, 11])
def test_whenever_it_is_interrupted_what_was_counted_is_committed(monkeypatch, tmp_path, stop_after, ahead, in_shard):
    """In the middle of a block, say; the result that was in hand is neither counted nor lost for the next run."""
    monkeypatch.setattr(runner_module, "SHARD_ROWS", in_shard)
    monkeypatch.setattr(runner_module, "BLOCKS_AHEAD", ahead)
    driver = Driver(monkeypatch, tmp_path, blocks(4)).run(stop_after)
    in_hand = {NAMES[stop_after]}
    assert set(driver.encoded) <= set(driver.stored) <= set(driver.encoded) | in_hand
    assert len(driver.stored) == len(set(driver.stored))
    assert not driver.staging.folder.exists()
    assert len(driver.encoded) >= stop_after
    block_in_hand = {name for name in NAMES if name[0] == NAMES[stop_after][0]}
    assert block_in_hand - in_hand <= set(driver.encoded)  # it had left the encoder


@pytest.mark.parametrize("error", [ModelError("no such model"), ProcessError("no process")], ids=str)
@pytest.mark.parametrize(("place", "ahead"), [(0, 8), (1, 1), (1, 8), (2, 1)])
def test_an_error_in_a_block_ends_the_run_and_what_was_counted_is_committed(monkeypatch, tmp_path, error, place, ahead):
    monkeypatch.setattr(runner_module, "BLOCKS_AHEAD", ahead)  # 1: others have not left the encoders
    tables = [image("x.png"), image("y.png")]
    tables.insert(place, result_table(error))
    driver = Driver(monkeypatch, tmp_path, [*blocks(2), block(*tables)])
    with pytest.raises(type(error), match=str(error)):
        driver.run()
    driver.check()
    assert {*NAMES[:6], "x.png", "y.png"} == set(driver.encoded)


def test_a_file_that_a_node_does_not_find_and_is_there_ends_the_run(monkeypatch, tmp_path):
    """Else all items of a disk that is not mounted there would count as gone."""
    (tmp_path / "here.png").write_bytes(b"x")
    gone = result_table(Result(entry("here.png", root=str(tmp_path)), outcome=ItemNotFound("is no longer there")))
    driver = Driver(monkeypatch, tmp_path, [block(image("a.png"), gone, image("b.png"))])
    with pytest.raises(DiskError, match=f"^{tmp_path / 'here.png'} is there, but not on every node.*same paths$"):
        driver.run()
    assert not driver.staging.folder.exists()


def test_a_shard_that_cannot_be_written_ends_the_run_and_finished_ones_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "SHARD_ROWS", 3)
    monkeypatch.setattr(runner_module, "BLOCKS_AHEAD", 1)
    monkeypatch.setattr(runner_module, "SHARDS_IN_FLIGHT", 1)
    real, calls = Writer.write_shard, []

    def write_shard(self, *words):
        calls.append(words)
        return DiskError("the disk is full") if len(calls) == 2 else real(self, *words)

    monkeypatch.setattr(Writer, "write_shard", write_shard)
    first, second, third = blocks(3)
    driver = Driver(monkeypatch, tmp_path, [first, image("in hand.png"), second, third], nodes=["a", "b", "a", "a"])
    with pytest.raises(DiskError, match="the disk is full"):
        driver.run()
    assert driver.stored == NAMES[:3] == [row[0].path for row in driver.committed]
    assert len(calls) == 2  # nothing else is tried on a disk that is full
    assert not driver.staging.folder.exists()


def test_where_the_job_fails_what_was_counted_is_committed(monkeypatch, tmp_path):
    driver = Driver(monkeypatch, tmp_path, blocks(2), ends=RuntimeError("a mistake"))
    monkeypatch.setattr(runner_module, "raise_ours", lambda error: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="a mistake"):
        driver.run()
    assert set(driver.encoded) <= set(driver.stored)
    assert not driver.staging.folder.exists()


def test_where_a_description_is_lost_what_was_counted_is_committed(monkeypatch, tmp_path):
    """With the node, too often: the shard that is being filled is not."""
    monkeypatch.setattr(runner_module, "BLOCKS_AHEAD", 1)
    driver = Driver(monkeypatch, tmp_path, blocks(3))
    real, asked = Writer.describe, []

    def describe(self, one):
        asked.append(one)
        if len(asked) == 3:
            raise ProcessError("the Ray cluster lost what the run depends on")
        return real(self, one)

    monkeypatch.setattr(Writer, "describe", describe)
    with pytest.raises(ProcessError, match="lost"):
        driver.run()
    driver.check()
    assert driver.stored == NAMES[:6]


def test_what_is_closed_before_it_was_run_leaves_nothing(monkeypatch, tmp_path):
    driver = Driver(monkeypatch, tmp_path, [])
    driver.runner.close()
    assert not driver.staging.folder.exists()
    assert (driver.storage.folder / layout.STAGING).exists()


def test_rows_of_the_run_are_those_of_the_store(monkeypatch, tmp_path):
    driver = Driver(monkeypatch, tmp_path, [block(image("a.png"), video("b.mp4"))]).run()
    found: list[Row] = [row for shard in read_store(driver.storage).shards for row in shard.rows]
    assert found == [row for item in driver.committed for row in item]
