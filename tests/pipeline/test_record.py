"""Results to rows: each is written, counted and reported once, in whatever order results come."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from qvsplit.errors import ItemError, ItemNotFound
from qvsplit.models.sampling import MORE_TOKENS, Clip
from qvsplit.pipeline.items import KNOWN, Result, Staged
from qvsplit.pipeline.parts import Part
from qvsplit.pipeline.plan import Cures, Plan
from qvsplit.pipeline.record import RowRecorder
from qvsplit.pipeline.rows import encoded_rows
from qvsplit.pipeline.summary import ExtractCallbacks, Summary
from qvsplit.sources.files import CHANGED, FileInfo
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.config import Provenance
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.opening import open_store
from qvsplit.store.row import Row, item_row
from qvsplit.store.schema import ShardSchema
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store_writer import StoreWriter
from tests.support.extracting import contents
from tests.support.fake_catalogue import FakeCatalogue, clip_rows, digest, failed_row, ok_row
from tests.support.fake_encoder import WIDTH, FakeEncoder, fake_config
from tests.support.fake_source import entry

CURES = Cures(("HEIF",), 60.0, 1000, "cpu")


class FakeWriter:
    """Keeps what is appended."""

    def __init__(self):
        self.rows = []
        self.features = {}

    def append(self, row, features=None):
        row = replace(row, has_features=features is not None)
        self.rows.append(row)
        if features is not None:
            self.features[row.content] = features
        return row

    def append_item(self, parts):
        return [self.append(row, its) for row, its in parts]


def features(text: str, tokens: int = 1) -> Features:
    """Features that are a function of the content."""
    raw = np.frombuffer(bytes.fromhex(digest(text)) * 2, np.uint8)[: 4 * WIDTH] & 0x3F  # small finite floats
    return Features(fake_config(), {"pooler_output": StoredTensor(np.tile(raw, (tokens, 1)), "float32")}, (1, 2, 2),
                    (("<|image_pad|>", tokens),))  # fmt: skip


def result(path: str, outcome=KNOWN, *, content: str | None = None, version: str | None = "1", **more) -> Result:
    """A result of reading `path`; where there are features they are of its content."""
    info = FileInfo(digest(content or path), 1, 1, version)
    return Result(
        entry(path), info, outcome=[Part(features(content or path))] if outcome == "encoded" else outcome, **more
    )


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (1, None),
        (3, "only the first of 3 frames was looked at"),
        (None, "only the first frame was looked at, and how many there are cannot be told"),
    ],
)
def test_an_image_of_which_the_first_frame_alone_was_looked_at(frames, said):
    """A copy of it, too."""
    results = [result("a.gif", "encoded", content="same"), result("b.gif", content="same")]
    results = [replace(one, info=replace(one.info, frames=frames)) for one in results]
    recorder = recorded(results)
    assert [(row.path, row.warnings, row.unseen) for row in recorder.writer.rows] == [
        ("a.gif", said, {"frames": said} if said else {}), ("b.gif", said, {"frames": said} if said else {})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said", "unseen"),
    [
        (0, "its last bytes are missing, but none of its pixels", {}),
        (12, "its last bytes are missing, and with them a part of the last 12 rows of its pixels", "cut_off"),
    ],
)
def test_an_image_without_its_last_bytes_says_so(rows, said, unseen):
    """And of which the first frame alone was looked at; the gate is told what was not seen."""
    results = [result("a.jpg", "encoded", content="a", cut_rows=rows), result("b.jpg", "encoded", content="b")]
    recorder = recorded(results)
    cut, whole = recorder.writer.rows
    assert (cut.warnings, cut.unseen) == (said, {unseen: said} if unseen else {})
    assert (whole.warnings, whole.unseen, recorder.summary.cut_off) == (None, {}, bool(unseen))
    copy = recorded([result(name, "encoded" if name == "a" else KNOWN, content="a", cut_rows=rows) for name in "ab"])
    assert copy.summary.cut_off == 2 * bool(unseen)
    frames = replace(cut, warnings=f"{said}; only the first of 3 frames was looked at").unseen
    assert frames.keys() == ({unseen, "frames"} if unseen else {"frames"})


def unread(path: str, error: ItemError) -> Result:
    return Result(entry(path), outcome=error)


def recorded(results, *, rows=(), absent=(), prune=False, writer=None, empty_folders=None):
    """A recorder that has taken `results`; its writer and summary, and what it said, are on it."""
    writer = writer or FakeWriter()
    summary = Summary(remaining=len(results), not_found=len(absent))
    said: list[tuple] = []
    callbacks = ExtractCallbacks(
        on_item=lambda path: said.append(("item", path)), on_note=lambda line: said.append(("note", line)),
        on_failure=lambda path, reason: said.append(("failure", path, reason)),
    )  # fmt: skip
    planned = Plan(len(results), (), 0, 0, absent=tuple(absent), empty_folders=empty_folders or {})
    recorder = RowRecorder(FakeCatalogue(rows), planned, 7, lambda: writer, summary, callbacks, CURES)
    for one in results:
        recorder.take(one)
    recorder.finish()
    if prune:
        recorder.delete_absent()
    recorder.writer, recorder.summary, recorder.said = writer, summary, said
    return recorder


def counts(recorder) -> dict[str, int]:
    names = ("encoded", "new", "modified", "re_encoded", "copied", "moved", "metadata_changed", "failed",
             "failed_again", "disappeared", "deleted", "not_found", "remaining", "tokens")  # fmt: skip
    return {name: getattr(recorder.summary, name) for name in names if getattr(recorder.summary, name)}


ROWS = [
    ok_row("edited.png", content="before"),
    ok_row("touched.png", version="0"),
    ok_row("old name.png", content="moving"),
    ok_row("also gone.png", content="moving", has_features=False),
    failed_row("still bad.png", media=None),
    ok_row("lost.png", content="lost", has_features=False),
]
ABSENT = [ROWS[2], ROWS[3]]


def in_every_order(results):
    """Results in every order; parts are taken out of them as they are written, so that each order has its own."""
    for order in itertools.permutations(results):
        yield [
            replace(one, outcome=list(one.outcome)) if isinstance(one.outcome, list) else replace(one) for one in order
        ]


def every_kind() -> list[Result]:
    return [
        result("new.png", "encoded"),
        result("copy.png", content="new.png"),
        result("edited.png", "encoded", content="after"),
        result("new name.png", content="moving"),
        result("touched.png"),
        result("bad.png", ItemError("is bad")),
        result("twin.png", content="bad.png"),  # the same bytes, which waits for the other
        unread("vanished.png", ItemNotFound("is no longer there")),
    ]


def test_each_result_becomes_its_row_and_its_count():
    recorder = recorded(every_kind(), rows=ROWS, absent=ABSENT)
    assert counts(recorder) == {
        "encoded": 2, "new": 1, "modified": 1, "copied": 1, "moved": 1, "metadata_changed": 1, "failed": 2,
        "disappeared": 1, "not_found": 1, "tokens": 2,
    }  # fmt: skip
    rows = {row.path: row for row in recorder.writer.rows}
    assert {path: row.status for path, row in rows.items()} == {
        "new.png": "ok", "copy.png": "ok", "edited.png": "ok", "new name.png": "ok", "old name.png": "deleted",
        "touched.png": "ok", "bad.png": "failed", "twin.png": "failed",
    }  # fmt: skip
    assert {row.generation for row in rows.values()} == {7}
    assert len(recorder.writer.rows) == len(rows)  # each once
    assert sorted(path for _, path in {one for one in recorder.said if one[0] == "item"}) == sorted(
        one.entry.path for one in every_kind()
    )
    assert sorted(one[1:] for one in recorder.said if one[0] == "failure") == [
        ("bad.png", "is bad"), ("twin.png", "is bad")
    ]  # fmt: skip


def test_results_in_any_order_give_the_same_rows_and_counts():
    expected = None
    for order in in_every_order(every_kind()[:7]):
        recorder = recorded([replace(one, seconds={}) for one in order], rows=ROWS, absent=ABSENT)
        got = counts(recorder), {row.key: row for row in recorder.writer.rows}
        expected = expected or got
        assert got == expected, [one.entry.path for one in order]


def test_results_in_any_order_give_the_same_store(tmp_path):
    encoder = FakeEncoder()
    schema = ShardSchema(encoder.config, encoder.tensors, (Provenance("fake", None, "cpu", {}),))
    results = [*every_kind()[:3], every_kind()[5]]
    expected = None
    for number, order in enumerate(in_every_order(results)):
        out = tmp_path / f"{number}"
        storage = LocalStorage(out)
        with storage.lock():
            writer = StoreWriter(storage, schema)
            recorded(order, rows=ROWS, writer=writer)
            writer.end_shard()
        store = open_store(out)
        got = contents(out), {row.key: row for row in store.rows}
        expected = expected or got
        assert got == expected
    assert len(expected[0]) == 4


@pytest.mark.parametrize("both", list(itertools.permutations(["copy.png", "other copy.png"])))
def test_of_two_copies_one_takes_the_place_of_the_file_that_is_not_found(both):
    results = [result(path, content="moving") for path in both]
    recorder = recorded(results, rows=ROWS, absent=ABSENT[:1])
    assert counts(recorder) == {"moved": 1, "copied": 1}
    assert [row.path for row in recorder.writer.rows] == ["old name.png", *both]  # the old name first


def test_an_item_waits_for_another_of_the_same_bytes_that_is_in_flight():
    recorder = recorded([result("copy.png", content="new.png")])
    assert recorder.writer.rows == []
    assert recorder.summary.remaining == 1  # should the run end here, it is left for another
    recorder.take(result("new.png", "encoded"))
    assert [row.path for row in recorder.writer.rows] == ["new.png", "copy.png"]
    assert recorder.summary.encoded == recorder.summary.copied == 1


@pytest.mark.parametrize("outcome", ["encoded", "failed"])
def test_what_the_home_says_of_an_item_its_copies_say_too(outcome):
    """Width and height, say: a copy was not decoded itself."""
    home = result("new.png", "encoded" if outcome == "encoded" else ItemError("is bad", "timeout"), width=640,
                  height=480, taken_at="2020-01-01T00:00:00", format="PNG")  # fmt: skip
    recorder = recorded([result("copy.png", content="new.png"), home])
    first, copy = (recorder.current(("/photos", name)) for name in ("new.png", "copy.png"))
    assert (first.status, first.error_kind) == (copy.status, copy.error_kind)
    if outcome == "encoded":
        same = replace(copy, path="new.png", has_features=True)
        assert same == first
        assert (copy.width, copy.height, copy.taken_at, json.loads(copy.media)) == (
            640, 480, "2020-01-01T00:00:00", {"format": "PNG"}
        )  # fmt: skip


def test_features_that_were_lost_are_encoded_again():
    recorder = recorded([result("lost.png", "encoded", content="lost")], rows=ROWS)
    assert counts(recorder) == {"encoded": 1, "re_encoded": 1, "tokens": 1}


@pytest.mark.parametrize(
    ("version", "row_version", "written"),
    [("2", "1", True), ("1", "1", False), (None, "1", False)],  # of a fresh file there is nothing to remember
)
def test_a_row_whose_file_has_the_same_bytes_is_refreshed_if_there_is_something_to_remember(
    version, row_version, written
):
    recorder = recorded([result("a.png", version=version)], rows=[ok_row("a.png", version=row_version)])
    assert counts(recorder) == {"metadata_changed": 1}
    assert [(row.version, row.generation, row.has_features) for row in recorder.writer.rows] == (
        [("2", 7, False)] if written else []
    )


@pytest.mark.parametrize(
    ("kind", "keeps_cures"),
    [("reader-missing", True), ("timeout", True), ("memory", True), ("permission", False), ("content", False)],
)
def test_a_failed_row_keeps_what_may_cure_it(kind, keeps_cures):
    recorder = recorded([result("a.png", ItemError("is bad", kind))])
    (row,) = recorder.writer.rows
    assert (row.status, row.error, row.error_kind) == ("failed", "is bad", kind)
    assert row.media == (json.dumps({"cures": CURES.to_json()}, sort_keys=True) if keeps_cures else None)


def test_what_failed_before_and_fails_again_is_neither_written_nor_reported_again():
    first = recorded([result("a.png", ItemError("is bad"))])
    again = recorded([result("a.png", ItemError("is bad"))], rows=first.writer.rows)
    assert (counts(again), again.writer.rows) == ({"failed_again": 1}, [])
    assert again.said == [("item", "a.png")]
    other = recorded([result("a.png", ItemError("is worse"))], rows=first.writer.rows)
    assert counts(other) == {"failed_again": 1}
    assert [row.error for row in other.writer.rows] == ["is worse"]
    changed = recorded([result("a.png", ItemError("is bad"), content="b")], rows=first.writer.rows)
    assert counts(changed) == {"failed": 1}


def test_a_file_that_could_not_be_opened_has_no_version_and_is_tried_again():
    recorder = recorded([unread("a.png", ItemError("cannot be opened", "permission"))])
    (row,) = recorder.writer.rows
    assert (row.sha256, row.version, row.size, row.mtime_ns) == (None, None, 1, 1)


@pytest.mark.parametrize(("kind", "version"), [("permission", "1"), ("content", None)])
def test_a_file_that_may_not_be_read_keeps_the_version_of_its_listing(kind, version):
    """So that it is known, and not tried again before it may be read."""
    one = unread("a.png", ItemError("cannot be opened", kind))
    one.entry = replace(one.entry, readable=False)
    (row,) = recorded([one]).writer.rows
    assert (row.version, row.error_kind) == (version, kind)


def test_deleted_are_rows_whose_file_does_not_exist_and_that_have_not_moved():
    rows = [
        ok_row("moved.png"),
        ok_row("gone.png"),
        failed_row("bad and gone.png"),
        ok_row("disk/1.png"),
        ok_row("disk/2.png"),
    ]
    empty = {row.key: "/photos/disk" for row in rows[3:]}
    recorder = recorded([result("new name.png", content="moved.png")], rows=rows, absent=rows, prune=True,
                        empty_folders=empty)  # fmt: skip
    assert counts(recorder) == {"moved": 1, "deleted": 2, "not_found": 2}
    assert [(row.path, row.status) for row in recorder.writer.rows] == [
        ("moved.png", "deleted"), ("new name.png", "ok"), ("gone.png", "deleted"), ("bad and gone.png", "deleted")
    ]  # fmt: skip
    assert [one for one in recorder.said if one[0] == "note"] == [
        ("note", "/photos/disk is empty: the 2 items that were below it are not marked deleted, in case a disk is not "
                 "mounted there; remove the folder, or take them out with `qvsplit purge`")
    ]  # fmt: skip


def test_a_copy_of_what_failed_under_one_name_and_was_encoded_under_another_is_no_failure():
    """A file may take too long to read once."""
    results = [result("a.png", ItemError("took too long", "timeout"), content="same"),
               result("b.png", "encoded", content="same"), result("c.png", content="same")]  # fmt: skip
    for order in in_every_order(results):
        assert counts(recorded(order)) == {"encoded": 1, "new": 1, "copied": 1, "failed": 1, "tokens": 1}


def test_a_row_and_its_count_are_one():
    """A writer that fails counts nothing; what it was about is still to be done."""

    class Full(FakeWriter):
        def append(self, row, features=None):
            raise OSError("the disk is full")

    for one in every_kind()[:6]:
        recorder = recorded([], rows=ROWS, absent=ABSENT, writer=Full())
        if one.entry.path == "copy.png":
            one = result("copy.png", content="before")
        recorder.summary.remaining = 1
        with pytest.raises(OSError, match="full"):
            recorder.take(one)
        assert recorder.summary.encoded == recorder.summary.moved == recorder.summary.copied == 0
        assert recorder.summary.remaining == 1
        assert not recorder.holds(result("new.png").content)


# --------------------------------------------------------------------------------------------------------- videos


def filmed(path: str, parts: int, *, most: int | None = None, flags: tuple[str, ...] = ()) -> Result:
    """A video of parts of one second, of one token, two tokens and so on."""
    config = replace(fake_config(), videos={"max_tokens": most})
    clips = [Clip(part, float(part), part + 1.0, 2, 2.0, (2 * part, 2 * part + 1), flags) for part in range(parts)]
    outcome = [
        Part(replace(features(f"{path} {clip.part}", clip.part + 1), config=config, kind="video"), clip)
        for clip in clips
    ]
    info = FileInfo(digest(path), 1, 1, "1", "video")
    video = VideoInfo(2 * parts, 2.0, float(parts), 80, 60, 0, "h264", "mov", 0, None)
    return Result(entry(path), info, 80, 60, video=video, outcome=outcome)


def test_flags_of_a_clip_are_its_rows_and_those_of_its_copies():
    """A clip of just as many tokens as may be is not flagged for that."""
    recorder = recorded([result("b.mp4", content="a.mp4"), filmed("a.mp4", 3, most=2, flags=("is odd",))])
    rows, copies = (recorder.writer.rows[:3], recorder.writer.rows[3:])
    assert [row.warnings for row in rows] == ["is odd", "is odd", f"is odd; {MORE_TOKENS}"]
    assert [json.loads(row.media)["flags"] for row in rows] == [["is odd"], ["is odd"], ["is odd", MORE_TOKENS]]
    assert [replace(row, path="a.mp4", has_features=True) for row in copies] == rows
    (row,) = recorded([filmed("a.mp4", 1)]).writer.rows
    assert row.warnings is None


def test_a_video_that_is_not_found_is_marked_deleted_with_all_its_parts():
    rows = clip_rows("gone.mp4", 3)
    recorder = recorded([], rows=rows, absent=[item_row(rows)], prune=True)
    assert [(row.part, row.status) for row in recorder.writer.rows] == [(part, "deleted") for part in range(3)]
    assert counts(recorder) == {"deleted": 1}


def test_a_video_that_has_moved_is_marked_deleted_with_all_its_parts():
    rows = clip_rows("old.mp4", 2)
    recorder = recorded([result("new.mp4", content="old.mp4")], rows=rows, absent=[item_row(rows)], prune=True)
    assert [(row.path, row.part, row.status) for row in recorder.writer.rows] == [
        ("old.mp4", 0, "deleted"), ("old.mp4", 1, "deleted"), ("new.mp4", 0, "ok"), ("new.mp4", 1, "ok")
    ]  # fmt: skip
    assert counts(recorder) == {"moved": 1}


def test_a_refreshed_video_has_all_its_parts_though_a_row_was_lost():
    homes = clip_rows("home.mp4", 3, sha256=digest("same"))
    lost = [replace(row, path="a.mp4", has_features=False) for row in homes[:1] + homes[2:]]
    recorder = recorded([result("a.mp4", content="same", version="2")], rows=[*homes, *lost])
    assert counts(recorder) == {"metadata_changed": 1}
    assert [(row.path, row.part, row.version, row.generation, row.has_features) for row in recorder.writer.rows] == [
        ("a.mp4", part, "2", 7, False) for part in range(3)
    ]


# ------------------------------------------------------------------------------------- rows that others write: staged


def as_staged(one: Result) -> Result:
    """The same result as a cluster has it: what was encoded is in a staged shard."""
    if not isinstance(one.outcome, list):
        return one
    return replace(one, outcome=Staged(tuple(row for row, _ in encoded_rows(one, list(one.outcome), 7))))


class Cluster:
    """A recorder of staged results, and what was staged and is not committed."""

    def __init__(self, *, rows=(), absent=()):
        self.recorder = recorded([], rows=rows, absent=absent)
        self.summary, self.said, self.committed = self.recorder.summary, self.recorder.said, []
        self.staged: list[tuple[Row, ...]] = []

    @property
    def rows(self) -> list[Row]:
        """All that is in the store of this run."""
        return [row for item in self.committed for row in item] + self.recorder.writer.rows

    def take(self, *results: Result):
        for one in results:
            one = as_staged(one)
            self.summary.remaining += 1
            self.recorder.take(one)
            if isinstance(one.outcome, Staged):
                self.staged.append(one.outcome.rows)
        return self

    def commit(self):
        """Commit a shard of all that is staged."""
        shard, self.staged = self.staged, []
        self.committed += shard
        self.recorder.commit(shard)
        return self


def test_what_is_staged_is_counted_and_reported_at_once_and_no_row_is_written():
    cluster = Cluster(rows=ROWS).take(result("new.png", "encoded"), result("edited.png", "encoded", content="after"))
    assert counts(cluster.recorder) == {"encoded": 2, "new": 1, "modified": 1, "tokens": 2}
    assert cluster.said == [("item", "new.png"), ("item", "edited.png")]
    assert cluster.recorder.writer.rows == [] and cluster.recorder.written == {}
    assert not cluster.recorder.holds((digest("new.png"), 0))  # nothing may refer to it yet
    assert cluster.recorder.current(("/photos", "edited.png")).sha256 == digest("before")
    before = counts(cluster.recorder)
    cluster.commit()
    assert counts(cluster.recorder) == before and len(cluster.said) == 2  # once
    assert cluster.recorder.writer.rows == []  # the shard has them
    assert cluster.recorder.holds((digest("new.png"), 0)) and cluster.recorder.holds((digest("after"), 0))
    assert cluster.recorder.current(("/photos", "edited.png")) == cluster.committed[1][0]
    assert cluster.committed[1][0].has_features


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_copy_is_written_once_what_it_refers_to_is_in_the_store(when):
    cluster, copy = Cluster(), result("copy.png", content="new.png")
    if when == "before":
        cluster.take(copy)
    cluster.take(result("new.png", "encoded"))
    if when == "between":
        cluster.take(copy)
    assert cluster.recorder.writer.rows == []
    assert cluster.summary.remaining == (when != "after")
    cluster.commit()
    assert [row.path for row in cluster.recorder.writer.rows] == ["copy.png"] * (when != "after")
    if when == "after":
        cluster.take(copy)
    assert [row.path for row in cluster.recorder.writer.rows] == ["copy.png"]
    assert counts(cluster.recorder) == {"encoded": 1, "new": 1, "copied": 1, "tokens": 1}
    (row,) = cluster.recorder.writer.rows
    assert replace(row, path="new.png", has_features=True) == cluster.committed[0][0]
    assert ("item", "copy.png") in cluster.said


def test_a_copy_of_what_is_never_committed_is_left_for_the_next_run():
    cluster = Cluster().take(result("new.png", "encoded"), result("copy.png", content="new.png"))
    cluster.recorder.finish()
    assert cluster.rows == [] and cluster.summary.remaining == 1
    assert not cluster.recorder.holds((digest("new.png"), 0))


def test_a_commit_releases_its_own_copies_and_no_others():
    cluster = Cluster().take(result("a.png", "encoded")).take(result("copy a.png", content="a.png"))
    first = cluster.staged[:]
    cluster.take(result("b.png", "encoded"), result("copy b.png", content="b.png"))
    cluster.recorder.commit(first)
    assert [row.path for row in cluster.recorder.writer.rows] == ["copy a.png"]
    cluster.recorder.commit(cluster.staged[1:])
    assert [row.path for row in cluster.recorder.writer.rows] == ["copy a.png", "copy b.png"]
    assert cluster.summary.remaining == 0


@pytest.mark.parametrize("every", [1, 3, 100])
def test_results_of_a_cluster_in_any_order_give_the_rows_and_counts_of_a_run_on_one_machine(every):
    """However many items a shard has."""
    results = [*every_kind()[:4], *every_kind()[5:7]]
    plain = recorded([*every_kind()[:4], *every_kind()[5:7]], rows=ROWS, absent=ABSENT)
    expected = counts(plain), {row.key: row for row in plain.writer.rows}
    for order in in_every_order(results):
        cluster = Cluster(rows=ROWS, absent=ABSENT)
        for one in order:
            cluster.take(one)
            if len(cluster.staged) >= every:
                cluster.commit()
        cluster.commit()
        cluster.recorder.finish()
        assert len(cluster.rows) == len(expected[1])  # each once
        assert (counts(cluster.recorder), {row.key: row for row in cluster.rows}) == expected, [
            one.entry.path for one in order
        ]
        assert sorted(cluster.said) == sorted(plain.said)


def test_parts_of_a_video_are_committed_and_referred_to_as_those_of_a_run_on_one_machine():
    def results():
        return [
            result("b.mp4", content="a.mp4"), filmed("a.mp4", 3, most=2, flags=("is odd",)), filmed("c.mp4", 1),
            result("d.mp4", content="c.mp4"),
        ]  # fmt: skip

    plain = recorded(results())
    cluster = Cluster().take(*results()).commit()
    names = ("encoded", "new", "copied", "tokens", "videos", "clips", "video_seconds", "remaining", "cut_off")
    assert [getattr(cluster.summary, name) for name in names] == [getattr(plain.summary, name) for name in names]
    assert cluster.summary.clips == 4 and cluster.summary.video_seconds == 4.0
    assert sorted(cluster.rows, key=lambda row: (row.path, row.part)) == sorted(
        plain.writer.rows, key=lambda row: (row.path, row.part)
    )
    assert cluster.recorder.written == plain.written


def test_a_moved_file_takes_the_place_of_the_old_one_when_its_features_are_in_the_store():
    """Of a content that the store has lost: it is encoded under one new name, and the other is a move."""
    lost = ok_row("gone.png", content="lost", has_features=False)
    results = [result("x.png", "encoded", content="lost"), result("y.png", content="lost")]
    plain = recorded(next(in_every_order(results)), rows=[lost], absent=[lost])
    cluster = Cluster(rows=[lost], absent=[lost]).take(*results)
    assert cluster.recorder.writer.rows == []  # the old name is not given up before
    cluster.commit()
    assert counts(cluster.recorder) == counts(plain)
    assert [(row.path, row.status) for row in cluster.rows] == [(row.path, row.status) for row in plain.writer.rows]
    assert ("gone.png", "deleted") in [(row.path, row.status) for row in cluster.rows]


def test_a_copy_of_what_failed_under_one_name_and_was_staged_under_another_is_no_failure():
    results = [result("a.png", ItemError("took too long", "timeout"), content="same"),
               result("b.png", "encoded", content="same"), result("c.png", content="same")]  # fmt: skip
    for order in in_every_order(results):
        cluster = Cluster().take(*order).commit()
        cluster.recorder.finish()
        assert counts(cluster.recorder) == {"encoded": 1, "new": 1, "copied": 1, "failed": 1, "tokens": 1}


def test_copies_of_what_failed_fail_at_the_end_and_not_with_a_commit():
    cluster = Cluster().take(result("twin.png", content="bad.png"), result("bad.png", ItemError("is bad")))
    cluster.take(result("new.png", "encoded")).commit()
    assert [row.path for row in cluster.recorder.writer.rows] == ["bad.png"]
    cluster.recorder.finish()
    assert [(row.path, row.status) for row in cluster.recorder.writer.rows] == [
        ("bad.png", "failed"), ("twin.png", "failed")
    ]  # fmt: skip
    assert counts(cluster.recorder) == {"encoded": 1, "new": 1, "failed": 2, "tokens": 1}


@pytest.mark.parametrize(
    "why", [ItemError(CHANGED), ItemNotFound("is no longer there"), ItemError("took too long", "timeout"),
            ItemError("does not fit into memory", "memory")], ids=str,
)  # fmt: skip
def test_what_waited_for_an_item_that_failed_by_chance_is_tried_again(why):
    """Another item of those bytes was to be encoded, and may be now: on one machine it would have been."""
    copies = [result(f"{number}.png", content="same") for number in range(2)]
    cluster = Cluster().take(*copies, result("a.png", why, content="same"), result("new.png", "encoded")).commit()
    assert cluster.recorder.to_try_again() == [copy.entry for copy in copies]
    assert cluster.recorder.to_try_again() == []  # nobody waits any more
    assert cluster.summary.remaining == 2
    cluster.summary.remaining = 0  # `take` counts them again
    cluster.take(result("0.png", "encoded", content="same"), result("1.png", content="same")).commit()
    cluster.recorder.finish()
    assert {row.path: row.status for row in cluster.rows if row.path != "a.png"} == {
        "0.png": "ok", "1.png": "ok", "new.png": "ok"
    }  # fmt: skip
    assert (cluster.summary.encoded, cluster.summary.copied, cluster.summary.remaining) == (2, 1, 0)


def test_what_waits_for_bytes_that_are_bad_is_not_tried_again():
    cluster = Cluster().take(result("twin.png", content="bad.png"), result("bad.png", ItemError("is bad")))
    assert cluster.recorder.to_try_again() == []
    cluster.recorder.finish()
    assert counts(cluster.recorder) == {"failed": 2}


def test_an_image_of_which_not_all_was_seen_is_counted_when_it_is_staged():
    cluster = Cluster().take(
        result("a.jpg", "encoded", content="a", cut_rows=12), result("b.jpg", content="a", cut_rows=12)
    )
    assert cluster.summary.cut_off == 1
    assert cluster.commit().summary.cut_off == 2


def test_what_was_waited_for_is_added_up_of_staged_items_too():
    cluster = Cluster().take(replace(result("a.png", "encoded"), seconds={"preprocess": 0.5}))
    cluster.take(replace(result("b.png", "encoded"), seconds={"preprocess": 0.25}))
    assert cluster.summary.stages["preprocess"] == 0.75
