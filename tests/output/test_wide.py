"""One row an item, a column a question: what may stand in it, and what is not known."""

from __future__ import annotations

import csv
import errno
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvsplit.errors import DiskError, UsageError
from qvsplit.output.levels import VERDICTS
from qvsplit.output.table import COLUMNS
from qvsplit.output.wide import (
    ITEM_COLUMNS,
    answers_by_item,
    check_names,
    check_questions,
    check_target,
    chosen_runs,
    count_together,
    newest_runs,
    other_runs,
    wide,
    write_wide,
)
from tests.support.answer_records import SHA, answer, check, failed, skipped


def verdicts(records: list[dict[str, Any]]) -> dict[str, str | None]:
    return {row["path"]: row["verdict"] for row in wide(records).to_pylist()}


# -- rows and columns -------------------------------------------------------------------------------------------------


def test_one_row_an_item_one_column_a_question():
    free = {"score": None, "flagged": None}
    table = wide([
        check("a.jpg", verdict="block"), answer("a.jpg", "What is it?"), check("b.jpg"),
        check("b.jpg", "night", None, **free), failed("b.jpg", "What is it?"), skipped("c.jpg"),
        answer("film.mp4", kind="video", part=1, start=2.5, end=5.0),
    ])  # fmt: skip
    assert table.schema == pa.schema([
        ("root", pa.string()), ("path", pa.string()), ("kind", pa.string()), ("part", pa.int32()),
        ("start", pa.float64()), ("end", pa.float64()), ("sha256", pa.string()), ("verdict", pa.string()),
        ("dog", pa.string()), ("dog_score", pa.float64()), ("What is it?", pa.string()),
        ("night", pa.string()), ("night_score", pa.float64()), ("caption", pa.string()),
    ])  # fmt: skip
    first, second, third, film = table.to_pylist()
    empty = dict.fromkeys(table.column_names)
    item = empty | {"root": "/r", "kind": "image", "part": 0, "sha256": SHA}
    assert first == item | {
        "path": "a.jpg",
        "verdict": "block",
        "dog": "yes",
        "dog_score": 0.9,
        "What is it?": "A dog.",
    }
    assert second == item | {
        "path": "b.jpg", "verdict": "error", "dog": "no", "dog_score": 0.2, "night": "no", "night_score": 0.8,
    }  # fmt: skip
    assert third == item | {"path": "c.jpg", "verdict": "pass"}  # of what was skipped nothing can be flagged
    assert film == item | {
        "path": "film.mp4", "kind": "video", "part": 1, "start": 2.5, "end": 5.0, "caption": "A dog.",
    }  # fmt: skip


def test_what_is_uncertain_has_no_score():
    (row,) = wide([check("a.jpg", verdict="uncertain")]).to_pylist()
    assert (row["dog"], row["dog_score"], row["verdict"]) == ("unsure", None, "uncertain")


def test_one_without_any_answer_is_an_empty_table():
    assert wide([]).column_names == list(ITEM_COLUMNS)
    assert len(wide([])) == 0


def test_parts_and_roots_are_items_of_their_own():
    table = wide([answer("a"), answer("a", part=1), answer("a", root="/other")])
    assert [(row["root"], row["path"], row["part"]) for row in table.to_pylist()] == [
        ("/r", "a", 0), ("/r", "a", 1), ("/other", "a", 0),
    ]  # fmt: skip


def test_prompts_about_several_items_are_left_out_and_counted():
    items = [{"root": "/r", "path": name, "kind": "image", "part": 0, "start": None, "end": None} for name in "ab"]
    records = [answer('["a", "b"]', "differ", items=items, part=None), answer("a")]
    assert wide(records).column_names == [*ITEM_COLUMNS, "caption"]
    assert len(wide(records)) == count_together(records) == 1


# -- runs -------------------------------------------------------------------------------------------------------------


def test_of_each_question_the_newest_run_counts_alone():
    records = [
        check("a.jpg", run="old", at=1, verdict="block"), check("b.jpg", run="old", at=9, verdict="warn"),
        check("a.jpg", run="new", at=10), answer("a.jpg", run="old", at=5), answer("b.jpg", run="old", at=5),
    ]  # fmt: skip
    assert newest_runs(records) == {"dog": "new", "caption": "old"}
    first, second = wide(records).to_pylist()
    assert (first["dog"], first["verdict"], first["caption"]) == ("no", "pass", "A dog.")
    assert (second["dog"], second["dog_score"], second["caption"]) == (None, None, "A dog.")


def test_of_equally_new_runs_the_later_counts():
    assert newest_runs([answer("a", run="one"), answer("a", run="two")]) == {"caption": "two"}


def test_the_run_that_was_asked_last_counts_and_not_the_answer_given_last():
    old = check("a.jpg", run="old", at=1, verdict="block") | {"asked": "2026-01-01T00:00:09.000000Z"}
    records = [old, check("a.jpg", run="new", at=5)]
    assert newest_runs(records) == {"dog": "old"}
    assert verdicts(records) == {"a.jpg": "block"}


def test_another_run_may_be_named():
    records = [
        check("a.jpg", run="old", at=1, verdict="block"), check("a.jpg", run="new", at=5),
        answer("a.jpg", run="words"), check("b.jpg", run="older"),
    ]  # fmt: skip
    runs = chosen_runs(records, ["old"])
    assert runs == {"dog": "old", "caption": "words"}
    (row, other) = wide(records, runs).to_pylist()
    assert (row["dog"], row["verdict"], row["caption"]) == ("yes", "block", "A dog.")
    assert (other["dog"], other["verdict"]) == (None, None)
    assert other_runs(records, runs) == {"dog": ["new", "older"]}
    assert other_runs(records[2:], chosen_runs(records[2:])) == {}
    found = answers_by_item(records, runs)
    assert {item: {name: one["run"] for name, one in mine.items()} for item, mine in found.items()} == {
        ("/r", "a.jpg", 0): {"dog": "old", "caption": "words"}, ("/r", "b.jpg", 0): {},
    }  # fmt: skip
    with pytest.raises(UsageError, match="`run=none`: the table has no such run; it has new, old, older, words"):
        chosen_runs(records, ["none"])
    with pytest.raises(UsageError, match="both of the question dog"):
        chosen_runs(records, ["old", "new"])
    assert chosen_runs([*records, check("a.jpg", "hound", run="old")], ["old"])["hound"] == "old"  # of two ids


def test_a_check_that_was_skipped_passes():
    """Its `only_if` did not hold: nothing is flagged."""
    passed = skipped("a.jpg", flagged=False, verdict="pass")
    (row,) = wide([passed]).to_pylist()
    assert (row["verdict"], row["dog"]) == ("pass", None)
    assert verdicts([passed, check("a.jpg", "cat", "warn")]) == {"a.jpg": "warn"}
    assert verdicts([passed, skipped("b.jpg", flagged=False, verdict="pass", run="newer", at=3)])["a.jpg"] is None


def test_what_the_newest_run_has_not_reached_is_not_known():
    """As an interruption leaves it: `pass` would be what another model, or nobody, has said."""
    records = [
        check("a.jpg", run="old"), check("b.jpg", run="old"), check("a.jpg", run="new", at=1),
        check("a.jpg", "cat"), check("b.jpg", "cat"),
    ]  # fmt: skip
    assert verdicts(records) == {"a.jpg": "pass", "b.jpg": None}
    assert verdicts([*records[:-1], check("b.jpg", "cat", "warn")])["b.jpg"] is None  # it may be worse than that
    assert verdicts([*records[:-1], check("b.jpg", "cat", "block")])["b.jpg"] == "block"  # nothing is
    records[2] = failed("a.jpg", run="new", at=1)
    assert verdicts(records) == {"a.jpg": "error", "b.jpg": None}


def test_answers_about_other_bytes_are_not_those_of_the_item():
    records = [check("a.jpg", sha256="0" * 64), check("a.jpg", "cat", at=1), answer("a.jpg", sha256="0" * 64)]
    (row,) = wide(records).to_pylist()
    assert (row["sha256"], row["cat"], row["dog"], row["caption"]) == (SHA, "no", None, None)
    assert row["verdict"] is None


def test_an_item_without_a_check_has_no_verdict():
    assert verdicts([answer("a.jpg"), check("b.jpg")]) == {"a.jpg": None, "b.jpg": "pass"}


@pytest.mark.parametrize("graver", range(1, len(VERDICTS)))
def test_the_verdict_is_the_gravest(graver):
    for other in VERDICTS[:graver]:
        one = failed("a", "x") if VERDICTS[graver] == "error" else check("a", "x", VERDICTS[graver])
        two = failed("a", "y") if other == "error" else check("a", "y", other)
        assert verdicts([one, two]) == verdicts([two, one]) == {"a": VERDICTS[graver]}


RECORDS = st.lists(
    st.builds(
        lambda make, path, name, run, at, sha: make(path, name, run=run, at=at, sha256=sha * 64),
        st.sampled_from([check, failed, skipped, lambda *words, **more: check(*words, verdict="block", **more)]),
        *map(st.sampled_from, (["a", "b"], ["dog", "cat"], ["one", "two"], range(5), "01")),
    ),
    max_size=12, unique_by=lambda one: (one["path"], one["id"], one["run"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(RECORDS)
def test_no_item_passes_by_another_run_or_other_bytes(records):
    runs = newest_runs(records)
    for row in wide(records).to_pylist():
        mine = [one for one in records if one["path"] == row["path"]]
        now = {one["id"]: one for one in mine if one["run"] == runs[one["id"]] and one["sha256"] == row["sha256"]}
        for name in {one["id"] for one in records}:
            assert row[name] == (now[name]["answer"] if name in now else None)
        if row["verdict"] == "pass":
            assert all(one["verdict"] in ("pass", None) for one in now.values())
            scored = {one["id"] for one in records if one["score"] is not None}
            assert {one["id"] for one in mine} & scored <= now.keys()
        assert (row["verdict"] == "block") == any(one["verdict"] == "block" for one in now.values())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([answer("a", "path")], "the question path has a column path, which is also that of the item"),
        ([answer("a", "dog_score"), check("a")], "question dog has a column dog_score, .* of the question dog_score"),
        ([check("a"), answer("a", "dog_score")], "question dog_score has a column dog_score, .* of the question dog;"),
    ],
)
def test_two_columns_of_one_name_are_refused(records, named):
    with pytest.raises(UsageError, match=named):
        wide(records)


def test_names_can_be_checked_before_anything_is_asked():
    assert check_names({"dog": True, "caption": False}) == [*ITEM_COLUMNS, "dog", "dog_score", "caption"]
    with pytest.raises(UsageError, match="the question verdict"):
        check_names({"verdict": True})
    check_questions({"dog": True})
    for names in ({"verdict": True}, {"dog": True, "Dog_Score": False}):
        with pytest.raises(UsageError, match="in a wide table"):
            check_questions(names)


def test_names_that_sql_takes_for_one_are_in_no_file(tmp_path):
    records = [answer("a", "dog"), answer("a", "Dog")]
    assert wide(records).column_names[-2:] == ["dog", "Dog"]
    with pytest.raises(UsageError, match="dog and Dog differ in case alone"):
        write_wide(records, tmp_path / "wide.parquet")
    with pytest.raises(UsageError, match="path and Path"):
        write_wide([answer("a", "Path")], tmp_path / "wide.parquet")
    assert list(tmp_path.iterdir()) == []


# -- files ------------------------------------------------------------------------------------------------------------


def test_it_is_written_as_parquet_or_csv_and_replaces_its_like(tmp_path):
    records = [check("=a.jpg"), answer("b\n.jpg", text='say "hi", =1')]
    for _ in range(2):
        assert write_wide(records, tmp_path / "w.parquet") == 2
        assert write_wide(records, tmp_path / "w.csv") == 2
    assert pq.read_table(tmp_path / "w.parquet").equals(wide(records))
    with (tmp_path / "w.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert list(first) == wide(records).column_names
    assert (first["path"], first["dog"], first["dog_score"], first["caption"]) == ("'=a.jpg", "no", "0.2", "")
    assert (second["path"], second["caption"], second["dog_score"]) == ("b\n.jpg", 'say "hi", =1', "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.csv", "w.parquet"]


@pytest.mark.parametrize("content", [b"name,age\nada,36\n", b"root,path,kind\n", ",".join(COLUMNS).encode(), b"\xff"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_another_file_is_never_overwritten(tmp_path, content, suffix):
    file = tmp_path / f"mine{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is no wide table"):
        write_wide([answer("a")], file)
    assert file.read_bytes() == content
    pq.write_table(pa.table({"root": ["/r"]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="is no wide table"):
        check_target(tmp_path / "other.parquet")


def test_places_where_it_cannot_be(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name, why in (("a.jsonl", "must end in .parquet or .csv"), ("none/a.csv", "no folder at"),
                      ("folder.csv", "is not a file")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            check_target(tmp_path / name)
    (tmp_path / "empty.csv").touch()  # as mktemp makes it
    assert write_wide([answer("a")], tmp_path / "empty.csv") == 1


def test_a_full_disk_leaves_the_table_of_before(tmp_path, monkeypatch):
    file = tmp_path / "w.parquet"
    write_wide([answer("a")], file)
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DiskError, match="the disk is full; the answers are kept"):
        write_wide([answer("b")], file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["w.parquet"]
