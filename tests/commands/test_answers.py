"""`qvsplit answers`: a table as it is printed, converted, and given to batch tools."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qvsplit.output.table import Table, read_records
from tests.support.answer_records import answer, check, failed, skipped

ITEMS = [
    {"root": "/r", "path": path, "kind": "image", "part": 0, "start": None, "end": None} for path in ("a.jpg", "b")
]
RECORDS = [
    check("a.jpg", run="old", verdict="warn"),
    check("a.jpg", at=1, verdict="block", level="block"), check("b\n.jpg", at=1, verdict="uncertain"), failed("c.jpg", at=1),
    skipped("a.jpg", "colour"), answer("film.mp4", kind="video", part=1, start=2.5, end=5.0, text="A\tdog."),
    answer('["a.jpg", "b"]', "differ", items=ITEMS, part=None, kind=None, root='["/r", "/r"]', sha256=f"{'a' * 64}+{'b' * 64}"),
]  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with Table(tmp_path / "answers.parquet") as table:
        for record in RECORDS:
            table.put(record)
    return tmp_path / "answers.parquet"


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_lines_have_the_columns_of_ask(run_cli, table):
    code, out, said = run_cli("answers", table)
    assert code == 0
    assert out.splitlines() == [
        "answer\t/r/a.jpg\t\tdog\tyes\t0.9\tblock\t",
        "answer\t/r/b\\x0a.jpg\t\tdog\tunsure\t0.9\tuncertain\t",
        "answer\t/r/c.jpg\t\tdog\t\t\terror\tno memory",
        "answer\t/r/a.jpg\t\tcolour\t\t\t\tskipped",
        "answer\t/r/film.mp4\t1\tcaption\tA dog.\t\t\t",
        "answer\t/r/a.jpg,/r/b\t\tdiffer\tA dog.\t\t\t",
    ]
    assert said == "qvsplit: 1 answer of older runs left out; --all-runs has them\n"


def test_json_lines_are_those_of_ask_with_the_run(run_cli, table):
    _, out, _ = run_cli("answers", table, "--json")
    first, *_, last = lines(out)
    assert {name: first[name] for name in ("type", "file", "id", "answer", "verdict", "score", "level", "forms", "run")} == {
        "type": "answer", "file": "/r/a.jpg", "id": "dog", "answer": "yes", "verdict": "block", "score": 0.9,
        "level": "block", "forms": {"yes": "Yes.", "no": "No."}, "run": "one",
    }  # fmt: skip
    assert (first["custom_id"], first["time"]) == ("/r//a.jpg|dog", RECORDS[1]["time"])
    assert last["paths"] == ["a.jpg", "b"]
    assert run_cli("answers", table, "--format", "jsonl")[1] == out


def test_runs_are_chosen(run_cli, table):
    assert len(lines(run_cli("answers", table, "--json", "--run", "old")[1])) == 1
    code, out, said = run_cli("answers", table, "--json", "--all-runs")
    assert (code, said) == (0, "")
    assert len({line["custom_id"] for line in lines(out)}) == len(RECORDS)
    code, out, said = run_cli("answers", table, "--run", "none")
    assert (code, out) == (2, "")
    assert said == f"qvsplit: --run none: {table} has no such run; it has old, one\n"


def test_batch_lines_have_a_name_each(run_cli, table):
    _, out, _ = run_cli("answers", table, "--jsonl")
    assert out == run_cli("answers", table, "--format", "batch")[1]
    read = {line["custom_id"]: line for line in lines(out)}
    assert list(read) == [
        "/r//a.jpg|dog", "/r//b\n.jpg|dog", "/r//c.jpg|dog", "/r//a.jpg|colour", "/r//film.mp4#1|caption",
        "/r//a.jpg+/r//b|differ",
    ]  # fmt: skip
    assert read["/r//a.jpg|dog"]["response"]["body"]["choices"][0]["message"]["content"] == "yes"
    assert read["/r//c.jpg|dog"]["error"] == {"code": "error", "message": "no memory"}


def test_the_wide_table_is_printed(run_cli, table):
    _, out, said = run_cli("answers", table, "--wide")
    names, first, *rest = (line.split("\t") for line in out.splitlines())
    assert names[7:] == ["verdict", "dog", "dog_score", "colour", "caption"]
    assert first[:2] + first[7:] == ["/r", "a.jpg", "block", "yes", "0.9", "", ""]
    assert [len(cells) for cells in rest] == [len(names)] * 3
    assert rest[0][1] == "b\\x0a.jpg"
    assert "1 answer about several items together left out" in said
    items = lines(run_cli("answers", table, "--wide", "--json")[1])
    assert [item["file"] for item in items] == ["/r/a.jpg", "/r/b\n.jpg", "/r/c.jpg", "/r/film.mp4"]
    assert {(item["type"], *item["scores"]) for item in items} == {("item", "dog")}
    assert items[1]["answers"] == {"dog": "unsure", "colour": None, "caption": None}


def test_the_wide_table_says_which_runs_it_has(run_cli, table):
    _, out, said = run_cli("answers", table, "--wide")
    assert "answers of several runs: taken are those of dog one, not old; --run RUN takes others\n" in said
    assert "--all-runs" not in said  # which --wide has not
    assert run_cli("answers", table, "--wide", "--quiet") == (0, out, "")
    (first, *_) = lines(run_cli("answers", table, "--wide", "--run", "old", "--json")[1])
    assert (first["answers"]["dog"], first["verdict"]) == ("yes", "warn")


def test_a_table_is_converted_and_no_file_overwritten(run_cli, table):
    for suffix in (".csv", ".jsonl", ".parquet"):
        code, out, said = run_cli("answers", table, "--all-runs", "--out", f"other{suffix}")
        assert (code, out, said) == (0, "", f"qvsplit: 7 answers in other{suffix}\n")
        assert read_records(Path(f"other{suffix}")) == RECORDS
    before = table.read_bytes()
    Path("mine.tsv").write_text("mine")
    for words in (["--out", table], ["--out", "mine.tsv", "--format", "tsv"], ["--out", "other.csv", "--jsonl"],
                  ["--out", "other.csv", "--wide"]):  # fmt: skip
        code, out, said = run_cli("answers", table, *words)
        assert (code, out) == (2, "")
        assert "exists" in said
    assert table.read_bytes() == before
    assert Path("mine.tsv").read_text() == "mine"


def test_lines_and_wide_tables_are_written_to_files(run_cli, table):
    for words in (["--jsonl"], ["--format", "tsv"], ["--json"], ["--wide", "--json"], ["--wide", "--format", "tsv"]):
        Path("lines").unlink(missing_ok=True)
        printed = run_cli("answers", table, *words)[1]
        assert run_cli("answers", table, *words, "--out", "lines", "--quiet") == (0, "", "")
        assert Path("lines").read_text() == printed
    for _ in range(2):  # as cron does it
        assert run_cli("answers", table, "--wide", "--out", "wide.csv", "--quiet")[0] == 0
        assert run_cli("answers", table, "--wide", "--out", "wide.parquet")[2].endswith(
            "qvsplit: 4 items in wide.parquet\n"
        )
    with Path("wide.csv").open(newline="") as stream:
        assert [row["dog"] for row in csv.DictReader(stream)] == ["yes", "unsure", "", ""]
    assert pq.read_table("wide.parquet")["verdict"].to_pylist() == ["block", "uncertain", "error", None]


def test_a_table_that_is_being_added_to_is_read_and_never_written(run_cli, table):
    before = table.read_bytes()
    with Table(table) as busy:
        busy.put(answer("new.jpg"))
        assert run_cli("answers", table)[0] == 0
        assert table.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--run", "one", "--all-runs"], "--run and --all-runs: choose one"),
        (["--wide", "--jsonl"], "--wide and --jsonl: choose one"),
        (["--wide", "--all-runs"], "--wide and --all-runs: choose one"),
        (["--jsonl", "--format", "tsv"], "--jsonl is --format batch"),
        (["--jsonl", "--json"], "--json is --format jsonl"),
        (["--out", "none/a.tsv", "--format", "tsv"], "no folder at none"),
        (["--out", "a.txt"], "must end in .parquet, .csv, .jsonl"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run_cli, table, words, told):
    code, out, said = run_cli("answers", table, *words)
    assert (code, out) == (2, "")
    assert told in said
    assert said.count("\n") == 1


def test_what_is_no_table_is_refused_in_a_line(run_cli, tmp_path):
    (tmp_path / "mine.csv").write_text("name,age\nada,36\n")
    for name, told in (("none.csv", "no table of answers at"), ("mine.csv", "no table of this version's answers")):
        code, out, said = run_cli("answers", tmp_path / name)
        assert (code, out) == (2, "")
        assert told in said and said.count("\n") == 1
