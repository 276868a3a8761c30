"""`qvsplit answers`: print a table of answers, or convert it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvsplit.commands.options import INPUT, OUTPUT, Absolute, Json, Quiet, as_format, one_of
from qvsplit.commands.wording import on_command_line
from qvsplit.errors import UsageError, escaped, printable, some_of
from qvsplit.output.text import plural, print_json, say

if TYPE_CHECKING:
    from qvsplit.output.table import Record

BATCH, JSONL = "batch", "jsonl"
FORMATS = ("text", "tsv", JSONL, BATCH)


def answers(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="As `qvsplit ask --out` makes it.", show_default=False)
    ],
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            **one_of("--format", *FORMATS),
            help="text for people, tsv with 8 fixed columns, jsonl (as --json), or batch (as --jsonl) "
            "[default: text on a terminal, else tsv].",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Json = False,
    as_batch: Annotated[
        bool,
        typer.Option(
            "--jsonl", help="Print lines as batch tools have them, each with a custom_id.", rich_help_panel=OUTPUT
        ),
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", help="One row an item, one column a question.", rich_help_panel=OUTPUT)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Write to a file instead: a table by its name, .parquet, .csv or .jsonl, or lines in the format that "
            "is given.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="The answers of this run; with --wide the other questions, too, by their newest [default: of each "
            "question those of its newest run].",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    all_runs: Annotated[
        bool, typer.Option("--all-runs", help="The answers of all runs.", rich_help_panel=INPUT)
    ] = False,
    absolute: Absolute = False,
    quiet: Quiet = False,
) -> None:
    """Print a table of answers, or convert it.

    What an answer was given by, model, prompt and extraction config together, is its run: docs/tables.md. The table
    itself is only read, also while `ask` adds to it.

    Examples:
        qvsplit answers album.parquet
        qvsplit answers album.parquet --wide --out album.csv
        qvsplit answers album.parquet --jsonl > batch.jsonl
    """
    from qvsplit.output.table import read_records
    from qvsplit.output.wide import chosen_runs

    if as_batch and output_format not in (None, BATCH):
        raise UsageError(f"--jsonl is --format batch, and --format {output_format} is given too; give one of them")
    chosen = as_format(BATCH if as_batch else output_format, as_json=as_json)
    if run is not None and all_runs:
        raise UsageError("--run and --all-runs: choose one")
    if wide and (all_runs or chosen == BATCH):
        raise UsageError(f"--wide and {'--all-runs' if all_runs else '--jsonl'}: choose one")
    everything = read_records(table)
    records = everything if wide else _of_runs(everything, run, all_runs=all_runs, table=table)
    if wide:
        runs = chosen_runs(records, [] if run is None else [run])
        written = plural(_put_wide(records, runs, chosen, out, absolute=absolute), "item")
        say_runs(records, runs, quiet=quiet)
        _say_together(records, quiet=quiet)
    elif out is not None and chosen is None:
        written = _answers(_convert(records, out))
    else:
        written = _answers(len(records))
        with _output(out):
            _print(records, chosen, with_run=all_runs, absolute=absolute)
    older = len(everything) - len(records)
    if run is None and older and not quiet:
        say(f"{_answers(older)} of older runs left out; --all-runs has them")
    if out is not None and not quiet:
        say(f"{written} in {escaped(str(out))}")


def _of_runs(records: Sequence[Record], run: str | None, *, all_runs: bool, table: Path) -> list[Record]:
    """Give the records that were asked for."""
    from qvsplit.output.wide import newest_runs

    if all_runs:
        return list(records)
    if run is None:
        newest = newest_runs(records)
        return [record for record in records if newest[record["id"]] == record["run"]]
    if not (found := [record for record in records if record["run"] == run]):
        runs = some_of({record["run"] for record in records}) or "none"
        raise UsageError(f"--run {run}: {table} has no such run; it has {runs}")
    return found


def _print(records: Sequence[Record], chosen: str | None, *, with_run: bool, absolute: bool) -> None:
    from qvsplit.answering.recorder import answer_of
    from qvsplit.output.batch_form import batch_line, custom_id
    from qvsplit.output.printer import AnswerPrinter, PrintOptions

    if chosen == BATCH:
        for record in records:
            print_json(batch_line(record, with_run=with_run))
        return
    given = [answer_of(record) for record in records]
    roots = {row.root for answer in given for row in answer.rows}
    printer = AnswerPrinter(PrintOptions(chosen, absolute, worded=on_command_line), one_root=len(roots) <= 1)
    for record, answer in zip(records, given, strict=True):
        if chosen == JSONL:
            origin = {name: record[name] for name in ("run", "model", "time")}
            names = {"custom_id": custom_id(record, with_run=with_run)}
            print_json(answer.to_json(absolute=absolute) | origin | names)
        else:
            printer.answer(answer)


def _answers(number: int) -> str:
    return plural(number, "answer")


def say_runs(records: Sequence[Record], runs: Mapping[str, str], *, quiet: bool) -> None:
    """Say which questions have answers of runs that are not shown, and how to have these."""
    from qvsplit.output.wide import other_runs

    others = other_runs(records, runs)
    if others and not quiet:
        shown = some_of((f"{escaped(name)} {runs[name]}, not {some_of(mine)}" for name, mine in others.items()), 3)
        say(f"answers of several runs: taken are those of {shown}; --run RUN takes others")


def _put_wide(
    records: Sequence[Record], runs: Mapping[str, str], chosen: str | None, out: Path | None, *, absolute: bool
) -> int:
    """Print or write the wide table; gives the number of its items."""
    from qvsplit.output.wide import wide, write_wide

    if out is not None and chosen is None:
        return write_wide(records, out, runs)
    table = wide(records, runs)
    with _output(out):
        if chosen == JSONL:
            for row in table.to_pylist():
                print_json(item_json(row, absolute=absolute))
        else:
            print("\t".join(_cell(name) for name in table.column_names))
            for row in table.to_pylist():
                print("\t".join(_cell(value, name in ("root", "path")) for name, value in row.items()))
    return len(table)


def item_json(row: dict[str, Any], *, absolute: bool) -> dict[str, Any]:
    """Give a row of the wide table for JSON: answers and scores in objects, as a question may have any name."""
    from qvsplit.output.names import file_of
    from qvsplit.output.wide import ITEM_COLUMNS, SCORE
    from qvsplit.store.row import Row

    item = {name: row[name] for name in ITEM_COLUMNS}
    file = file_of(Row(item["root"], item["path"], item["sha256"], 0, "ok"), absolute=absolute)
    names = [name for name in row if name not in ITEM_COLUMNS]
    scores = {name: row[name + SCORE] for name in names if name + SCORE in row}
    is_score = {name + SCORE for name in scores}
    asked = {name: row[name] for name in names if name not in is_score}
    return {"type": "item", "file": file} | item | {"answers": asked, "scores": scores}


def _cell(value: Any, is_name: bool = False) -> str:
    """Give a value as the printer of answers has it: a file's name as it is, other text with single blanks."""
    if value is None:
        return ""
    return escaped(str(value)) if is_name else printable(" ".join(str(value).split()))


def _say_together(records: Sequence[Record], *, quiet: bool) -> None:
    from qvsplit.output.wide import count_together

    together = count_together(records)
    if together and not quiet:
        say(f"{_answers(together)} about several items together left out: they are of no one item")


def _convert(records: Sequence[Record], out: Path) -> int:
    """Write the records to another table; gives their number."""
    from qvsplit.output.table import Table

    _check_free(out)
    with Table(out) as other:
        for record in records:
            other.put(record)
    return len(records)


def _check_free(out: Path) -> None:
    """UsageError if something would be lost."""
    if os.path.lexists(out) and (not out.is_file() or out.stat().st_size):
        raise UsageError(f"--out {out} exists; remove it, or choose another name")


@contextmanager
def _output(out: Path | None) -> Iterator[None]:
    """Have what is printed go to `out`, whole or not at all; to stdout without."""
    from qvsplit.runtime.atomic_files import disk_errors, written_whole

    if out is None:
        yield
        return
    _check_free(out)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no folder at {out.parent}")
    with disk_errors(out, "the table is as it was"), written_whole(Path(os.path.realpath(out))) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", write_through=True)
        with redirect_stdout(text):
            yield
        text.detach()
