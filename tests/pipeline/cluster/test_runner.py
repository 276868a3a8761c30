"""The runner of a run on a cluster: what a driver says becomes results, and shards of the store. The driver is a fake."""

from __future__ import annotations

import os
import signal
from contextlib import closing, suppress

import pytest

from qvsplit.errors import ConfigError, DiskError, ItemError, ModelError, ProcessError, QvsplitError
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.cluster import runner as runner_module
from qvsplit.pipeline.cluster.packing import items_in
from qvsplit.pipeline.cluster.runner import ClusterRunner, Commits
from qvsplit.pipeline.cluster.workers import Writer
from qvsplit.pipeline.items import KNOWN, Staged
from qvsplit.runtime import interrupts
from qvsplit.store import layout
from qvsplit.store.opening import read_store
from qvsplit.store.row import Row
from qvsplit.store.shards import ShardNumbers, shards_in
from qvsplit.store.staging import Staging
from qvsplit.store.storage import LocalStorage
from tests.support import rows
from tests.support.fake_source import entry
from tests.support.staged_items import NAMES, VIDEO_SCHEMA, block, blocks, image, other, video

GONE = ProcessError("the process that has joined the Ray cluster ended")
DONE = messages.Done("", {"wait for the encoder": 1.5})


class FakeDriver:
    """Says what it was given, one thing each time it is asked; in between it has said nothing for a moment.

    Attributes:
        heard: What it was told.
        left: What it has not said.
        after_finish: What it says once it has heard that the run is to finish, in place of being done.
        ended: How often it was ended.
    """

    def __init__(self, said):
        self.heard, self.left, self.after_finish, self.ended = [], list(said), None, 0
        self._is_quiet = False

    def send(self, message):
        self.heard.append(message)
        if isinstance(message, messages.Finish) and self.after_finish is not None:
            self.left = [one for one in self.left if one is not DONE] + list(self.after_finish)

    def receive(self):
        self._is_quiet = not self._is_quiet
        if self._is_quiet:
            return None
        if not self.left:
            raise GONE
        one = self.left.pop(0)
        if isinstance(one, Exception):
            raise one
        return one() if callable(one) else one

    def end(self, *, at_once=False):
        assert not at_once
        self.ended += 1


class Ran:
    """A runner, and what its caller hears.

    Attributes:
        results: Results that came.
        committed: Rows of items whose shard was committed.
        heard: What else was said, in order.
        notes: Remarks.
    """

    def __init__(self, folder, said=(), *, limit: int | None = None):
        self.storage = LocalStorage(folder / "store")
        self.staging = Staging(self.storage.folder, "run-7")
        self.staging.create()
        self.results, self.committed, self.heard, self.notes = [], [], [], []
        self.driver = FakeDriver(said)
        self.commits = Commits(self.storage, ShardNumbers(self.storage), self._commit, self.heard.append)
        self.runner = ClusterRunner(self.driver, self.staging, self.commits, limit, self.notes.append)

    def _commit(self, items):
        for one in items:
            assert one[0].path in {row.path for shard in read_store(self.storage).shards for row in shard.rows}
            self.committed.append(one)
            self.heard.append(one[0].path)

    def shard(self, *tables) -> messages.Shard:
        """Have what is in some blocks written; give what the driver says of that."""
        expected = [item.outcome.rows for table in tables for item in items_in(table)
                    if isinstance(item.outcome, Staged)]  # fmt: skip
        has_videos = any(row.kind == "video" for item in expected for row in item)
        schema = VIDEO_SCHEMA if has_videos else rows.schema()
        name, size = Writer().write_shard(self.staging, schema, expected, *tables)
        return messages.Shard(name, size, expected)

    def says(self, *tables, shard_of: int = 1) -> list:
        """Have the driver describe some blocks, each of which is in a shard with its neighbours, and be done."""
        for start in range(0, len(tables), shard_of):
            some = tables[start : start + shard_of]
            self.driver.left += [described(table) for table in some] + [self.shard(*some)]
        self.driver.left.append(DONE)
        return self.driver.left

    def run(self, number: int = 12, *, stop_after: int | None = None, error=KeyboardInterrupt) -> Ran:
        """Run to the end, or up to so many results, where an exception ends it; as `Execution` does."""
        try:
            with closing(self.runner.run([entry(f"{one}") for one in range(number)])) as results:
                for index, result in enumerate(results):
                    if index == stop_after:
                        raise error
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

    def check(self) -> Ran:
        """What was counted is in the store, what is in it was heard of, and nothing is left."""
        assert sorted(self.stored) == sorted(self.encoded) == sorted(row[0].path for row in self.committed)
        return self.check_ended()

    def check_ended(self) -> Ran:
        assert not self.staging.folder.exists()
        assert self.driver.ended == 1
        written = self.runner.written
        assert written.shards == len(shards_in(self.storage))
        assert written.rows == sum(map(len, self.committed))
        assert written.bytes == sum(file.size for file in self.storage.list())
        return self


def described(table) -> messages.Described:
    return messages.Described(list(items_in(table)))


# --------------------------------------------------------------------------------------------------- to the very end


def test_all_that_the_driver_tells_of_is_given_and_committed(tmp_path):
    one = Ran(tmp_path)
    more = block(other("bad", ItemError("is bad")), other("copy", KNOWN))
    one.says(*blocks(4), shard_of=2).insert(3, described(more))
    one.run().check()
    assert [result.entry.path for result in one.results] == [*NAMES[:6], "bad", "copy", *NAMES[6:]]
    assert one.stored == NAMES
    assert (one.runner.written.shards, one.runner.stopped, one.notes) == (2, "", [])
    assert one.runner.seconds == DONE.seconds


def test_the_driver_hears_of_the_items_before_it_is_to_run_them(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "ENTRIES_A_MESSAGE", 5)
    one = Ran(tmp_path, [DONE]).run()
    assert [type(message).__name__ for message in one.driver.heard] == ["Entries", "Entries", "Entries", "Run"]
    sent = [message.entries for message in one.driver.heard[:3]]
    assert [len(entries) for entries in sent] == [5, 5, 2]
    assert [one.path for entries in sent for one in entries] == [f"{number}" for number in range(12)]


def test_shards_are_committed_in_the_order_in_which_they_come(tmp_path):
    one = Ran(tmp_path)
    first, second, third = (one.shard(table) for table in blocks(3))
    one.driver.left = [*(described(table) for table in blocks(3)), third, first, second, DONE]
    one.run().check()
    assert one.stored == [*NAMES[6:9], *NAMES[:3], *NAMES[3:6]]
    assert sorted(file.name for file in one.storage.list()) == [layout.shard_name(number) for number in (1, 2, 3)]


def test_how_videos_were_looked_at_is_heard_before_the_first_is_committed_or_given(tmp_path):
    one = Ran(tmp_path)
    table = block(image("a.png"), video("b.mp4"))
    one.driver.left = [described(table), one.shard(table), DONE]
    results = one.runner.run([entry("a.png"), entry("b.mp4")])
    assert next(results).entry.path == "a.png"
    assert one.heard == [rows.VIDEOS]
    assert next(results).entry.path == "b.mp4"
    assert list(results) == []
    assert one.heard == [rows.VIDEOS, "a.png", "b.mp4"]
    found: list[Row] = [row for shard in read_store(one.storage).shards for row in shard.rows]
    assert found == [row for item in one.committed for row in item]
    one.runner.close()


@pytest.mark.parametrize(("limit", "stopped"), [(3, "limit"), (12, ""), (13, ""), (None, "")])
def test_a_limit_is_of_items_that_are_begun(tmp_path, limit, stopped):
    one = Ran(tmp_path, [DONE], limit=limit).run()
    assert len(one.driver.heard[0].entries) == min(limit or 12, 12)
    assert one.runner.stopped == stopped


@pytest.mark.parametrize(("limit", "stopped"), [(None, "max-runtime"), (3, "limit")])
def test_the_time_that_is_over_is_the_drivers_to_say(tmp_path, limit, stopped):
    assert Ran(tmp_path, [messages.Done("max-runtime", {})], limit=limit).run().runner.stopped == stopped


def test_a_second_run_goes_on(tmp_path):
    """Items that waited for the content of another, which failed."""
    one = Ran(tmp_path)
    one.says(*blocks(1))
    one.results += one.runner.run([entry(f"{number}") for number in range(3)])
    one.says(image("x.png"))
    one.results += one.runner.run([entry("x.png")])
    one.runner.close()
    one.check()
    assert one.stored == [*NAMES[:3], "x.png"]
    assert one.runner.seconds == {"wait for the encoder": 3.0}
    assert [type(message).__name__ for message in one.driver.heard] == ["Entries", "Run"] * 2


def test_nothing_to_run(tmp_path):
    one = Ran(tmp_path, [DONE]).run(0).check()
    assert [type(message).__name__ for message in one.driver.heard] == ["Run"]


def test_what_is_closed_before_it_was_run_leaves_nothing(tmp_path):
    one = Ran(tmp_path)
    one.runner.close()
    one.check()
    assert (one.storage.folder / layout.STAGING).exists()
    assert list(one.runner.finished()) == []


# -------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("shard_of", [1, 4])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 7, 11])
def test_whenever_it_is_interrupted_what_was_counted_is_committed(tmp_path, stop_after, shard_of):
    """In the middle of a block, say; the result that was in hand is neither counted nor lost for the next run."""
    one = Ran(tmp_path)
    one.says(*blocks(4), shard_of=shard_of)
    one.run(stop_after=stop_after).check_ended()
    assert isinstance(one.driver.heard[-1], messages.Finish)
    assert one.stored == NAMES
    assert sorted(one.encoded) == sorted(set(NAMES) - {NAMES[stop_after]})
    assert one.notes == []


class Interrupting:
    """Has a signal raise, as the main thread hears it, before the so-many-th thing that is done here."""

    def __init__(self, monkeypatch, at):
        self.left = at
        for place in ("_take_up", "_commit"):
            monkeypatch.setattr(ClusterRunner, place, self._interrupted(getattr(ClusterRunner, place)))

    def _interrupted(self, real):
        def called(runner, *words):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return real(runner, *words)

        return called


@pytest.mark.parametrize("at", range(1, 14))
def test_a_signal_is_heard_between_what_is_taken_up_and_never_within(tmp_path, installed, monkeypatch, at):
    """Else a result would be known whose shard is not, or a shard be in the store that nobody has heard of."""
    Interrupting(monkeypatch, at)
    one = Ran(tmp_path)
    one.says(*blocks(3))
    raised = []
    real = one.runner.finished
    monkeypatch.setattr(one.runner, "finished", lambda: (raised.append(1), real())[1])
    one.run().check()
    assert one.stored == NAMES[:9]
    assert raised == [1]


def test_a_signal_that_was_lost_is_met_before_more_is_taken(tmp_path, installed):
    one = Ran(tmp_path)
    one.says(*blocks(2))
    interrupts._arrived.append(signal.SIGTERM)
    with pytest.raises(interrupts.Terminated):
        next(one.runner.run([entry("a")]))
    assert len(one.driver.left) == 5
    one.results += one.runner.finished()  # which looks at no signals: it is what is done once one has come
    one.runner.close()
    one.check()
    assert one.stored == NAMES[:6]


@pytest.mark.parametrize(
    "error", [ModelError("no such model"), GONE, RuntimeError("a bug"), DiskError("full")], ids=str
)
def test_what_goes_wrong_after_an_interrupt_is_a_note(tmp_path, error):
    """What interrupted the run is what it ends with."""
    one = Ran(tmp_path)
    table = blocks(2)[1]
    one.says(*blocks(1))
    one.driver.after_finish = [described(table), one.shard(table), error, described(image("never.png"))]
    one.run(stop_after=1).check_ended()
    assert one.stored == NAMES[:6]
    assert one.encoded == [NAMES[0], *NAMES[2:6]]
    assert one.notes == [f"not all that had left the encoders is kept: {error}"]


def test_a_shard_that_cannot_be_committed_after_an_interrupt_is_a_note(tmp_path, monkeypatch):
    one = Ran(tmp_path)
    one.says(*blocks(3))
    real = Staging.commit

    def commit(self, storage, name, number):
        if number == 2:
            raise DiskError("the disk is full")
        real(self, storage, name, number)

    monkeypatch.setattr(Staging, "commit", commit)
    one.run(stop_after=1).check_ended()
    assert one.stored == NAMES[:3]
    assert one.notes == ["not all that had left the encoders is kept: the disk is full"]


def test_a_driver_that_does_not_finish_is_not_waited_for_for_ever_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "LAST_SECONDS", 0.05)
    one = Ran(tmp_path)
    one.says(*blocks(1))
    one.driver.after_finish = [lambda: None] * 100_000
    one.run(stop_after=1)
    assert one.driver.ended == 1
    assert len(one.notes) == 1 and "not all that had left the encoders is kept" in one.notes[0]


# ------------------------------------------------------------------------------------------------- what ends a run


@pytest.mark.parametrize(
    "error", [ModelError("no such model"), ConfigError("others"), GONE, RuntimeError("a bug")], ids=str
)
@pytest.mark.parametrize("after", range(7))
def test_what_the_driver_ends_with_ends_the_run(tmp_path, error, after):
    """It comes behind what was written."""
    one = Ran(tmp_path)
    one.says(*blocks(3))
    one.driver.left[after:] = [error]
    with pytest.raises(type(error), match=str(error)) as caught:
        one.run()
    assert caught.value is error
    one.check_ended()
    assert one.stored == NAMES[: after // 2 * 3]
    assert one.encoded == NAMES[: (after + 1) // 2 * 3]
    assert not any(isinstance(message, messages.Finish) for message in one.driver.heard)
    assert one.notes == []


def test_a_driver_that_says_nothing_any_more_ends_the_run(tmp_path):
    one = Ran(tmp_path)
    with pytest.raises(ProcessError, match="ended") as caught:
        one.run()
    assert caught.value.exit_code == 70
    one.check()


@pytest.mark.parametrize("shard_of", [1, 4])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 11])
def test_an_exception_of_the_callers_own_loses_nothing_that_was_counted(tmp_path, stop_after, shard_of):
    one = Ran(tmp_path)
    one.says(*blocks(4), shard_of=shard_of)
    with pytest.raises(ZeroDivisionError):
        one.run(stop_after=stop_after, error=ZeroDivisionError)
    one.check_ended()
    assert len(one.encoded) == stop_after
    assert set(one.encoded) <= set(one.stored)
    assert sorted(one.stored) == sorted(row[0].path for row in one.committed)


def test_a_shard_that_cannot_be_committed_ends_the_run_and_none_is_tried_after_it(tmp_path, monkeypatch):
    one = Ran(tmp_path)
    one.says(*blocks(3))
    real, tried = Staging.commit, []

    def commit(self, storage, name, number):
        tried.append(number)
        if number == 2:
            raise DiskError("the disk is full")
        real(self, storage, name, number)

    monkeypatch.setattr(Staging, "commit", commit)
    with pytest.raises(DiskError, match="full"):
        one.run()
    one.check_ended()
    assert (one.stored, tried) == (NAMES[:3], [1, 2])


def test_a_folder_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    """A writer elsewhere has not heard of the end: whoever locks the store next removes it."""

    def remove(self):
        raise DiskError("is not empty")

    monkeypatch.setattr(Staging, "remove", remove)
    one = Ran(tmp_path, [ModelError("no such model")])
    with pytest.raises(ModelError):
        one.run()
    Ran(tmp_path / "other", [DONE]).run()


def test_the_driver_is_ended_before_its_folder_is_removed(tmp_path, monkeypatch):
    """Its writers would write into it."""
    one = Ran(tmp_path, [DONE])
    real, seen = one.driver.end, []
    monkeypatch.setattr(one.driver, "end", lambda: (seen.append(one.staging.folder.exists()), real())[1])
    one.run().check()
    assert seen == [True]
