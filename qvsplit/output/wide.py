"""Answers as a wide table: one row an item, a column a question. The columns are a contract: docs/tables.md.

Prompts about several items together have no row. Where an item's answers are of several runs, those of one run of each
question count, the newest unless another is named: answers of two models or prompts never stand in one column.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qvsplit.errors import UsageError, some_of
from qvsplit.output.levels import VERDICTS, verdict
from qvsplit.output.spreadsheets import as_cell
from qvsplit.output.table import Record
from qvsplit.runtime.atomic_files import disk_errors, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

ITEM_COLUMNS = ("root", "path", "kind", "part", "start", "end", "sha256", "verdict")
SCORE = "_score"  # behind the name of a question with choices
FORMATS = (".parquet", ".csv")
_Item = tuple[str, str, int]


def wide(records: Iterable[Record], runs: Mapping[str, str] | None = None) -> pa.Table:
    """Give one row an item, in the order in which items first came.

    `runs` has the run that counts of each question; by default it is the newest.

    `verdict` is the gravest of the item's answers. It is null where none of them was to be checked, and where a check
    that was once asked of the item has no answer by the run that counts, or about the item's present bytes: then
    it is not known, unless another check is flagged `block`.

    Raises:
        UsageError: Two columns would have one name.
    """
    import pyarrow as pa

    everything = _about_one(records)
    runs = newest_runs(everything) if runs is None else runs
    scored = dict.fromkeys((record["id"] for record in everything), False)
    for record in everything:
        scored[record["id"]] |= runs[record["id"]] == record["run"] and record["choices"] is not None
    names = check_names(scored)
    checks = {record["id"] for record in everything if not record["score"] is record["flagged"] is None}
    rows = [_row(mine, runs, checks) for mine in _by_item(everything).values()]
    types = {"part": pa.int32(), "start": pa.float64(), "end": pa.float64()}
    types |= {name + SCORE: pa.float64() for name, has_choices in scored.items() if has_choices}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    return pa.table({name: [row.get(name) for row in rows] for name in names}, schema)


def newest_runs(records: Iterable[Record]) -> dict[str, str]:
    """Give, of each question, the run that was asked last; of equally new ones the later in the table."""
    newest: dict[str, tuple[str, str]] = {}
    for record in records:
        if record["id"] not in newest or record["asked"] >= newest[record["id"]][0]:
            newest[record["id"]] = record["asked"], record["run"]
    return {name: run for name, (_, run) in newest.items()}


def chosen_runs(records: Iterable[Record], named: Sequence[str] = ()) -> dict[str, str]:
    """Give, of each question about one item, the run that is `named`, else its newest. UsageError for no such run."""
    everything = _about_one(records)
    runs = newest_runs(everything)
    known = {(record["run"], record["id"]) for record in everything}
    chosen: dict[str, str] = {}
    for run in named:
        names = sorted(name for of, name in known if of == run)
        if not names:
            runs_there = some_of({of for of, _ in known}) or "none"
            raise UsageError(f"`run={run}`: the table has no such run; it has {runs_there}")
        for name in names:  # two ids of one question have one run
            other = chosen.setdefault(name, run)
            if other != run:
                raise UsageError(f"`run={other}` and `run={run}` are both of the question {name}; choose one")
    return runs | chosen


def other_runs(records: Iterable[Record], runs: Mapping[str, str]) -> dict[str, list[str]]:
    """Give, of each question that has answers of other runs than that in `runs`, these others, the newest first."""
    others: dict[str, dict[str, str]] = {}
    for record in _about_one(records):
        if record["run"] != runs.get(record["id"], record["run"]):
            of_question = others.setdefault(record["id"], {})
            of_question[record["run"]] = max(record["asked"], of_question.get(record["run"], ""))
    return {name: sorted(mine, key=lambda run: mine[run], reverse=True) for name, mine in others.items()}


def answers_by_item(records: Iterable[Record], runs: Mapping[str, str]) -> dict[_Item, dict[str, Record]]:
    """Give the records that a wide table's cells are of, by root, path and part, and by question."""
    return {item: _answers(mine, runs) for item, mine in _by_item(_about_one(records)).items()}


def _about_one(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["items"] is None]


def _by_item(records: Iterable[Record]) -> dict[_Item, list[Record]]:
    items: dict[_Item, list[Record]] = {}
    for record in records:
        items.setdefault((record["root"], record["path"], record["part"] or 0), []).append(record)
    return items


def count_together(records: Iterable[Record]) -> int:
    """Count the answers about several items together, which a wide table leaves out."""
    return sum(record["items"] is not None for record in records)


def check_questions(questions: Mapping[str, bool]) -> None:
    """UsageError if `write_wide` would refuse these questions; the value says whether it has choices."""
    _check_cases(check_names(questions))


def check_names(questions: Mapping[str, bool]) -> list[str]:
    """Give the columns for these questions; the value says whether it has choices. UsageError if two have one name."""
    owners = dict.fromkeys(ITEM_COLUMNS, "the item")
    for name, has_choices in questions.items():
        for column in (name, name + SCORE) if has_choices else (name,):
            if column in owners:
                raise UsageError(
                    f"in a wide table the question {name} has a column {column}, which is also that of "
                    f"{owners[column]}; give the question another id, and a table of its own"
                )
            owners[column] = f"the question {name}"
    return list(owners)


def _row(records: Sequence[Record], runs: Mapping[str, str], checks: set[str]) -> dict[str, Any]:
    """Give the row of one item, of all its records."""
    last, answers = _last(records), _answers(records, runs)
    row = {name: last.get(name) for name in ITEM_COLUMNS} | {"part": last["part"] or 0}
    row["verdict"] = _verdict(answers, {record["id"] for record in records} - answers.keys(), checks)
    for name, record in answers.items():
        row[name] = record["answer"]
        row[name + SCORE] = _score(record)
    return row


def _last(records: Sequence[Record]) -> Record:
    return max(reversed(records), key=lambda record: record["asked"])


def _answers(records: Sequence[Record], runs: Mapping[str, str]) -> dict[str, Record]:
    """Give the answers that count, by question: of its run, and about the bytes that the item had last."""
    content = _last(records)["sha256"]
    return {
        record["id"]: record for record in records
        if record["run"] == runs[record["id"]] and record["sha256"] == content
    }  # fmt: skip


def _verdict(answers: Mapping[str, Record], missing: set[str], checks: set[str]) -> str | None:
    known = [record["verdict"] for record in answers.values() if record["verdict"] is not None]
    gravest = verdict(known)
    if missing & checks and gravest != VERDICTS[-1]:
        return None
    return gravest if known or answers.keys() & checks else None


def _score(record: Record) -> float | None:
    """Give the score, or the probability of the choice; of an answer that is uncertain they say nothing."""
    if record["verdict"] == "uncertain":
        return None
    score: float | None = record["choice_probability"] if record["score"] is None else record["score"]
    return score


# -------------------------------------------------------------------------------------------------------- files


def write_wide(records: Iterable[Record], file: Path, runs: Mapping[str, str] | None = None) -> int:
    """Write the wide table of `records` to `file`, Parquet or CSV by its name, whole or not at all.

    `runs` as `wide` has it.

    Returns:
        How many items it has.

    Raises:
        UsageError: It cannot be written there, or two columns differ in case alone, which SQL takes for one.
        DiskError: The disk is full, say.
    """
    target = check_target(file)
    table = wide(records, runs)
    _check_cases(table.column_names)
    with _disk_errors(target), written_whole(target) as stream:
        (_write_parquet if target.suffix.lower() == ".parquet" else _write_csv)(stream, table)
    return len(table)


def check_target(file: Path) -> Path:
    """Give where a wide table for `file` goes, links followed. UsageError if it cannot, or something would be lost."""
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"the wide table {file}: its name must end in {' or '.join(FORMATS)}")
    target = Path(os.path.realpath(file))
    if not target.parent.is_dir():
        raise UsageError(f"the wide table {file}: no folder at {target.parent}")
    if target.exists() and not target.is_file():
        raise UsageError(f"the wide table {file} is not a file; choose another name")
    if target.exists() and target.stat().st_size and not _is_wide(target):
        raise UsageError(f"{file} exists and is no wide table of answers; choose another name")
    return target


def _is_wide(file: Path) -> bool:
    with _disk_errors(file):
        return tuple(_names_in(file)[: len(ITEM_COLUMNS)]) == ITEM_COLUMNS


def _names_in(file: Path) -> list[str]:
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            return stream.readline(1000).rstrip("\r\n").replace('"', "").split(",")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(os.fsencode(file)) as source:
            names: list[str] = pq.read_schema(source).names
    except pa.ArrowException:
        return []
    return names


def _check_cases(names: Sequence[str]) -> None:
    by_lower: dict[str, str] = {}
    for name in names:
        other = by_lower.setdefault(name.lower(), name)
        if other != name:
            raise UsageError(
                f"in a wide table the columns {other} and {name} differ in case alone, and SQL takes them for one; "
                "give one of the questions another id, and a table of its own"
            )


def _write_parquet(stream: IO[bytes], table: pa.Table) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, stream, compression="zstd")


def _write_csv(stream: IO[bytes], table: pa.Table) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(map(_cell, table.column_names))
    for row in table.to_pylist():
        writer.writerow(map(_cell, row.values()))
    text.detach()


def _cell(value: Any) -> Any:
    return as_cell(value) if isinstance(value, str) else value


def _disk_errors(file: Path) -> AbstractContextManager[None]:
    return disk_errors(file, "the answers are kept in their own table")
