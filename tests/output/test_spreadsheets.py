"""CSV that a spreadsheet saved is read, and none of its cells is a formula to one."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit.errors import UsageError
from qvsplit.output.spreadsheets import as_cell, from_cell
from qvsplit.output.table import COLUMNS, Table

FORMULAS = '=HYPERLINK("http:x","a").jpg', "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＠x"
MARKS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def record(path="a.jpg", **more):
    return dict.fromkeys(COLUMNS) | {
        "root": "/r", "path": path, "kind": "image", "part": 0, "sha256": "ab" * 32, "run": "0123456789ab", "id": "q",
        "question": "Is it?", "answer": "yes", "score": 0.98, "choice_probability": 1e-34, "flagged": True,
        "finish_reason": "stop", "config": "r", "prompt_hash": "p", "weights": "w", "tokens": [1, 2],
        "time": "2026-01-01T00:00:00.000000Z", "asked": "2026-01-01T00:00:00.000000Z",
    } | more  # fmt: skip


def written(file, *records):
    with Table(file) as table:
        for one in records:
            table.put(one)
    return file


def read(file):
    with Table(file) as table:
        return list(table)


@given(st.text(st.sampled_from("'=+-@\t\r\n＝a b\"；;,") | st.characters(exclude_categories=["Cs"]), max_size=6))
def test_no_text_is_a_formula_and_every_text_comes_back(text):
    assert not as_cell(text).startswith(MARKS)
    assert from_cell(as_cell(text)) == text
    assert as_cell(text).removeprefix("'") in (text, text.removeprefix("'"))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_quoted_in_csv_and_nowhere_else(tmp_path, text):
    one = record(text, root=text, id=text, question=text, answer=text, reasoning=text, error=text)
    cells = list(csv.reader(io.StringIO(written(tmp_path / "a.csv", one).read_bytes().decode(), newline="")))[1]
    assert not [cell for cell in cells if cell.startswith(MARKS)]
    assert cells[list(COLUMNS).index("path")] == f"'{text}"
    for suffix in (".csv", ".parquet", ".jsonl"):
        assert read(written(tmp_path / f"b{suffix}", one)) == [one]
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "b.parquet")["path"].to_pylist() == [text]
    assert "'=" not in (tmp_path / "b.jsonl").read_text()


def test_formulas_of_a_table_of_before_are_read(tmp_path):
    file = written(tmp_path / "a.csv", record("=1+1"))
    file.write_text(file.read_text().replace("'=1+1", "=1+1"))
    assert read(file) == [record("=1+1")]


# as Excel of several countries, LibreOffice and Numbers save it: mark, encoding, delimiter, decimals, capitals, quoting
SAVED = [
    ("utf-8-sig", ",", False, False, csv.QUOTE_MINIMAL),
    ("utf-8-sig", ";", True, True, csv.QUOTE_MINIMAL),
    ("utf-16", "\t", False, True, csv.QUOTE_MINIMAL),
    ("utf-8", ";", False, True, csv.QUOTE_ALL),
    ("utf-8", ",", False, True, csv.QUOTE_ALL),
    ("utf-8", "\t", True, False, csv.QUOTE_ALL),
]


@pytest.mark.parametrize(("encoding", "delimiter", "decimal_comma", "capitals", "quoting"), SAVED)
def test_a_table_that_a_spreadsheet_saved_is_read_and_added_to(
    tmp_path, encoding, delimiter, decimal_comma, capitals, quoting
):
    before = [record("Zürich, 2024; a\tb.jpg"), record("=1"), record("c.jpg", answer="a\nb", flagged=False)]
    file = written(tmp_path / "a.csv", *before)
    rows = list(csv.reader(io.StringIO(file.read_bytes().decode(), newline="")))
    for row in rows[1:]:
        for place, kind in enumerate(COLUMNS.values()):
            row[place] = row[place].replace(".", ",") if kind == "float" and decimal_comma else row[place]
            row[place] = row[place].upper() if kind == "bool" and capitals else row[place]
    with file.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=delimiter, quoting=quoting).writerows([*rows, [""] * len(COLUMNS)])
    with Table(file) as table:
        assert list(table) == before
        table.put(record("d.jpg"))
    assert read(file) == [*before, record("d.jpg")]


@pytest.mark.parametrize(
    "content",
    ["\ufeffname,age\nada,36\n", "name;age\nada;36\n", "\ufeff", '"name";"age', ",".join(COLUMNS) + "\na,b\n"],
)
def test_another_csv_is_left_alone(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, "utf-8")
    with pytest.raises(UsageError, match="is no table of"):
        read(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text("utf-8") == content
