"""Answers as a table: one record an answer, in a Parquet, CSV or JSON Lines file that any reader opens.

While questions are asked, every record goes to a journal beside the file first, so that a killed run loses no answer
that was finished; at the end, and after an interruption, the file is written anew and put in place whole. A record is
found again by what decided it: the bytes of the items, which part of each, the prompt, the extraction config and the
model. The columns are a contract: docs/tables.md. Needs no torch.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from qvsplit.errors import StoreDamaged, StoreInUse, UsageError, some_of
from qvsplit.output import spreadsheets
from qvsplit.runtime import interrupts
from qvsplit.runtime.atomic_files import disk_errors, sync_folder, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]
_Place = tuple[str, str, tuple[int, ...], str, str]

# Column and kind. `tokens`, and the lists of objects in `LISTS`, are JSON text in CSV; Times are text but in Parquet.
COLUMNS: Mapping[str, str] = {
    "root": "text", "path": "text", "kind": "text", "part": "int", "start": "float", "end": "float", "sha256": "text",
    "items": "items", "run": "text", "id": "text", "question": "text", "answer": "text", "reasoning": "text",
    "verdict": "text", "score": "float", "choice": "text", "choice_probability": "float", "choice_form": "text",
    "choice_mass": "float", "flagged": "bool", "level": "text", "choices": "choices", "tokens": "tokens",
    "prompt_tokens": "int", "finish_reason": "text", "error": "text", "config": "text", "prompt_hash": "text",
    "model": "text", "weights": "text", "dtype": "text", "encoder_check": "text", "time": "time",
    "asked": "time",
}  # fmt: skip
LISTS: Mapping[str, Mapping[str, str]] = {
    "items": {"root": "text", "path": "text", "kind": "text", "part": "int", "start": "float", "end": "float"},
    "choices": {"choice": "text", "form": "text", "probability": "float", "logprob": "float"},
}  # fmt: skip
TIMES = tuple(name for name, kind in COLUMNS.items() if kind == "time")
_IN_JSON = ("tokens", *LISTS)
NO_ANSWER = ("skipped", "error")  # finish reasons of records that answer nothing
FORMATS = (".parquet", ".csv", ".jsonl")
SYNC_SECONDS = 5
MAX_FIELD = 1 << 30  # characters in a cell; the csv module's own limit is below the tokens of a long answer
_REQUIRED = (
    "root", "path", "sha256", "run", "id", "question", "finish_reason", "config", "prompt_hash", "weights", "time",
    "asked",
)  # fmt: skip
_NO_TIMES = {"time": None, "asked": None}
_SMALLEST, _LARGEST = -(1 << 31), (1 << 31) - 1  # of Parquet's int32


@dataclass(frozen=True)
class Key:
    """What decides an answer: which bytes, prompt, extraction config, weights, dtype and parts of videos.

    `parts` has one an item; it is empty where all are 0.
    """

    sha256: str
    prompt_hash: str
    config: str
    weights: str
    dtype: str | None
    parts: tuple[int, ...] = ()


class Table:
    """The answers in one file, open for reading and adding. Use it in a `with` block: the end writes the file.

    Records are the newest by (root, path, part, id, run), in the order in which they first came. UsageError for a file
    that is no such table, StoreInUse while another process has it open, StoreDamaged for a journal that was tampered
    with, DiskError where nothing can be written.
    """

    def __init__(self, file: Path) -> None:
        _check_name(file)
        if file.is_dir():
            raise UsageError(f"`out` {file} is a folder; name a file in it")
        if not file.parent.is_dir():
            raise UsageError(f"`out` {file}: no folder at {file.parent}")
        self.file = file = Path(os.path.realpath(file))
        self.journal = file.with_name(f".{file.name}.journal")
        self._records: dict[_Place, Record] = {}
        self._known: dict[Key, Record] = {}
        self._changed = False
        self._stream: IO[bytes] | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Table:
        with _disk_errors(self.file):
            self._stream = _locked(self.journal)
        try:
            existed = self.file.exists() and self.file.stat().st_size > 0
            for record in _read(self.file) if existed else ():
                self._add(record)
            for record in _read_journal(self._stream, self.journal):
                self._add(record)
                self._changed = True
            self._changed |= not existed
        except BaseException:
            with self._stream, suppress(OSError):
                if os.fstat(self._stream.fileno()).st_size == 0:
                    self.journal.unlink()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file in place. Where that fails the journal stays, and the next run takes it up."""
        assert self._stream is not None
        with interrupts.held_back(), _disk_errors(self.file), self._stream:
            if self._changed and (self._records or kind is None):
                _write(self.file, list(self._records.values()))
            self.journal.unlink()

    def __len__(self) -> int:
        """Records."""
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        """The records, in order."""
        return iter(self._records.values())

    def find(self, key: Key) -> Record | None:
        """The newest record that `key` decided, whatever item's name and id it stands under."""
        return self._known.get(key)

    def put(self, record: Record, *, again: bool = False) -> None:
        """Add `record`, over an older one of its root, path, part, id and run; one that says the same is left as it is.

        Not so with `again`, for one whose run is asked after another: it becomes the newest by its `asked`.

        From here on it survives a killed process; a power cut may cost the last seconds' records.
        """
        old = self._records.get(_place(record))
        is_known = old is not None and old | _NO_TIMES == record | _NO_TIMES
        if old is not None and is_known and not (again and old["asked"] < record["asked"]):
            return
        assert self._stream is not None
        with _disk_errors(self.file):
            self._stream.write(_line(record))
            self._stream.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()
        self._add(record)
        self._changed = True

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop the records that `wanted` denies."""
        left = {place: record for place, record in self._records.items() if wanted(record)}
        self._changed |= len(left) < len(self._records)
        self._records = left

    def _add(self, record: Record) -> None:
        self._records[_place(record)] = record
        decided = {name: record[name] for name in ("sha256", "prompt_hash", "config", "weights", "dtype")}
        key = Key(**decided, parts=_parts(record))
        if record["finish_reason"] not in NO_ANSWER:
            self._known[key] = record


def _place(record: Record) -> _Place:
    return record["root"], record["path"], _parts(record), record["id"], record["run"]


def _parts(record: Record) -> tuple[int, ...]:
    """Give the part of each item; none where all are 0."""
    if (items := record.get("items")) is not None:
        return key_parts([item["part"] for item in items])
    return key_parts([record.get("part") or 0])


def key_parts(parts: Sequence[int]) -> tuple[int, ...]:
    """Give `Key.parts` of these."""
    return tuple(parts) if any(parts) else ()


def read_records(file: Path) -> list[Record]:
    """Give the records of a table as its last run left it; also while another run adds to it. Writes nothing.

    UsageError where there is no file, or one that is no such table.
    """
    _check_name(file)
    if not file.is_file():
        raise UsageError(f"no table of answers at {file}; make one with `qvsplit ask` and `out={file}`")
    return list(_read(file)) if file.stat().st_size else []


def _check_name(file: Path) -> None:
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"the table {file}: its name must end in {', '.join(FORMATS)}")


# -------------------------------------------------------------------------------------------------------- journal


def _locked(journal: Path) -> IO[bytes]:
    """The journal, open and ours alone; StoreInUse if another process has it. The lock ends with the process."""
    while True:
        stream = open(journal, "a+b")  # noqa: SIM115 - it stays open
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise StoreInUse(f"{journal.name[1:-8]} is being written by another run; wait for it") from None
        try:
            if os.fstat(stream.fileno()).st_ino == journal.stat().st_ino:
                sync_folder(journal.parent)
                return stream
        except FileNotFoundError:
            pass
        stream.close()  # its owner has just finished and removed it: once more, with a new one


def _read_journal(stream: IO[bytes], journal: Path) -> Iterator[Record]:
    """What a killed run had finished; its last line may be torn, and is cut off."""
    stream.seek(0)
    sound = 0
    for line in stream.read().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            yield _checked(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise StoreDamaged(f"{journal} is damaged ({error}); remove it and run again") from None
        sound += len(line)
    stream.truncate(sound)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"


# -------------------------------------------------------------------------------------------------------- formats


def _read(file: Path) -> Iterator[Record]:
    try:
        with _disk_errors(file):
            rows = list(
                {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}[file.suffix.lower()](file)
            )
        for row in rows:
            yield _checked(row)
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise UsageError(
            f"{file} is there and is no table of this version's answers ({error}); choose another name"
        ) from None


def _checked(row: Any) -> Record:
    """ValueError unless `row` is a record."""
    if not isinstance(row, dict):
        raise ValueError("a line is no record")
    _check_columns(list(row))
    missing = [name for name in _REQUIRED if not isinstance(row[name], str)]
    if missing:
        raise ValueError(f"without {missing[0]}")
    record = {name: row[name] for name in COLUMNS}
    wrong = [name for name, kind in COLUMNS.items() if not _is_of_kind(record[name], kind)]
    wrong += ["choices"] if record["finish_reason"] == "scored" and not record["choices"] else []
    if wrong:
        raise ValueError(f"its {wrong[0]} is of the wrong kind")
    return record | {name: _time_text(_time(record[name])) for name in TIMES}


def _is_of_kind(value: Any, kind: str) -> bool:
    if value is None:
        return True
    if kind in ("text", "bool"):
        return isinstance(value, str if kind == "text" else bool)
    if kind == "int":
        return type(value) is int and _SMALLEST <= value <= _LARGEST
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind == "time":
        return isinstance(value, str) and _is_time(value)
    if kind == "tokens":
        return isinstance(value, list) and all(_is_of_kind(one, "int") and one is not None for one in value)
    return isinstance(value, list) and all(_is_object(one, kind) for one in value)


def _is_object(value: Any, of: str) -> bool:
    """Whether `value` is an object of the list `of`; its first field, and an item's part, are never null."""
    fields = LISTS[of]
    if not isinstance(value, dict) or value.keys() != fields.keys():
        return False
    never_null = (next(iter(fields)), "part" if of == "items" else None)
    return all(
        _is_of_kind(one, fields[name]) and not (one is None and name in never_null) for name, one in value.items()
    )


def _is_time(text: str) -> bool:
    try:
        return bool(_time(text))
    except (ValueError, OverflowError):
        return False


def _time(text: str) -> datetime:
    """ValueError for a text that is no time, or one of no zone."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("its time has no zone")
    return moment.astimezone(UTC)


def _time_text(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now() -> str:
    """Give the time as records have it."""
    return _time_text(datetime.now(UTC))


def _check_columns(names: list[str]) -> None:
    """ValueError unless these are exactly our columns, in whatever order."""
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"it lacks the column {some_of(missing, 3)}")
    if more := [str(name) for name in names if name not in COLUMNS]:
        raise ValueError(f"it has the column {some_of(more, 3)}, which is none of them")


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(os.fsencode(file)) as source:
            table = pq.read_table(source)
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    _check_columns(table.column_names)
    for row in table.to_pylist():
        moments = {name: row[name] for name in TIMES}
        yield row | {
            name: _time_text(moment.astimezone(UTC)) if isinstance(moment, datetime) else moment
            for name, moment in moments.items()
        }


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD)
    names, rows = spreadsheets.read_rows(file, COLUMNS)
    _check_columns(names)
    for row in rows:
        record = {name: _parsed(text, COLUMNS.get(name, "text")) for name, text in row.items()}
        if record.get("answer") is None and record.get("finish_reason") not in NO_ANSWER:
            record["answer"] = ""  # CSV knows no difference between nothing and an empty text
        yield record | {"sha256": record.get("sha256") or ""}  # empty for a file that could not be read


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _parsed(text: str | None, kind: str) -> Any:
    if not text:
        return None
    parse: Mapping[str, Callable[[str], Any]] = {
        "text": spreadsheets.from_cell, "int": int, "float": spreadsheets.number, "bool": spreadsheets.truth,
        **dict.fromkeys(_IN_JSON, json.loads),
    }  # fmt: skip
    return parse.get(kind, str)(text)


def _write(file: Path, records: list[Record]) -> None:
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[file.suffix.lower()]
    with written_whole(file) as stream:
        write(stream, records)


def _write_parquet(stream: IO[bytes], records: list[Record]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [record[name] for record in records] for name in COLUMNS}
    columns |= {name: [_time(text) for text in columns[name]] for name in TIMES}
    pq.write_table(pa.table(columns, _parquet_schema()), stream, compression="zstd")


def _parquet_schema() -> pa.Schema:
    import pyarrow as pa

    types = {
        "text": pa.string(), "int": pa.int32(), "float": pa.float64(), "bool": pa.bool_(),
        "tokens": pa.list_(pa.int32()), "time": pa.timestamp("us", tz="UTC"),
    }  # fmt: skip
    for name, fields in LISTS.items():
        types[name] = pa.list_(pa.struct([(field, types[kind]) for field, kind in fields.items()]))
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])


def _write_csv(stream: IO[bytes], records: list[Record]) -> None:
    import io

    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for record in records:
        writer.writerow([_cell(record[name], kind) for name, kind in COLUMNS.items()])
    text.detach()


def _write_jsonl(stream: IO[bytes], records: list[Record]) -> None:
    for record in records:
        whole = {name: record[name] for name in COLUMNS}
        stream.write(json.dumps(whole, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _cell(value: Any, kind: str) -> Any:
    if value is None:
        return ""
    if kind in _IN_JSON:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    if kind == "text":
        return spreadsheets.as_cell(value)
    return str(value).lower() if kind == "bool" else value


def _disk_errors(file: Path) -> AbstractContextManager[None]:
    return disk_errors(file, "every answer that was finished is kept")
