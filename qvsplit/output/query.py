"""Queries over a wide table: a small grammar, parsed by hand, answered by DuckDB.

    query      = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" query ")" | comparison
    comparison = name ( "=" | "!=" | "<" | "<=" | ">" | ">=" ) value
    name       = word | quoted
    value      = word | quoted

docs/finding.md is the contract. Raw SQL could read any file, so none of the user's words becomes SQL: a name chooses a
column, which has a number there, and a value is a parameter. The database has no access to anything outside it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from qvsplit.errors import UsageError
from qvsplit.output.levels import UNSURE, VERDICTS
from qvsplit.output.table import Record
from qvsplit.output.wide import ITEM_COLUMNS, SCORE, newest_runs
from qvsplit.runtime.names import typed_name

if TYPE_CHECKING:
    import pyarrow as pa

OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
KEYWORDS = ("and", "or", "not")
MOST_NESTED = 100  # parentheses and `not`s within each other
MOST_SHOWN = 30  # characters of a query on either side of the place where it is wrong
_NAMES_OF_FILES = ("root", "path")  # compared as they are written; all other text regardless of case
_KINDS = ("image", "video")
_TOKEN = re.compile(r"""\s*(?:(?P<mark>[()]|!=|<=|>=|[=<>])|(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*")|"""
                    r"""(?P<word>[^\s()=<>!'"]+))""")  # fmt: skip
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Comparison:
    """`name operator value`, and where in the query name and value stand."""

    name: str
    operator: str
    value: str
    name_at: int = field(default=0, compare=False)
    value_at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Not:
    """`not term`."""

    term: Query


@dataclass(frozen=True)
class AllOf:
    """Terms with `and` between them."""

    terms: tuple[Query, ...]


@dataclass(frozen=True)
class AnyOf:
    """Terms with `or` between them."""

    terms: tuple[Query, ...]


Query: TypeAlias = Comparison | Not | AllOf | AnyOf


# ---------------------------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True)
class _Token:
    kind: str  # mark, word, quoted or end
    text: str
    at: int

    def is_keyword(self, keyword: str) -> bool:
        return self.kind == "word" and self.text.lower() == keyword


def parse(text: str) -> Query:
    """Give what `text` says. UsageError, which points at the place, where it says nothing by the grammar."""
    parser = _Parser(text)
    query = parser.any_of(0)
    if parser.next.kind != "end":
        raise error_at(text, parser.next.at, "expected `and`, `or` or the end")
    return query


def error_at(text: str, at: int, what: str) -> UsageError:
    """Give the error that says `what` is wrong at this place of the query."""
    before, behind = text[:at].rstrip() + " " if text[:at].strip() else "", text[at:]
    shown = f"…{before[-MOST_SHOWN:]}" if len(before) > MOST_SHOWN else before
    shown += "^" + (f"{behind[:MOST_SHOWN]}…" if len(behind) > MOST_SHOWN else behind)
    return UsageError(f"find: {what}: {shown}")


def _tokens(text: str) -> list[_Token]:
    tokens, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            closed = "the quote is not closed" if text[at] in "'\"" else f"{text[at]} means nothing here"
            raise error_at(text, at, closed)
        kind = str(match.lastgroup)
        word = match[kind]
        if kind == "quoted":
            word = word[1:-1].replace(word[0] * 2, word[0])
        tokens.append(_Token(kind, word, match.start(kind)))
        at = match.end()
    return [*tokens, _Token("end", "", len(text))]


class _Parser:
    """Recursive descent, one method a rule of the grammar; `next` is the token in hand."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = iter(_tokens(text))
        self.next = next(self._tokens)

    def any_of(self, depth: int) -> Query:
        return self._joined("or", self._all_of, AnyOf, depth)

    def _all_of(self, depth: int) -> Query:
        return self._joined("and", self._one, AllOf, depth)

    def _joined(
        self, keyword: str, rule: Callable[[int], Query], of: Callable[[tuple[Query, ...]], Query], depth: int
    ) -> Query:
        terms = [rule(depth)]
        while self.next.is_keyword(keyword):
            self._take()
            terms.append(rule(depth))
        return terms[0] if len(terms) == 1 else of(tuple(terms))

    def _one(self, depth: int) -> Query:
        if depth > MOST_NESTED:
            raise error_at(self._text, self.next.at, f"nested more than {MOST_NESTED} times")
        if self.next.is_keyword("not"):
            self._take()
            return Not(self._one(depth + 1))
        if self._is_mark("("):
            opened = self._take()
            query = self.any_of(depth + 1)
            if not self._is_mark(")"):
                wanted = "this ( is not closed" if self.next.kind == "end" else "expected `and`, `or` or )"
                raise error_at(self._text, opened.at if self.next.kind == "end" else self.next.at, wanted)
            self._take()
            return query
        return self._comparison()

    def _comparison(self) -> Query:
        name = self._operand("a name")
        if self.next.kind != "mark" or self.next.text not in OPERATORS:
            raise error_at(self._text, self.next.at, f"expected one of {' '.join(OPERATORS)} after {name.text}")
        operator = self._take().text
        value = self._operand(f"a value after {operator}")
        return Comparison(name.text, operator, value.text, name.at, value.at)

    def _operand(self, what: str) -> _Token:
        is_keyword = any(map(self.next.is_keyword, KEYWORDS))
        if self.next.kind not in ("word", "quoted") or is_keyword:
            quoted = f" (`{self.next.text}` itself is written in quotes)" if is_keyword else ""
            raise error_at(self._text, self.next.at, f"expected {what}{quoted}")
        return self._take()

    def _is_mark(self, mark: str) -> bool:
        return self.next.kind == "mark" and self.next.text == mark

    def _take(self) -> _Token:
        taken = self.next
        if taken.kind != "end":
            self.next = next(self._tokens)
        return taken


# ---------------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Column:
    """A column of the wide table.

    Attributes:
        name: As the table has it.
        number: Which column of the table it is.
        kind: `number`, `name` (of a file), `text`, or `check`, the answers to a question with choices.
        choices: What its answers can be, where that is known; else empty.
    """

    name: str
    number: int
    kind: str
    choices: tuple[str, ...] = ()


def choices_of(records: Sequence[Record], runs: Mapping[str, str] | None = None) -> dict[str, tuple[str, ...]]:
    """Give the choices of each check, as the answers of its run in `runs`, by default the newest, have them."""
    runs = newest_runs(records) if runs is None else runs
    choices: dict[str, dict[str, None]] = {}
    for record in records:
        if record["choices"] is not None and record["run"] == runs.get(record["id"]):
            choices.setdefault(record["id"], {}).update(dict.fromkeys(one["choice"] for one in record["choices"]))
    return {name: tuple(of_name) for name, of_name in choices.items()}


def columns_of(table: pa.Table, choices: Mapping[str, Sequence[str]]) -> list[Column]:
    """Give the columns of a wide table; `choices` has those of checks that are known, by name."""
    import pyarrow as pa

    known = {"verdict": tuple(VERDICTS), "kind": _KINDS} | {
        name: (*given, UNSURE) for name, given in choices.items() if name not in ITEM_COLUMNS
    }
    columns = []
    for number, column in enumerate(table.schema):
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            kind = "number"
        elif column.name in _NAMES_OF_FILES:
            kind = "name"
        else:
            kind = "check" if column.name not in ITEM_COLUMNS and column.name + SCORE in table.column_names else "text"
        columns.append(Column(column.name, number, kind, known.get(column.name, ())))
    return columns


def captions_of(columns: Sequence[Column]) -> list[str]:
    """Give the names of the questions without choices."""
    return [column.name for column in columns if column.kind == "text" and column.name not in ITEM_COLUMNS]


def checks_of(columns: Sequence[Column]) -> list[str]:
    """Give the names of the questions with choices."""
    return [column.name for column in columns if column.kind == "check"]


def _column(text: str, comparison: Comparison, columns: Sequence[Column]) -> Column:
    """Find the column that a comparison names: exactly, or regardless of case where only one is that."""
    name = comparison.name
    by_case = [column for column in columns if column.name == name]
    found = by_case or [column for column in columns if column.name.lower() == name.lower()]
    if len(found) == 1:
        return found[0]
    names = [column.name for column in columns]
    questions = [*captions_of(columns), *checks_of(columns)]
    known = [name for name in names if name in questions] + [name for name in ITEM_COLUMNS if name in names]
    if found:
        hint = "which of " + " and ".join(column.name for column in found)
    else:
        near = difflib.get_close_matches(name.lower(), [one.lower() for one in names], 1)
        meant = [one for one in names if one.lower() in near]
        hint = f"did you mean {meant[0]}?" if meant else "a name with blanks is written in quotes"
    scores = f"; and NAME{SCORE} of each with choices" if checks_of(columns) else ""
    raise error_at(
        text, comparison.name_at, f"there is no column {name} ({hint}; there are {', '.join(known)}{scores})"
    )


# ------------------------------------------------------------------------------------------------------- to DuckDB


@dataclass(frozen=True)
class Found:
    """What a query found.

    Attributes:
        rows: Of the wide table, in the order of root, path and part.
        names: The columns that the query names, in its order.
        others: The rows that it did not find.
        notes: What a user should know of the query: comparisons that no answer can fulfil.
        columns: Those of the table.
    """

    rows: list[dict[str, Any]]
    names: list[str]
    others: list[dict[str, Any]]
    notes: list[str]
    columns: list[Column]


def find(table: pa.Table, text: str, choices: Mapping[str, Sequence[str]]) -> Found:
    """Find the rows of a wide table that the query `text` is true of. UsageError for one that means nothing."""
    query = parse(text)
    columns = columns_of(table, choices)
    statement = _Statement(text, columns)
    condition = statement.condition(query)
    numbers = _matching(table, condition, statement.parameters)
    rows = [{"": number} | row for number, row in enumerate(table.to_pylist())]
    rows.sort(key=lambda row: (row["root"], row["path"], row["part"] or 0))
    found: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for row in rows:
        (found if row.pop("") in numbers else others).append(row)
    names, notes = (list(dict.fromkeys(noted)) for noted in (statement.names, statement.notes))
    return Found(found, names, others, notes, columns)


def _matching(table: pa.Table, condition: str, parameters: Sequence[Any]) -> set[int]:
    """Give the numbers of the rows for which the condition is true."""
    import duckdb
    import pyarrow as pa

    columns = [*table.columns, pa.array(range(len(table)), pa.int64())]
    items = pa.table(columns, names=[f"c{number}" for number in range(len(columns))])
    closed = {
        "enable_external_access": "false", "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false", "lock_configuration": "true",
    }  # fmt: skip
    with duckdb.connect(":memory:", config=closed) as connection:
        connection.register("items", items)
        found = connection.execute(f"SELECT c{len(columns) - 1} FROM items WHERE {condition}", list(parameters))
        return {row[0] for row in found.fetchall()}


class _Statement:
    """A query as a condition of SQL with parameters.

    NULL is unknown, as SQL has it: a comparison with it is not true, nor is its negation.
    """

    def __init__(self, text: str, columns: Sequence[Column]) -> None:
        self._text = text
        self._columns = columns
        self.parameters: list[Any] = []
        self.names: list[str] = []
        self.notes: list[str] = []

    def condition(self, query: Query) -> str:
        match query:
            case Not(term):
                return f"(NOT {self.condition(term)})"
            case AllOf(terms):
                return "(" + " AND ".join(map(self.condition, terms)) + ")"
            case AnyOf(terms):
                return "(" + " OR ".join(map(self.condition, terms)) + ")"
            case Comparison():
                return self._comparison(query)

    def _comparison(self, comparison: Comparison) -> str:
        column = _column(self._text, comparison, self._columns)
        self.names.append(column.name)
        side = f"c{column.number}"
        if column.kind == "number" or comparison.operator not in ("=", "!="):
            self.parameters.append(self._number(comparison, column))
            if column.kind != "number":  # what is no number, infinite or NaN is neither more nor less
                cast = f"TRY_CAST({side} AS DOUBLE)"
                side = f"(CASE WHEN isfinite({cast}) THEN {cast} END)"
            return f"({side} {_sql(comparison.operator)} ?)"
        if column.kind == "name":
            self.parameters.append(typed_name(comparison.value))
            return f"({side} {_sql(comparison.operator)} ?)"
        self._note(comparison, column)
        self.parameters.append(comparison.value)
        side = _folded(side)
        if column.kind == "check" and comparison.value.lower() != UNSURE:
            side = f"nullif({side}, '{UNSURE}')"  # not known: neither the value nor another
        return f"({side} {_sql(comparison.operator)} {_folded('?::VARCHAR')})"

    def _number(self, comparison: Comparison, column: Column) -> float:
        number = float(comparison.value) if _NUMBER.fullmatch(comparison.value) else math.nan
        if not math.isfinite(number):
            why = f"{column.name} is a number" if column.kind == "number" else f"{comparison.operator} compares numbers"
            raise error_at(self._text, comparison.value_at, f"{why}; expected one")
        return number

    def _note(self, comparison: Comparison, column: Column) -> None:
        """Note a value that no answer can have."""
        lowered = [choice.lower() for choice in column.choices]
        if not lowered or comparison.value.lower() in lowered:
            return
        near = difflib.get_close_matches(comparison.value.lower(), lowered, 1)
        hint = f" (did you mean {column.choices[lowered.index(near[0])]}?)" if near else ""
        self.notes.append(f"{column.name} is never {comparison.value}{hint}: it is one of {', '.join(column.choices)}")


def _folded(expression: str) -> str:
    """Give text regardless of case, and of how accents are encoded."""
    return f"lower(nfc_normalize({expression}))"


def _sql(operator: str) -> str:
    return "<>" if operator == "!=" else operator
