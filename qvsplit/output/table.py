"""Answers as a table: one record an answer, in a Parquet, CSV or JSON Lines file that any reader opens.

While questions are asked, every record goes to a journal beside the file first, so that a killed run loses no answer
that was finished; at the end, and after an interruption, the file is written anew and put in place whole. A record is
found again by what decided it: the bytes of the items, which part of each, the prompt, the extraction config and the
model. Needs no torch.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qvsplit.errors import StoreDamaged, StoreInUse, UsageError
from qvsplit.runtime import interrupts
from qvsplit.runtime.atomic_files import disk_errors, sync_folder, written_whole

Record = dict[str, Any]
_Place = tuple[str, str, tuple[int, ...], str]

# Column and kind. `json` is a list or an object: itself in JSON Lines, JSON text elsewhere, but for Parquet's tokens.
COLUMNS: Mapping[str, str] = {
    "root": "text", "path": "text", "sha256": "text", "kind": "text", "part": "int", "start": "float", "end": "float",
    "items": "json", "id": "text", "question": "text", "answer": "text", "reasoning": "text", "probability": "float",
    "flagged": "bool", "level": "text", "probabilities": "json", "logprobs": "json", "choice_mass": "float",
    "tokens": "json", "prompt_tokens": "int", "finish_reason": "text", "error": "text", "config": "text",
    "prompt_hash": "text", "model": "text", "weights": "text", "dtype": "text", "encoder_check": "text",
    "time": "text",
}  # fmt: skip
_ADDED = ("kind", "part", "start", "end", "items", "reasoning")  # columns that tables of before lack
NO_ANSWER = ("skipped", "error")  # finish reasons of records that answer nothing
FORMATS = (".parquet", ".csv", ".jsonl")
SYNC_SECONDS = 5
MAX_FIELD = 1 << 30  # characters in a cell; the csv module's own limit is below the tokens of a long answer
_REQUIRED = ("root", "path", "sha256", "id", "question", "finish_reason", "config", "prompt_hash", "weights")


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

    Records are the newest by (root, path, part, id), in the order in which they first came. UsageError for a file that
    is no such table, StoreInUse while another process has it open, StoreDamaged for a journal that was tampered with,
    DiskError where nothing can be written.
    """

    def __init__(self, file: Path) -> None:
        if file.suffix.lower() not in FORMATS:
            raise UsageError(f"`out` {file}: the name must end in {', '.join(FORMATS)}")
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

    def put(self, record: Record) -> None:
        """Add `record`, over an older one of its root, path, part and id; one that says the same is left as it is.

        From here on it survives a killed process; a power cut may cost the last seconds' records.
        """
        old = self._records.get(_place(record))
        if old is not None and {**old, "time": None} == {**record, "time": None}:
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
    return record["root"], record["path"], _parts(record), record["id"]


def _parts(record: Record) -> tuple[int, ...]:
    """Give the part of each item; none where all are 0, as in tables of before."""
    if (items := record.get("items")) is not None:
        return key_parts([item["part"] for item in items])
    return key_parts([record.get("part") or 0])


def key_parts(parts: Sequence[int]) -> tuple[int, ...]:
    """Give `Key.parts` of these."""
    return tuple(parts) if any(parts) else ()


# -------------------------------------------------------------------------------------------------------- journal


def _locked(journal: Path) -> IO[bytes]:
    """The journal, open and ours alone; StoreInUse if another process has it. The lock ends with the process."""
    csv.field_size_limit(MAX_FIELD)
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
        except ValueError as error:
            raise StoreDamaged(f"{journal} is damaged ({error}); remove it and run again") from None
        sound += len(line)
    stream.truncate(sound)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=True, allow_nan=True).encode() + b"\n"


# -------------------------------------------------------------------------------------------------------- formats


def _read(file: Path) -> Iterator[Record]:
    try:
        with _disk_errors(file):
            rows = list(
                {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}[file.suffix.lower()](file)
            )
        for row in rows:
            yield _checked(row)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(
            f"`out` {file} is there and is no table of qvsplit's answers ({error}); choose another name"
        ) from None


def _checked(row: Any) -> Record:
    """ValueError unless `row` is a record."""
    if not isinstance(row, dict):
        raise ValueError("a line is no record")
    missing = [name for name in _REQUIRED if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(f"without {missing[0]}")
    record = {name: row.get(name) for name in COLUMNS}
    wrong = [name for name, kind in COLUMNS.items() if not _is_of_kind(record[name], kind)]
    wrong += [] if _are_items(record["items"]) else ["items"]
    if wrong or (record["finish_reason"] == "scored" and not _are_logprobs(record["logprobs"])):
        raise ValueError(f"its {wrong[0] if wrong else 'logprobs'} is of the wrong kind")
    return record


def _is_of_kind(value: Any, kind: str) -> bool:
    kinds: Mapping[str, tuple[type, ...]] = {
        "text": (str,), "float": (int, float), "int": (int,), "bool": (bool,), "json": (list, dict)
    }  # fmt: skip
    return value is None or (isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool)))


def _are_logprobs(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, int | float) for one in value.values())


def _are_items(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(one, dict) and type(one.get("part")) is int for one in value)
    )


def _check_columns(names: list[str]) -> None:
    """ValueError unless a table with these columns may be ours, were it empty."""
    missing = [name for name in COLUMNS if name not in names and name not in _ADDED]
    if missing:
        raise ValueError(f"without {missing[0]}")


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
        yield {name: json.loads(v) if _is_text(name) and v is not None else v for name, v in row.items()}


def _read_csv(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        _check_columns(list(rows.fieldnames or ()))
        for row in rows:
            record = {name: _parsed(text, COLUMNS.get(name, "text")) for name, text in row.items()}
            if record.get("answer") is None and record.get("finish_reason") not in NO_ANSWER:
                record["answer"] = ""  # CSV knows no difference between nothing and an empty text
            yield record


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _parsed(text: str | None, kind: str) -> Any:
    if not text:
        return None
    parse: Mapping[str, Callable[[str], Any]] = {
        "int": int, "float": float, "json": json.loads, "bool": lambda word: {"true": True, "false": False}[word],
    }  # fmt: skip
    return parse.get(kind, str)(text)


def _is_text(column: str) -> bool:
    """Whether Parquet holds this column's lists and objects as JSON text."""
    return COLUMNS.get(column) == "json" and column != "tokens"


def _write(file: Path, records: list[Record]) -> None:
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[file.suffix.lower()]
    with written_whole(file) as stream:
        write(stream, records)


def _write_parquet(stream: IO[bytes], records: list[Record]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"text": pa.string(), "json": pa.string(), "int": pa.int32(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [(name, pa.list_(pa.int32()) if name == "tokens" else types[kind]) for name, kind in COLUMNS.items()]
    columns = {
        name: [_json(r[name]) if _is_text(name) else r[name] for r in records] for name in COLUMNS
    }  # fmt: skip
    pq.write_table(pa.table(columns, pa.schema(fields)), stream, compression="zstd")


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
        stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _cell(value: Any, kind: str) -> Any:
    if value is None:
        return ""
    if kind == "json":
        return _json(value)
    return str(value).lower() if kind == "bool" else value


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _disk_errors(file: Path) -> AbstractContextManager[None]:
    return disk_errors(file, "every answer that was finished is kept")
