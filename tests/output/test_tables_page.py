"""docs/tables.md: its columns are those of the tables, and its lines do what it says in every tool."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qvsplit.output.table import COLUMNS, Table
from qvsplit.output.wide import ITEM_COLUMNS, write_wide
from tests.support import rows
from tests.support.answer_records import answer, check, failed

PAGE = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()
BY_NAME, BY_CONTENT = (
    re.findall(r"```python\n(import (\w+).*?)```", section, re.S)
    for section in PAGE.split("### By root and path")[1].split("### By content")
)
(NEWEST,) = re.findall(r"```sql\n(.*?)```", PAGE, re.S)
NEW, OLD = rows.sha("new bytes"), rows.sha("edited.png")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_store(folder: Path) -> None:
    """Copies, parts, an item of other bytes by now, one that was deleted, one that failed, and a rewrite cut short."""
    again = [rows.item("a dog.png", width=1), rows.item("edited.png", generation=2, sha256=NEW, width=2)]
    storage = rows.write_store(
        folder / "embeds",
        [rows.item("a dog.png", width=1), rows.item("edited.png"), rows.item("deleted.png"), *rows.parts("film.mp4", 3),
         rows.item("cat.png"), rows.item("same name.png", root="/other")],
        [again[1], (rows.deleted("deleted.png", generation=2), None), (rows.failed("failed.png", generation=2), None),
         (rows.row("copy.png", generation=2, sha256=rows.sha("a dog.png"), has_features=False, width=3), None)],
    )  # fmt: skip
    rows.write_shard(storage, "shard-000003.parquet", again)


def dog(path: str, at: int = 9, **more: Any) -> dict[str, Any]:
    """A record of the newest run, by which there is a dog."""
    of_item = {"root": "/photos", "run": "new", "sha256": rows.sha(path), "verdict": "warn"}
    return check(path, at=at, **(of_item | more))


def cat(path: str, **more: Any) -> dict[str, Any]:
    return dog(path, **({"verdict": "pass"} | more))


RECORDS = [
    *(dog(path, at=1, run="old", verdict="block") for path in ("cat.png", "a dog.png")),
    dog("a dog.png"), dog("copy.png", sha256=rows.sha("a dog.png")), cat("cat.png"),
    dog("edited.png", sha256=OLD), dog("deleted.png"), dog("failed.png"),
    cat("film.mp4", part=0), dog("film.mp4", part=1), cat("film.mp4", part=2),
    dog("same name.png", root="/other"), dog("same name.png"), failed("failed.png", root="/photos", at=9, run="new"),
    answer("a dog.png", "caption", "yes", root="/photos", sha256=rows.sha("a dog.png"), run="words"),
]  # fmt: skip


def write_table(folder: Path, records: list[dict[str, Any]]) -> None:
    with Table(folder / "answers.parquet") as table:
        for record in records:
            table.put(record)


def result(lines: str, name: str) -> list[tuple[Any, ...]]:
    scope: dict[str, Any] = {}
    exec(lines, scope)
    found = scope[name]
    if isinstance(found, list):
        return found
    return list(found.itertuples(index=False, name=None)) if hasattr(found, "itertuples") else found.rows()


def by_tool(lines: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize("lines", [one for one, _ in lines], ids=[tool for _, tool in lines])


def test_every_tool_has_its_lines():
    assert [tool for _, tool in BY_NAME] == [tool for _, tool in BY_CONTENT] == ["duckdb", "pandas", "polars"]


@by_tool(BY_NAME)
def test_by_root_and_path_answers_meet_the_rows_they_are_about(folder, lines):
    write_store(folder)
    write_table(folder, RECORDS)
    assert result(lines, "dogs") == [
        ("same name.png", 0, 0.9, 84, 56), ("a dog.png", 0, 0.9, 1, 56), ("copy.png", 0, 0.9, 3, 56),
        ("film.mp4", 1, 0.9, 84, 56),
    ]  # fmt: skip


@by_tool(BY_CONTENT)
def test_by_content_every_copy_is_found_once_whatever_its_root(folder, lines):
    write_store(folder)
    elsewhere = [one | {"root": "/of another machine"} for one in RECORDS if one["path"] != "same name.png"]
    write_table(folder, elsewhere)
    assert result(lines, "copies") == [("a dog.png", 0), ("copy.png", 0), ("film.mp4", 1)]


def test_the_newest_run_in_sql(folder):
    import duckdb

    write_table(folder, RECORDS)
    found = duckdb.sql(NEWEST).fetchall()
    assert len(found) == len([one for one in RECORDS if one["run"] != "old"]) - 1  # one is of the place of another
    assert ("cat.png", 0, "dog", "no", "pass") in found
    assert ("cat.png", 0, "dog", "yes", "block") not in found


def contract(section: str) -> list[tuple[str, str]]:
    """(columns, type) of the table in a section of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"(?m)^\| (`\w+`(?:, `\w+`)*|[a-z][^|]*) \| ([^|]*) \| [^|]+ \|$", text)


def test_the_columns_of_the_page_are_those_of_the_tables(folder):
    import duckdb

    write_table(folder, RECORDS)
    described = duckdb.sql("DESCRIBE SELECT * FROM 'answers.parquet'").fetchall()
    named = [(column.strip("`"), kind) for column, kind in contract("The columns") if column != "column"]
    assert named == [(column, kind) for column, kind, *_ in described]
    assert [column for column, _ in named] == list(COLUMNS)


def test_the_columns_of_the_page_are_those_of_wide_tables(folder):
    import duckdb

    write_wide(RECORDS, folder / "wide.parquet")
    described = {name: kind for name, kind, *_ in duckdb.sql("DESCRIBE SELECT * FROM 'wide.parquet'").fetchall()}
    (items, _), *others = [(columns, kind) for columns, kind in contract("The wide table") if columns != "column"]
    assert [*re.findall(r"`(\w+)`", items), "verdict"] == list(ITEM_COLUMNS)
    assert [kind for _, kind in others] == [described[name] for name in ("verdict", "dog", "dog_score")]
