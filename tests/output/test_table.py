"""Answers as a table: nothing asked twice, nothing lost, and any reader opens it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvsplit.answering.local_engine import LocalEngine
from qvsplit.answering.requests import Questioner
from qvsplit.demo import POSTCARDS
from qvsplit.errors import DiskError, StoreDamaged, StoreInUse, UsageError
from qvsplit.extract import extract_files
from qvsplit.output.table import COLUMNS, FORMATS, Key, Table, read_records
from qvsplit.output.wide import ITEM_COLUMNS
from qvsplit.pipeline.options import ExtractOptions
from tests.support.forked import command, start_program
from tests.support.loaded_once import keep_loaded

ROOT = Path(__file__).parents[2]
NAMES = ("boats-in-snow.jpg", "city-lights.jpg", "seaside.jpg", "sunday.jpg")
CHECKS = """
[[check]]
id = "night"
question = "Is this day or night?"
choices = ["day", "night"]
flag = "night"

[[check]]
id = "dog"
question = "Is there a dog?"
choices = ["yes", "no"]
flag = "yes"
level = "block"

[[check]]
id = "dogs"
question = "How many dogs can you see?"
only_if = "dog"

[[check]]
id = "caption"
question = "Describe the image."
"""


@pytest.fixture(autouse=True)
def _models_stay_loaded(monkeypatch):
    keep_loaded(monkeypatch)


def make_cards(folder):
    folder.mkdir()
    for name in NAMES:
        shutil.copyfile(POSTCARDS / name, folder / name)
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture(scope="module")
def store_of_shared_cards(tmp_path_factory):
    """A store whose images no test changes. Read only."""
    folder = tmp_path_factory.mktemp("shared")
    extract_files([make_cards(folder / "cards")], out=folder / "store", options=ExtractOptions(model="demo"))
    return folder / "store"


@pytest.fixture
def store(store_of_shared_cards, tmp_path):
    """A store that a test may change, of images that it may not."""
    return Path(shutil.copytree(store_of_shared_cards, tmp_path / "store"))


@pytest.fixture
def cards(tmp_path):
    """Images that a test may change."""
    return make_cards(tmp_path / "cards")


@pytest.fixture
def cards_store(cards, tmp_path):
    """The store of `cards`."""
    extract_files([cards], out=tmp_path / "store", options=ExtractOptions(model="demo"))
    return tmp_path / "store"


@pytest.fixture
def checks(tmp_path):
    file = tmp_path / "checks.toml"
    file.write_text(CHECKS)
    return file


@pytest.fixture
def asked(monkeypatch):
    """(image, question) of everything that was really asked."""
    asked: list[tuple[str, str]] = []
    make = Questioner._request

    def watched(self, place, items, question):
        asked.append((items.rows[-1].path, question.name))
        return make(self, place, items, question)

    monkeypatch.setattr(Questioner, "_request", watched)
    return asked


def record(path="a.jpg", name="q", **more):
    blank = dict.fromkeys(COLUMNS) | {
        "root": "/r", "path": path, "sha256": "ab" * 32, "run": "0123456789ab", "id": name, "question": "Is it?",
        "answer": "yes", "finish_reason": "stop", "config": "r", "prompt_hash": "p" + name, "weights": "w",
        "model": "demo", "tokens": [1, 2, 3], "prompt_tokens": 40, "time": "2026-01-01T00:00:00.000000Z",
        "asked": "2026-01-01T00:00:00.000000Z",
    }  # fmt: skip
    return blank | more


HOSTILE = 'a "quoted", text\nwith; lines\t=SUM(1) 图片 \u2028 end\r\n'
RECORDS = [
    record(),
    record("b.jpg", answer="", finish_reason="length", tokens=[]),
    record("c.jpg", answer=None, finish_reason="skipped", tokens=[]),
    record(HOSTILE, HOSTILE, answer=HOSTILE, question=HOSTILE),
    record("d.jpg", "check", verdict="warn", score=0.25, choice="no", choice_probability=0.75, choice_form="No.",
           choice_mass=1e-9, flagged=True, level="warn", tokens=[], finish_reason="scored", choices=[
               {"choice": "yes", "form": "yes", "probability": 0.25, "logprob": -1.5},
               {"choice": "no", "form": "No.", "probability": 0.75, "logprob": -0.25}]),
    record("e.jpg", "check", flagged=False, verdict="pass"),
    record("f.jpg", answer=None, finish_reason="error", error="its features are damaged", tokens=[], verdict="error"),
    record("g.jpg", answer="", finish_reason="length", reasoning="Is it\na cat?"),
    *(record("film.mp4", kind="video", part=part, start=10.0 * part, end=10.0 * part + 7.5) for part in range(2)),
    *(record('["film.mp4", "film.mp4"]', root='["/r", "/r"]', sha256=f"{'ab' * 32}+{'ab' * 32}", items=[
        {"root": "/r", "path": "film.mp4", "kind": "video", "part": part, "start": 0.0, "end": 7.5}
        for part in (0, other)]) for other in range(2)),
]  # fmt: skip


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_put_is_read_again_to_the_bit(tmp_path, suffix):
    file = tmp_path / f"answers{suffix}"
    with Table(file) as table:
        for one in RECORDS:
            table.put(one)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    before = file.read_bytes()
    with Table(file) as table:
        assert list(table) == RECORDS
        assert table.find(Key("ab" * 32, "pcheck", "r", "w", None)) == RECORDS[5]
        assert table.find(Key("ab" * 32, "pcheck", "r", "other", None)) is None
        table.put(RECORDS[0] | {"time": "later", "asked": "later"})  # says nothing new
    assert file.read_bytes() == before
    with Table(file) as table:
        table.put(record(answer="no"))
        assert [one["answer"] for one in table][:2] == ["no", ""]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.integers(-(2**31), 2**31 - 1)
VALUES = {
    "text": TEXTS, "int": INTS, "float": FLOATS, "bool": st.booleans(), "tokens": st.lists(INTS),
    "time": st.datetimes().map(lambda moment: moment.isoformat(timespec="microseconds") + "Z"),
    "items": st.lists(st.fixed_dictionaries({
        "root": TEXTS, "path": TEXTS | st.none(), "kind": TEXTS | st.none(), "part": INTS,
        "start": FLOATS | st.none(), "end": FLOATS | st.none()})),
    "choices": st.lists(st.fixed_dictionaries({
        "choice": TEXTS, "form": TEXTS | st.none(), "probability": FLOATS | st.none(), "logprob": FLOATS | st.none()}),
        min_size=1),
}  # fmt: skip
NEVER_NULL = {"root", "path", "sha256", "run", "id", "question", "answer", "finish_reason", "config", "prompt_hash",
              "weights", "time", "asked"}  # fmt: skip
ANY_RECORD = st.fixed_dictionaries(
    {name: VALUES[kind] if name in NEVER_NULL else VALUES[kind] | st.none() for name, kind in COLUMNS.items()}
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(ANY_RECORD, max_size=4, unique_by=lambda one: one["id"]))
def test_any_record_is_the_same_in_every_format(tmp_path, records):
    for suffix in FORMATS:
        file = tmp_path / f"any{suffix}"
        file.unlink(missing_ok=True)
        with Table(file) as table:
            for one in records:
                table.put(one)
        assert read_records(file) == records


COLUMNS_OF_BEFORE = [  # before there were runs, choices and verdicts
    "root", "path", "sha256", "kind", "part", "start", "end", "items", "id", "question", "answer", "reasoning",
    "probability", "flagged", "level", "probabilities", "logprobs", "choice_mass", "tokens", "prompt_tokens",
    "finish_reason", "error", "config", "prompt_hash", "model", "weights", "dtype", "encoder_check", "time",
]  # fmt: skip


@pytest.mark.parametrize("columns", [
    COLUMNS_OF_BEFORE, [name for name in COLUMNS if name != "run"], [*COLUMNS, "reviewed by"], ["name"],
])  # fmt: skip
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_with_other_columns_is_refused_and_left_as_it_is(tmp_path, suffix, columns):
    import pyarrow as pa

    file = tmp_path / f"answers{suffix}"
    row = {name: record(tokens=None).get(name, "x") for name in columns}
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    elif suffix == ".csv":
        file.write_text(",".join(columns) + "\n" + ",".join(str(value or "") for value in row.values()) + "\n")
    else:
        file.write_text(json.dumps(row) + "\n")
    before = file.read_bytes()
    for use in (lambda: Table(file).__enter__(), lambda: read_records(file)):
        with pytest.raises(UsageError, match=r"no table of this version's answers \(it (lacks|has) the column") as told:
            use()
        assert "\n" not in str(told.value)
        assert file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if columns[-1] == "reviewed by":
        assert "it has the column reviewed by" in str(told.value)


def test_another_run_is_another_record(tmp_path):
    with Table(tmp_path / "a.csv") as table:
        table.put(record())
        table.put(record(run="another run", prompt_hash="other", answer="no"))
        table.put(record(answer="maybe"))
    assert [(one["run"], one["answer"]) for one in read_records(tmp_path / "a.csv")] == [
        ("0123456789ab", "maybe"), ("another run", "no"),
    ]  # fmt: skip


def test_parquet_has_types_that_need_no_parsing(tmp_path):
    import pyarrow as pa

    with Table(_full_table(tmp_path)) as table:
        assert len(table) == len(RECORDS)
    schema = pq.read_schema(tmp_path / "answers.parquet")
    choices = [("choice", pa.string()), ("form", pa.string()), ("probability", pa.float64()), ("logprob", pa.float64())]
    items = [("root", pa.string()), ("path", pa.string()), ("kind", pa.string()), ("part", pa.int32()),
             ("start", pa.float64()), ("end", pa.float64())]  # fmt: skip
    expected = {
        "choices": pa.list_(pa.struct(choices)), "items": pa.list_(pa.struct(items)), "tokens": pa.list_(pa.int32()),
        "time": pa.timestamp("us", "UTC"), "asked": pa.timestamp("us", "UTC"), "flagged": pa.bool_(), "part": pa.int32(), "prompt_tokens": pa.int32(),
        "score": pa.float64(), "verdict": pa.string(),
    }  # fmt: skip
    assert {name: schema.field(name).type for name in expected} == expected
    import duckdb

    (answer,) = duckdb.sql(f"""
        SELECT choices[2].form, year("time" AT TIME ZONE 'UTC'), flagged, tokens
        FROM '{tmp_path}/answers.parquet' WHERE flagged
    """).fetchall()
    assert answer == ("No.", 2026, True, [])


def _full_table(folder):
    with Table(folder / "answers.parquet") as table:
        for one in RECORDS:
            table.put(one)
    return folder / "answers.parquet"


def test_reading_takes_no_lock_and_says_what_is_no_table(tmp_path):
    with pytest.raises(UsageError, match=r"no table of answers at .*none\.csv"):
        read_records(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="must end in"):
        read_records(tmp_path / "none.txt")
    (tmp_path / "empty.csv").touch()
    assert read_records(tmp_path / "empty.csv") == []
    file = _full_table(tmp_path)
    with Table(file) as table:
        table.put(record("new.jpg"))
        assert read_records(file) == RECORDS  # as the last run left it


def test_every_reader_reads_it(tmp_path):
    for suffix in FORMATS:
        with Table(tmp_path / f"answers{suffix}") as table:
            for one in RECORDS:
                table.put(one)
    assert pq.read_table(tmp_path / "answers.parquet").column_names == list(COLUMNS)
    assert pq.read_table(tmp_path / "answers.parquet").to_pylist()[4]["tokens"] == []
    with (tmp_path / "answers.csv").open(newline="") as stream:
        assert [row["answer"] for row in csv.DictReader(stream)][3] == HOSTILE
    lines = (tmp_path / "answers.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == RECORDS


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_is_something_else_is_left_alone(tmp_path, suffix):
    file = tmp_path / f"mine{suffix}"
    for content in (b"name,age\nada,36\n", b'{"name": "ada"}\n', b"PAR1 and so on", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="no table of this version's answers"), Table(file):
            pass
        assert file.read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no journal left behind
    file.write_bytes(b"")
    with Table(file) as table:  # as mktemp makes it
        assert len(table) == 0
    pq.write_table(pq.read_table(_parquet(tmp_path)), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="no table"), Table(tmp_path / "other.parquet"):
        pass


def _parquet(folder):
    import pyarrow as pa

    pq.write_table(pa.table({"name": ["ada"]}), folder / "names.parquet")
    return folder / "names.parquet"


def test_names_that_are_no_table(tmp_path):
    with pytest.raises(UsageError, match="must end in"):
        Table(tmp_path / "answers.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        Table(tmp_path / "folder.csv")
    with pytest.raises(UsageError, match="no folder at"):
        Table(tmp_path / "none" / "answers.csv")
    (tmp_path / ".a.csv.journal").mkdir()
    with pytest.raises(DiskError, match="cannot be written"), Table(tmp_path / "a.csv"):
        pass


def test_a_torn_journal_is_cut_and_a_spoilt_one_refused(tmp_path):
    file, journal = tmp_path / "answers.csv", tmp_path / ".answers.csv.journal"
    lines = [json.dumps(one).encode() + b"\n" for one in RECORDS]
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    with Table(file) as table:
        assert list(table) == RECORDS[:3]
        table.put(RECORDS[4])
        assert journal.read_bytes() == b"".join([*lines[:3], lines[4]])
    with Table(file) as table:
        assert list(table) == [*RECORDS[:3], RECORDS[4]]
    journal.write_bytes(b'{"no": "record"}\n' + lines[0])
    with pytest.raises(StoreDamaged, match="journal is damaged"), Table(file):
        pass


def test_a_link_keeps_its_target_and_a_file_its_mode(tmp_path):
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "answers.csv", tmp_path / "link.csv"
    with Table(file) as table:
        table.put(RECORDS[0])
    file.chmod(0o600)
    link.symlink_to(file)
    with Table(link) as table:
        table.put(RECORDS[1])
        with pytest.raises(StoreInUse), Table(file):
            pass
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    with Table(file) as table:
        assert list(table) == RECORDS[:2]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["answers.csv"]


def test_an_answer_of_any_length_fits_into_a_cell(tmp_path):
    long = record(tokens=list(range(100_000)), answer="x" * 500_000)
    with Table(tmp_path / "a.csv") as table:
        table.put(long)
    with Table(tmp_path / "a.csv") as table:
        assert list(table) == [long]


@pytest.mark.parametrize("wrong", [
    {"choices": "x"}, {"choices": [{"choice": "yes"}]}, {"finish_reason": "scored"}, {"tokens": 3}, {"tokens": [None]},
    {"flagged": "yes"}, {"score": math.nan}, {"score": 10**400}, {"score": True}, {"part": 2**40}, {"time": "today"},
    {"time": "2026-01-01T00:00:00"}, {"items": [{"part": 0}]},
])  # fmt: skip
def test_a_record_that_was_tampered_with_is_not_believed(tmp_path, wrong):
    (tmp_path / "a.jsonl").write_text(json.dumps(record() | wrong) + "\n")
    with pytest.raises(UsageError, match="of the wrong kind"), Table(tmp_path / "a.jsonl"):
        pass


def test_json_that_is_nested_too_deeply_is_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(UsageError, match="no table of this version"), Table(tmp_path / "a.jsonl"):
        pass
    (tmp_path / ".b.jsonl.journal").write_text("[" * 200_000 + "\n")
    with pytest.raises(StoreDamaged, match="journal is damaged"), Table(tmp_path / "b.jsonl"):
        pass


def test_one_writer_at_a_time(tmp_path):
    file = tmp_path / "answers.csv"
    with Table(file) as table:
        table.put(RECORDS[0])
        with pytest.raises(StoreInUse, match=r"answers\.csv is being written"), Table(file):
            pass
        table.put(RECORDS[1])
    with Table(file) as table:
        assert len(table) == 2


def test_a_full_disk_costs_no_answer(tmp_path):
    """With a limit on the size of files, which the kernel enforces as it does a full disk."""
    program = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from pathlib import Path
from qvsplit.output.table import Table
record = {RECORDS[0]!r}
put = 0
try:
    with Table(Path({str(tmp_path / "answers.jsonl")!r})) as table:
        for number in range(100):
            table.put(record | {{"id": str(number)}})
            put += 1
finally:
    print(put)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "DiskError" in done.stderr
    put = int(done.stdout)
    assert 0 < put < 100
    with Table(tmp_path / "answers.jsonl") as table:
        assert [one["id"] for one in table] == [str(number) for number in range(put)]


# -- asking into it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_rerun_asks_only_what_is_new(run_cli, cards_store, cards, checks, tmp_path, asked, suffix):
    file = tmp_path / f"answers{suffix}"
    words = ("ask", "--embeds", cards_store, "--checks", checks, "--out", file)
    code, out, said = run_cli(*words)
    assert (code, out) == (0, "")
    assert len(asked) == 4 * 3 + 2  # two of the cards have dogs, or seem to
    before = file.read_bytes()
    asked.clear()
    _, _, said = run_cli(*words)
    assert asked == []
    assert "14 answers known, 0 asked; 16 in" in said
    assert file.read_bytes() == before
    checks.write_text(CHECKS.replace("Describe the image.", "What is the weather like?"))
    run_cli(*words)
    assert asked == [(name, "caption") for name in NAMES]
    asked.clear()
    shutil.copyfile(POSTCARDS / "quiet-night.jpg", cards / "new.jpg")
    extract_files([cards], out=cards_store)
    run_cli(*words)
    assert {path for path, _ in asked} == {"new.jpg"}
    with Table(file) as table:
        assert len(table) == 16 + 4 + 4  # another question under an id is another run, and overwrites nothing
        kept = {one["path"]: one["answer"] for one in table if one["id"] == "night"}
        runs = {(one["question"], one["run"]) for one in table if one["id"] == "caption"}
    assert kept["new.jpg"] == "night"
    assert {question for question, _ in runs} == {"Describe the image.", "What is the weather like?"}
    assert len({run for _, run in runs}) == 2


def test_the_wide_table_of_what_was_asked_is_written_beside_it(run_cli, store, checks, tmp_path):
    file, wide = tmp_path / "answers.jsonl", tmp_path / "wide.parquet"
    run_cli("ask", "--embeds", store, "--checks", checks, "--out", file, "--image", "sunday.jpg")
    for _ in range(2):
        code, _, said = run_cli("ask", "--embeds", store, "What is it?", "--out", file, "--wide", wide)
        assert (code, "Traceback" in said) == (0, False)
        found = {row["path"]: row for row in pq.read_table(wide).to_pylist()}
        assert set(found) == set(NAMES)
        answers = {one["path"]: one["answer"] for one in read_records(file) if one["id"] == "What is it?"}
        assert {path: row["What is it?"] for path, row in found.items()} == answers
        assert [name for name in found["sunday.jpg"] if name not in ITEM_COLUMNS] == ["What is it?"]
        assert found["sunday.jpg"]["verdict"] is None  # as on stdout, whatever was asked before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["What is it?", "--wide", "OUT"], "--out and --wide name the same file"),
        (["What is it?", "--wide", "other.csv"], "is no wide table of answers"),
        (["What is it?", "--wide", "a.txt"], "must end in .parquet or .csv"),
        (["verdict", "--wide", "w.csv"], "the question verdict has a column verdict"),
    ],
)
def test_what_no_wide_table_could_have_is_refused_before_anything_is_asked(
    run_cli, store, tmp_path, words, told, asked
):
    with Table(tmp_path / "other.csv") as other:
        other.put(record())
    before = (tmp_path / "other.csv").read_bytes()
    words = [
        str(tmp_path / {"OUT": "a.csv"}.get(word, word)) if "." in word or word == "OUT" else word for word in words
    ]
    code, _, said = run_cli("ask", "--embeds", store, *words, "--out", tmp_path / "a.csv")
    assert (code, asked) == (2, [])
    assert told in said
    assert (tmp_path / "other.csv").read_bytes() == before
    assert not (tmp_path / "a.csv").exists()


def test_a_changed_threshold_judges_anew_and_asks_nothing(run_cli, store, checks, tmp_path, asked):
    file = tmp_path / "answers.parquet"
    words = ("ask", "--embeds", store, "--checks", checks, "--out", file)
    run_cli(*words)
    flagged = sum(bool(row["flagged"]) for row in pq.read_table(file).to_pylist())
    asked.clear()
    checks.write_text(CHECKS.replace('flag = "night"', 'flag = "night"\nthreshold = 0.0\nlevel = "block"'))
    _, _, said = run_cli(*words, "--fail-on", "block")
    assert asked == []
    rows = pq.read_table(file).to_pylist()
    assert all(row["flagged"] and row["level"] == "block" for row in rows if row["id"] == "night")
    assert sum(bool(row["flagged"]) for row in rows) > flagged
    assert "block: 4" in said


def test_edited_and_vanished_images_lose_their_old_answers_moved_ones_keep_them(
    run_cli, cards_store, cards, checks, tmp_path, asked
):
    file = tmp_path / "answers.csv"
    run_cli("ask", "--embeds", cards_store, "--checks", checks, "--out", file)
    (cards / "sunday.jpg").unlink()
    (cards / "seaside.jpg").rename(cards / "moved.jpg")
    shutil.copyfile(POSTCARDS / "winter.jpg", cards / "city-lights.jpg")
    extract_files([cards], out=cards_store, options=ExtractOptions(prune=True))
    asked.clear()
    run_cli("ask", "--embeds", cards_store, "Is there a dog?", "--choices", "yes,no", "--out", file)
    assert asked == [("city-lights.jpg", "Is there a dog?")]  # the same prompt as the check's, of new bytes
    with Table(file) as table:
        told = {(one["path"], one["id"]) for one in table}
    assert {path for path, _ in told} == {"boats-in-snow.jpg", "moved.jpg", "city-lights.jpg"}
    assert ("city-lights.jpg", "caption") not in told


@pytest.mark.parametrize(
    "change", [["--model", "OTHER"], ["--system", "Be brief."], ["--max-new-tokens", "9"], ["--temperature", "2"],
               ["--top-k", "5"], ["--top-p", "0.5"], ["--temperature", "1", "--seed", "5"], ["--dtype", "bfloat16"],
               ["--stop", "x"], ["--json-schema", "a.json"], ["--json-schema", "b.json"]],
)  # fmt: skip
def test_what_decides_an_answer_decides_whether_it_is_asked_again(run_cli, store, tmp_path, asked, change, monkeypatch):
    from qvsplit.checkpoints.opening import DEMO_FOLDER

    monkeypatch.chdir(tmp_path)
    fields = {"a": {"enum": ["x", "y"]}, "b": {"enum": ["x", "y"]}}
    for name, order in (("a", "ab"), ("b", "ba")):  # the order of a schema's fields is the order of the answer's
        schema = {"type": "object", "properties": {field: fields[field] for field in order}, "required": ["a", "b"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(schema))
    if change[1] == "OTHER":
        shutil.copytree(DEMO_FOLDER, tmp_path / "other")
        name = tmp_path / "other" / "generation_config.json"
        name.write_text(json.dumps(json.loads(name.read_text()) | {"repetition_penalty": 1.5}))
        change = ["--model", str(tmp_path / "other")]
    words = ("ask", "--embeds", store, "What is it?", "--out", tmp_path / "a.parquet", "--image", "sunday.jpg")
    before = {"b.json": ["--json-schema", "a.json"], "5": ["--temperature", "1"]}.get(change[-1], [])
    before = [] if change[0] == "--top-k" else before
    for _ in range(2):
        assert run_cli(*words, *before)[0] == 0
    assert len(asked) == 1
    for _ in range(2):
        assert run_cli(*words, *change)[0] == 0
    assert len(asked) == 2
    assert run_cli(*words, *before)[0] == 0  # and back
    assert len(asked) == 2  # the other run has overwritten nothing
    records = read_records(tmp_path / "a.parquet")
    assert len(records) == len({one["run"] for one in records}) == 2


def test_a_run_with_nothing_to_ask_imports_no_torch(run_cli, store, checks, tmp_path):
    words = ["ask", "--embeds", str(store), "--checks", str(checks), "--out", str(tmp_path / "a.parquet")]
    run_cli(*words)
    code = (
        "import sys; from qvsplit.cli import app\n"
        f"try: app({[*words, '--quiet']!r})\n"
        "finally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_images_shown_together_are_one_record(run_cli, store, tmp_path, asked):
    words = ("ask", "--embeds", store, "What differs?", "--out", tmp_path / "a.jsonl", "--compare", "sunday.jpg")
    for _ in range(2):
        run_cli(*words)
        records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [json.loads(one["path"]) for one in records] == [["sunday.jpg", name] for name in NAMES[:3]]
        assert all(len(one["sha256"].split("+")) == 2 for one in records)
    assert len(asked) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_loses_no_finished_answer_and_the_next_finishes_the_rest(
    run_cli, tmp_path, store_folder, asked, number
):
    shutil.copytree(store_folder, tmp_path / "store")
    file, journal = tmp_path / "answers.parquet", tmp_path / ".answers.parquet.journal"
    images = ("coins.png", "coffee.png", "chelsea.png", "rocket.jpg", "one_pixel.png")
    words = ["ask", "--embeds", tmp_path / "store", "--out", file, "--max-new-tokens", "6", "--token-budget", "1",
             *(word for image in images for word in ("--image", image)),
             *(f"What is at place {n}?" for n in range(6))]  # fmt: skip
    process = start_program(command(*words))
    deadline = time.monotonic() + 90
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    total = 6 * len(images)
    if number == signal.SIGINT:
        assert not journal.exists()
        assert process.returncode == 130
        done = pq.read_table(file).num_rows
    else:
        assert not file.exists()
        done = journal.read_bytes().count(b"\n")
    assert 8 <= done < total
    code, _, said = run_cli(*words)
    assert code == 0
    assert f"{done} answers known, {total - done} asked" in said
    assert len(asked) == total - done
    rows = pq.read_table(file).to_pylist()
    fresh = tmp_path / "fresh.parquet"
    run_cli(*[fresh if word == file else word for word in words])
    times = {"time": None, "asked": None}
    assert [row | times for row in rows] == [row | times for row in pq.read_table(fresh).to_pylist()]


def test_answers_are_kept_as_soon_as_their_batch_is_done(run_cli, store, tmp_path, monkeypatch):
    """Not when the image is: there may be a thousand questions about it."""
    run, done = LocalEngine._answer_whole, []

    def interrupted(self, batch, *given):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(len(batch))
        return run(self, batch, *given)

    monkeypatch.setattr(LocalEngine, "_answer_whole", interrupted)
    code, _, _ = run_cli("ask", "--embeds", store, "--image", "sunday.jpg", "--token-budget", "1", "--out",
                         tmp_path / "a.csv", *(f"What is {n}?" for n in range(9)))  # fmt: skip
    assert code == 130
    with Table(tmp_path / "a.csv") as table:
        assert len(table) == sum(done) == 5


def test_a_part_of_a_store_drops_no_answers_of_the_whole(run_cli, cards_store, cards, tmp_path):
    shutil.copyfile(POSTCARDS / "winter.jpg", cards / "sunday.jpg")
    extract_files([cards], out=cards_store)
    words = ("ask", "Is there a dog?", "--out", tmp_path / "a.csv", "--quiet")
    run_cli(*words, "--embeds", cards_store)
    before = (tmp_path / "a.csv").read_bytes()
    run_cli(*words, "--embeds", cards_store / "shard-000001.parquet", "--image", "seaside.jpg")
    assert (tmp_path / "a.csv").read_bytes() == before


def test_skipped_checks_load_no_model(run_cli, store, tmp_path, monkeypatch):
    text = (
        CHECKS
        + """
[[check]]
id = "colour"
question = "What colour is the dog?"
choices = ["red", "blue"]
flag = "red"
only_if = "dog"

[[check]]
id = "why"
question = "Why?"
only_if = "colour"
"""
    )
    (tmp_path / "checks.toml").write_text(text)
    words = ("ask", "--embeds", store, "--checks", tmp_path / "checks.toml", "--out", tmp_path / "a.csv")
    run_cli(*words)
    monkeypatch.setattr("qvsplit.answering.loading.load", None)
    code, _, said = run_cli(*words)
    assert code == 0
    assert "0 asked" in said


# -- the lines of the documents ---------------------------------------------------------------------------------------


def test_the_one_liners_of_the_recipes_run(run_cli, store, checks, tmp_path, monkeypatch):
    """As they stand in docs/recipes.md, on an answers.parquet."""
    run_cli("ask", "--embeds", store, "--checks", checks, "--out", tmp_path / "answers.parquet")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recipes.md").read_text()
    section = page.split("## Tables")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    results = {}
    for block in blocks:
        scope: dict[str, object] = {}
        exec(block, scope)
        results[block.split()[1]] = scope["nights"]
    assert results.keys() == {"duckdb", "pandas", "polars"}
    expected = {"boats-in-snow.jpg", "city-lights.jpg"}
    assert {row[0] for row in results["duckdb"]} == expected
    assert set(results["pandas"]) == expected
    assert set(results["polars"]) == expected


def test_the_moments_of_the_recipes_are_found(tmp_path, monkeypatch):
    """As it stands in docs/recipes.md, on a clips.parquet."""
    with Table(tmp_path / "clips.parquet") as table:
        for part, (answer, probability) in enumerate([("yes", 0.9), ("no", 0.95), ("yes", 0.6), ("yes", 0.99)]):
            table.put(record("walk.mp4", "Is there a dog?", kind="video", part=part, start=10.0 * part,
                             end=10.0 * part + 10, answer=answer, choice_probability=probability))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "recipes.md").read_text().split("## Videos")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert scope["moments"] == [("walk.mp4", 0.0, 10.0, 0.9), ("walk.mp4", 30.0, 40.0, 0.99)]
