"""The driver of a cluster: what the run was told of is in shards, whatever ends the run. Ray is a fake in this process."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from types import SimpleNamespace

import pyarrow as pa
import pytest

from qvsplit.errors import ConfigError, DiskError, ItemError, ItemNotFound, ModelError, ProcessError, UsageError
from qvsplit.pipeline.cluster import driver as driver_module
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster.connection import Cluster
from qvsplit.pipeline.cluster.driver import Driver, _serve
from qvsplit.pipeline.cluster.job import Job
from qvsplit.pipeline.cluster.packing import items_in, result_table
from qvsplit.pipeline.cluster.shares import shares_of
from qvsplit.pipeline.cluster.workers import Writer
from qvsplit.pipeline.devices import StoreDeclares
from qvsplit.pipeline.items import KNOWN, Known, Result, Staged
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.runner import RunnerOptions
from qvsplit.store import store_writer
from qvsplit.store.shard_reader import Shard
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.fake_source import entry
from tests.support.staged_items import NAMES, block, blocks, image, long_video, other, paths, video

OTHER_VIDEOS = rows.VIDEOS | {"av": "99"}


class Method:
    """A method of an actor, which is called when its value is asked for."""

    def __init__(self, call):
        self._call = call

    def remote(self, *words):
        return functools.partial(self._call, *words)


class Run:
    """A driver, and a run that hears what it says.

    Attributes:
        driver: It.
        given: What each job was given.
        said: What the run was told.
        released: Contents that were let go of.
        writers: The nodes for which a writer was started.
        in_flight: Shards that were being written when another one was begun, at most.
        described: Blocks that were described.
        held: Whether shards that are being written come to no end.
    """

    def __init__(
        self,
        monkeypatch,
        folder,
        *jobs: Sequence[pa.Table],
        nodes=(),
        ends: BaseException | None = None,
        videos=None,
        store_bytes: int = 1 << 30,
    ):
        """Take the blocks that leave the encoders in each job; what is asked of it more has none."""
        self.staging = Staging(folder / "store", "run-7")
        self.staging.create()
        own = StoreDeclares("store", rows.config(videos=videos), rows.specs(), rows.PROVENANCE)
        job = Job(ExtractOptions(device="cpu"), RunnerOptions(), own, 1, self.staging, 1)
        self.given, self.said, self.released, self.writers = [], [], [], []
        self.in_flight = self.described = 0
        self.held = False
        self.jobs = list(jobs)
        cluster = Cluster(2, 4, 0, 2, store_bytes)
        self.driver = Driver(job, rows.schema(), cluster, shares_of(cluster, 1, gpus=False), (1, 1), self.said.append)
        self.driver._contents = SimpleNamespace(release=SimpleNamespace(remote=self.released.append))
        every = [one for blocks in jobs for one in blocks]
        node_of = {id(one): node for one, node in zip(every, nodes or ["head"] * len(every), strict=True)}

        def bundles(given):
            yield from (SimpleNamespace(blocks=[SimpleNamespace(ref=one)]) for one in given)
            if ends is not None:
                raise ends

        def dataset(items):
            self.given.append(list(items))
            given = self.jobs.pop(0) if self.jobs else []
            return SimpleNamespace(iter_internal_ref_bundles=lambda: bundles(given))

        def actor(kind, node, *words, is_bound, **options):
            assert (kind, words, is_bound) == (Writer, (), False)
            assert options == {"max_restarts": driver_module.ATTEMPTS, "max_task_retries": driver_module.ATTEMPTS}
            self.writers.append(node)
            return SimpleNamespace(describe=Method(self._describe), write_shard=Method(Writer().write_shard))

        def ready(tasks):
            if tasks is self.driver._writing:
                self.in_flight = max(self.in_flight, len(tasks))
                return [] if self.held else list(tasks)
            return list(tasks)

        monkeypatch.setattr(self.driver, "_dataset", dataset)
        monkeypatch.setattr(driver_module, "_actor", actor)
        monkeypatch.setattr(driver_module, "_node_of", lambda one: node_of.get(id(one), "head"))
        monkeypatch.setattr(driver_module, "_ready", ready)
        monkeypatch.setattr(driver_module, "value_of", lambda task: task())
        monkeypatch.setattr(driver_module, "as_ours", lambda error: error)

    def _describe(self, one):
        self.described += 1
        return Writer().describe(one)

    def run(self, items: Iterable[str] = (), *, turns: int | None = None, root: str = "/photos") -> Run:
        """Run so many turns, or to the end. The items are those of all blocks, and others."""
        self.items = dict.fromkeys([item.entry for one in self.jobs for table in one for item in items_in(table)
                                    if isinstance(item, Result)])  # fmt: skip
        self.items |= dict.fromkeys(entry(name, root=root) for name in items)
        left = iter(range(turns or 0))
        self.driver.run(list(self.items), lambda: turns is not None and next(left, None) is None)
        return self

    @property
    def told(self) -> dict[str, object]:
        """The outcome of each item that the run was told of."""
        results = [one for message in self.said if isinstance(message, messages.Described) for one in message.results]
        assert len({one.entry.key for one in results}) == len(results), "told of once"
        return {one.entry.path: one.outcome for one in results}

    @property
    def encoded(self) -> list[str]:
        return [path for path, outcome in self.told.items() if isinstance(outcome, Staged)]

    @property
    def shards(self) -> list[messages.Shard]:
        return [message for message in self.said if isinstance(message, messages.Shard)]

    @property
    def stored(self) -> list[str]:
        """Items in the shards that the run was told of, which are whole, and of the size and the rows that it heard."""
        names = []
        for one in self.shards:
            shard = Shard(LocalStorage(self.staging.folder), one.name)
            assert (self.staging.folder / one.name).stat().st_size == one.size
            assert list(shard.rows) == [row for item in one.rows for row in item]
            names += paths(one.rows)
        return names

    def check(self) -> Run:
        """What was told of is in shards, once, and was told of before its shard."""
        assert sorted(self.stored) == sorted(self.encoded)
        heard = set()
        for message in self.said:
            if isinstance(message, messages.Described):
                heard |= {one.entry.path for one in message.results}
            elif isinstance(message, messages.Shard):
                assert heard.issuperset(paths(message.rows))
        return self

    @property
    def done(self) -> list[messages.Done]:
        return [message for message in self.said if isinstance(message, messages.Done)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    return functools.partial(Run, monkeypatch, tmp_path)


@pytest.fixture
def bounds(monkeypatch):
    """Set bounds of the driver, and of every shard."""

    def set_them(**given) -> None:
        for name, value in given.items():
            monkeypatch.setattr(driver_module if hasattr(driver_module, name) else store_writer, name, value)

    return set_them


# --------------------------------------------------------------------------------------------------- to the very end


def test_all_that_leaves_the_encoders_is_told_and_written(run):
    more = block(other("bad", ItemError("is bad")), other("copy", KNOWN), other("gone", ItemNotFound("is gone")))
    one = run([*blocks(4), more]).run().check()
    assert list(one.told) == [*NAMES, "bad", "copy", "gone"]
    assert [type(one.told[name]) for name in ("bad", "copy", "gone")] == [ItemError, Known, ItemNotFound]
    assert one.stored == NAMES  # in one shard, as there is little
    assert len(one.shards) == 1
    assert one.said[-1] is one.done[0] and one.done[0].stopped == ""
    assert [[(item.number, item.entry) for item in job] for job in one.given] == [list(enumerate(one.items))]


def test_without_features_nothing_is_written(run):
    one = run([other("bad", ItemError("is bad"))]).run()
    assert (list(one.told), one.stored, list(one.staging.folder.iterdir())) == (["bad"], [], [])


def test_nothing_to_run_is_done_at_once(run):
    one = run([]).run()
    assert (one.told, len(one.done)) == ({}, 1)


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ({"SHARD_ROWS": 6}, [6, 6]),
        ({"SHARD_BYTES": 6 * 6 * rows.WIDTH * 2}, [6, 6]),
        ({"SHARD_SECONDS": -1.0}, [3, 3, 3, 3]),
        ({}, [12]),
    ],
)
def test_a_shard_ends_when_it_is_full(run, bounds, bound, expected):
    bounds(BLOCKS_AHEAD=1, **bound)
    one = run(blocks(4)).run().check()
    assert [len(shard.rows) for shard in one.shards] == expected


def test_a_shard_takes_a_small_part_of_a_nodes_memory(run, bounds):
    bounds(BLOCKS_AHEAD=1, SHARD_SHARE=0.5)
    one = run(blocks(4), store_bytes=2 * 6 * 6 * rows.WIDTH * 2).run().check()
    assert [len(shard.rows) for shard in one.shards] == [6, 6]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_what_is_on_a_node_is_written_there(run, bounds, in_flight):
    bounds(SHARDS_IN_FLIGHT=in_flight)
    one = run(blocks(4), nodes=["a", "b", "a", "c"]).run().check()
    assert sorted(sorted(paths(shard.rows)) for shard in one.shards) == [NAMES[:3] + NAMES[6:9], NAMES[3:6], NAMES[9:]]
    assert one.in_flight == min(in_flight, 3)
    assert sorted(one.writers) == ["a", "b", "c"]  # one a node


def test_a_disk_that_is_slower_than_the_encoders_holds_them_up(run, bounds):
    bounds(BLOCKS_AHEAD=1, SHARD_ROWS=3, SHARDS_IN_FLIGHT=4)
    one = run(blocks(12))
    one.held = True
    seen = []

    class Turns:
        """Twenty turns in which no shard is written, then all there are."""

        def __call__(self):
            seen.append((one.described, len(one.driver._writing)))
            one.held = len(seen) < 20
            return False

    entries = [entry(f"{first}-{second}.png") for first in range(12) for second in range(3)]
    one.driver.run(entries, Turns())
    assert max(described for described, _ in seen[:20]) == 5  # one shard is full, four are being written
    assert one.in_flight == 4
    one.check()
    assert len(one.encoded) == 36


def test_how_videos_were_looked_at_is_declared(run):
    one = run([block(image("a.png"), video("b.mp4")), image("c.png")]).run().check()
    (shard,) = one.shards
    assert Shard(LocalStorage(one.staging.folder), shard.name).config.videos == rows.VIDEOS
    assert [[(row.path, row.part) for row in item] for item in shard.rows] == [
        [("a.png", 0)], [("b.mp4", 0), ("b.mp4", 1), ("b.mp4", 2)], [("c.png", 0)]
    ]  # fmt: skip


def test_an_item_that_has_a_shard_of_its_own_is_told_of_with_it(run):
    leave = []
    one = run(leave)
    leave.append(block(image("a.png"), long_video(one.staging, "long.mp4"), image("z.png")))
    one.run().check()
    assert [[type(message).__name__ for message in one.said], *(paths(shard.rows) for shard in one.shards)] == [
        ["Described", "Shard", "Shard", "Done"], ["long.mp4"], ["a.png", "z.png"]
    ]  # fmt: skip


def test_after_the_time_nothing_is_begun_and_what_was_not_is_not_told_and_not_run_again(run):
    late = block(image("a.png"), other("late", None), image("b.png"))
    one = run([late, other("later", None)]).run().check()
    assert list(one.told) == ["a.png", "b.png"]
    assert (len(one.given), [done.stopped for done in one.done]) == (1, ["max-runtime"])


# ----------------------------------------------------------------------------------------------- every item, and once


def test_items_of_which_nothing_came_are_run_again(run):
    """A worker that dies is done again; Ray Data may drop what it then gives, where that is cut otherwise."""
    first, second, third = blocks(3)
    one = run([first], [second, third]).run().check()
    assert sorted(one.encoded) == NAMES[:9]
    numbers = [[item.number for item in job] for job in one.given]
    assert numbers == [list(range(9)), list(range(3, 9))]  # by which their contents are theirs
    assert len(one.done) == 1


def test_an_item_of_which_nothing_ever_comes_ends_the_run(run):
    one = run(blocks(2), [])
    with pytest.raises(
        ProcessError, match=r"^the Ray cluster gave nothing for 2 items \(lost, never\).*run again$"
    ) as caught:
        one.run(["never", "lost"])
    assert caught.value.exit_code == 70
    one.check()
    assert one.encoded == NAMES[:6]
    assert [len(job) for job in one.given] == [8, 2, 2] and len(one.given) == driver_module.PASSES
    assert one.done == []


@pytest.mark.parametrize("again", ["the same block", "in the next block", "in its own block", "in the next job"])
def test_an_item_that_comes_twice_ends_the_run_before_it_is_told_or_written_again(run, bounds, again):
    bounds(BLOCKS_AHEAD=1)
    twice = image("0-1.png")
    first, second = blocks(2)
    jobs = {
        "the same block": [[first, block(*blocks(1))]],
        "in the next block": [[first, block(second, twice)]],
        "in its own block": [[first, block(second, image("x.png"), image("x.png"))]],
        "in the next job": [[first], [block(second, twice)]],
    }[again]
    one = run(*jobs)
    with pytest.raises(ProcessError, match="came twice.*run again$"):
        one.run()
    one.check()
    assert one.encoded == NAMES[:3]


def test_an_item_that_nobody_asked_for_ends_the_run(run):
    one = run([image("a.png")])
    with pytest.raises(ProcessError):
        one.driver.run([entry("b.png")], lambda: False)
    assert (one.told, one.shards) == ({}, [])


def test_a_second_run_goes_on_counting(run):
    """Contents are known by the number of the item that is encoded for them."""
    one = run(blocks(2)).run()
    one.jobs = [[image("x.png")], [image("y.png")]]
    one.run()
    one.check()
    assert [[item.number for item in job] for job in one.given] == [list(range(6)), [6, 7], [7]]
    assert len(one.done) == 2 and one.said[-1] is one.done[1]
    assert one.encoded == [*NAMES[:6], "x.png", "y.png"]


def test_the_run_adds_up_the_seconds_of_both_calls(run):
    """As `ClusterRunner` does with what it hears."""
    one = run([image("a.png")])
    one.driver._seconds["wait for the encoder"] = 100.0
    one.run()
    one.jobs = [[image("b.png")]]
    one.run()
    assert 100 <= sum(done.seconds["wait for the encoder"] for done in one.done) < 150


# ------------------------------------------------------------------------------------------------ files and contents


@pytest.fixture
def here(tmp_path):
    """Files that are here, though nodes do not find them: their names."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def made(number: int) -> list[str]:
        for index in range(number):
            (folder / f"{index:02d}").write_bytes(b"x")
        return [f"{index:02d}" for index in range(number)]

    made.folder = str(folder)
    return made


def elsewhere(here, name: str) -> pa.Table:
    return other(name, ItemNotFound("is no longer there"), root=here.folder, is_read=True)


def test_a_file_that_a_node_does_not_find_and_is_here_is_run_again(run, here):
    """It was replaced a moment ago, or the node's file system had not heard of it."""
    names = here(driver_module.FILES_ELSEWHERE)
    found = [result_table(Result(entry(name, root=here.folder), outcome=ItemError("is bad"))) for name in names]
    one = run([block(image("a.png"), *(elsewhere(here, name) for name in names))], found).run().check()
    assert [len(job) for job in one.given] == [len(names) + 1, len(names)]
    assert {str(one.told[name]) for name in names} == {"is bad"}
    assert one.released == []  # what was read of it is the same item's still


def test_a_file_that_is_gone_here_too_is_told_of(run, here):
    one = run([elsewhere(here, "gone")]).run()
    assert isinstance(one.told["gone"], ItemNotFound)
    assert len(one.given) == 1


@pytest.mark.parametrize("together", [True, False])
def test_many_files_that_a_node_does_not_find_and_are_here_end_the_run(run, here, together):
    """Else all items of a disk that is not mounted there would count as gone."""
    names = here(driver_module.FILES_ELSEWHERE + 1)
    gone = [elsewhere(here, name) for name in names]
    one = run([image("a.png"), *([block(*gone)] if together else gone)], [image("b.png")])
    with pytest.raises(DiskError, match=f"^{here.folder}/10 is there, but not on every node.*same paths$") as caught:
        one.run()
    assert caught.value.exit_code == 7
    one.check()
    assert not set(names) & set(one.told)
    assert "a.png" in one.told


@pytest.mark.parametrize("number", [1, 2, 5, driver_module.FILES_ELSEWHERE])
def test_files_that_no_node_ever_finds_and_are_here_end_the_run_and_say_so(run, here, number):
    names = here(number)
    one = run(*([block(*(elsewhere(here, name) for name in names))] for _ in range(driver_module.PASSES)))
    with pytest.raises(DiskError, match="is there, but not on every node"):
        one.run()
    assert one.told == {}


def test_the_content_of_an_item_that_has_failed_is_let_go_of(run):
    one = run([
        image("a.png"),
        block(other("read.png", ItemError("is bad"), is_read=True), other("unread.png", ItemError("is too large"))),
        block(other("copy.png", KNOWN, is_read=True), other("gone.mp4", ItemNotFound("is gone"), is_read=True)),
    ]).run()  # fmt: skip
    assert sorted(one.released) == sorted([rows.sha("read.png"), rows.sha("gone.mp4")])


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("before", ["the store's", "another node's", "in the same block", "on its own"])
def test_videos_that_were_looked_at_otherwise_end_the_run_before_they_are_told_of(run, bounds, before):
    bounds(BLOCKS_AHEAD=1)
    wrong = block(image("y.png"), video("wrong.mp4", videos=OTHER_VIDEOS))
    leave = [block(image("x.png"), *([video("first.mp4")] if before == "another node's" else []))]
    if before == "in the same block":
        wrong = block(video("first.mp4"), wrong)
    one = run([*leave, wrong], nodes=["a", "b"], videos=rows.VIDEOS if before == "the store's" else None)
    if before == "on its own":  # nothing else is known
        one.run().check()
        assert "wrong.mp4" in one.encoded
        return
    with pytest.raises(ConfigError, match="videos were looked at otherwise on one node") as caught:
        one.run()
    assert caught.value.exit_code == 4
    one.check()
    assert one.encoded == ["x.png", *(["first.mp4"] if before == "another node's" else [])]


def test_videos_like_those_of_the_store_are_written(run):
    one = run([video("a.mp4")], [], videos=dict(rows.VIDEOS)).run().check()
    assert one.encoded == ["a.mp4"]


def test_a_long_video_of_another_config_is_not_told_of(run):
    leave = []
    one = run(leave, videos=OTHER_VIDEOS)
    leave.append(long_video(one.staging, "long.mp4"))
    with pytest.raises(ConfigError):
        one.run()
    assert (one.told, one.shards) == ({}, [])


# --------------------------------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize("in_shard", [4, 10_000])
@pytest.mark.parametrize("ahead", [1, 8])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
def test_whenever_it_is_to_finish_what_was_told_of_is_written(run, bounds, turns, ahead, in_shard):
    bounds(SHARD_ROWS=in_shard, BLOCKS_AHEAD=ahead)
    one = run(blocks(8)).run(turns=turns).check()
    assert len(one.done) == 1 and one.said[-1] is one.done[0]
    assert len(one.given) == 1  # what is left is for the next run


def test_what_had_left_the_encoders_is_told_of_and_written_when_it_is_to_finish(run, bounds):
    bounds(BLOCKS_AHEAD=2)
    one = run(blocks(4))

    def is_to_finish():
        deadline = time.monotonic() + 10
        while not (one.driver._blocks.full() or one.told) and time.monotonic() < deadline:
            time.sleep(0.002)
        return True

    one.driver.run([entry(name) for name in NAMES], is_to_finish)
    one.check()
    assert len(one.encoded) >= 6


@pytest.mark.parametrize("error", [ModelError("no such model"), ProcessError("no process")], ids=str)
@pytest.mark.parametrize(("place", "ahead"), [(0, 8), (1, 1), (1, 8), (2, 1)])
def test_an_error_in_a_block_ends_the_run_and_what_was_told_of_is_written(run, bounds, error, place, ahead):
    bounds(BLOCKS_AHEAD=ahead)  # 1: others have not left the encoders
    tables = [image("x.png"), image("y.png")]
    tables.insert(place, result_table(error))
    one = run([*blocks(2), block(*tables)])
    with pytest.raises(type(error), match=str(error)):
        one.run()
    one.check()
    assert {*NAMES[:6], "x.png", "y.png"} == set(one.encoded)
    assert (one.done, len(one.given)) == ([], 1)


def test_a_shard_that_cannot_be_written_ends_the_run_and_those_before_are_told_of(run, bounds, monkeypatch):
    bounds(SHARD_ROWS=3, BLOCKS_AHEAD=1, SHARDS_IN_FLIGHT=1)
    real, calls = Writer.write_shard, []

    def write_shard(self, *words):
        calls.append(words)
        return DiskError("the disk is full") if len(calls) == 2 else real(self, *words)

    monkeypatch.setattr(Writer, "write_shard", write_shard)
    first, second, third = blocks(3)
    one = run([first, image("in hand.png"), second, third], nodes=["a", "b", "a", "a"])
    with pytest.raises(DiskError, match="the disk is full"):
        one.run()
    assert one.stored == NAMES[:3]
    assert len(calls) == 2  # nothing else is tried on a disk that is full


def test_where_the_job_fails_what_was_told_of_is_written(run):
    one = run(blocks(2), ends=RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        one.run()
    one.check()
    assert len(one.encoded) == 6


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("ahead", [1, 8])
def test_where_descriptions_are_lost_what_was_told_of_is_written(run, bounds, monkeypatch, lost, ahead):
    """With their node, too often: the shard that is being filled is not."""
    bounds(BLOCKS_AHEAD=ahead)
    one = run(blocks(2 + lost))
    real, asked = Writer.describe, []

    def describe(self, table):
        asked.append(table)
        if len(asked) > 2:
            raise ProcessError("the Ray cluster lost what the run depends on")
        return real(self, table)

    monkeypatch.setattr(Writer, "describe", describe)
    with pytest.raises(ProcessError, match="lost what the run depends on"):
        one.run()
    one.check()
    assert one.encoded == NAMES[:6]


@pytest.mark.parametrize("what", ["videos", "twice"])
def test_a_second_block_that_is_refused_loses_nothing(run, what):
    """Of a node whose libraries are others, say, several blocks have left the encoders."""
    wrong = {
        "videos": [video(f"{number}.mp4", videos=OTHER_VIDEOS) for number in range(4)],
        "twice": [image(NAMES[number]) for number in range(4)],
    }[what]
    one = run([*blocks(2), *wrong], videos=rows.VIDEOS)
    with pytest.raises(ConfigError if what == "videos" else ProcessError):
        one.run()
    one.check()
    assert one.encoded == NAMES[:6]


def test_a_writer_that_is_lost_while_it_finishes_loses_no_other_shard(run, monkeypatch):
    real, calls = Writer.write_shard, []

    def write_shard(self, *words):
        calls.append(words)
        if len(calls) == 1:
            raise ProcessError("the Ray cluster lost what the run depends on")
        return real(self, *words)

    monkeypatch.setattr(Writer, "write_shard", write_shard)
    one = run(blocks(3), nodes=["a", "b", "c"])
    with pytest.raises(ProcessError, match="lost what the run depends on"):
        one.run()
    assert len(one.stored) == 6


def test_shards_that_are_not_written_in_time_are_not_passed_over_in_silence(run, bounds):
    """What was told of was counted."""
    bounds(LAST_SECONDS=0.05)
    one = run(blocks(2))
    one.held = True
    with pytest.raises(ProcessError, match="could not be written in time"):
        one.driver.run([entry(name) for name in NAMES[:6]], lambda: bool(one.driver._shards))
    assert one.encoded
    assert one.shards == []


def test_no_thread_is_left_when_it_ends_early(run, bounds):
    bounds(BLOCKS_AHEAD=1)
    run(blocks(8)).run(turns=1)
    deadline = time.monotonic() + 5
    while any(thread.name == "qvsplit-ray" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "qvsplit-ray" for thread in threading.enumerate())


# ----------------------------------------------------------------------------------------------- what the process does


class Served:
    """A driver that the process has, and what it was asked to run."""

    def __init__(self, monkeypatch, on_run=lambda is_to_finish: None):
        self.ran, self.heard, self.on_run = [], [], on_run
        self.begin = messages.Begin(ExtractOptions(ray="auto"), RunnerOptions(), None, 1, None, None)
        monkeypatch.setattr(driver_module, "connected", self._connected)
        monkeypatch.setattr(driver_module, "_declared_driver", lambda begin, cluster, send: self)

    @contextmanager
    def _connected(self, address, folder):
        self.heard.append((address, folder))
        try:
            yield None
        finally:
            self.heard.append("left")

    def run(self, entries, is_to_finish):
        self.ran.append([one.path for one in entries])
        self.on_run(is_to_finish)

    def serve(self, *said) -> Served:
        inbox: queue.Queue = queue.Queue()
        for one in (self.begin, *said):
            inbox.put(one)
        self.inbox = inbox
        _serve(inbox, self.heard.append, "/folder")
        return self


def some(*names: str) -> messages.Entries:
    return messages.Entries([entry(name) for name in names])


def test_each_run_has_the_entries_that_came_before_it(monkeypatch):
    one = Served(monkeypatch).serve(some("a", "b"), some("c"), messages.Run(), some("d"), messages.Run(),
                                    messages.Run(), messages.Finish())  # fmt: skip
    assert one.ran == [["a", "b", "c"], ["d"], []]
    assert one.heard == [("auto", "/folder"), "left"]


def test_it_is_to_finish_once_the_run_says_so(monkeypatch):
    seen = []

    def on_run(is_to_finish):
        seen.append(is_to_finish())
        one.inbox.put(messages.Finish())
        seen.append(is_to_finish())

    one = Served(monkeypatch, on_run)
    one.serve(some("a"), messages.Run())
    assert seen == [False, True]
    assert one.heard[-1] == "left"


def test_the_cluster_is_left_before_an_error_is_told(monkeypatch):
    def on_run(is_to_finish):
        raise UsageError("a mistake")

    one = Served(monkeypatch, on_run)
    with pytest.raises(UsageError, match="a mistake"):
        one.serve(messages.Run())
    assert one.heard[-1] == "left"


def test_a_run_that_is_gone_ends_the_process_and_takes_its_folder(monkeypatch, tmp_path):
    codes = []
    (tmp_path / "ray" / "session").mkdir(parents=True)

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    said: queue.Queue = queue.Queue()

    ours, its = Pipe()
    with ours, its:
        ours.send(messages.Finish())
        ours.close()
        with pytest.raises(SystemExit):
            driver_module._listen(its, said, str(tmp_path / "ray"))
    assert codes == [0] and isinstance(said.get_nowait(), messages.Finish)
    assert not (tmp_path / "ray").exists()
