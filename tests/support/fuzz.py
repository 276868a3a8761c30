"""Fuzz the shard reader: hostile files, which it must refuse, or read without a wrong value.

    python -m tests.support.fuzz [--cases 100000] [--seed 0]
    python -m tests.support.fuzz --lies  every lie and bomb by name, one JSON object a line

Each case starts from a small valid shard and changes it, in one of these kinds:

    flip, run, insert, delete, truncate, extend, splice   bytes anywhere, the footer checksum left as it was
    page, page header                                     the same within pages, which only their CRC guards
    footer bytes, footer fields, page fields, page body   hostile bytes whose checksum and CRC were computed anew
    written                                               what pyarrow itself writes with wrong content, checksum added
    lie, newer, odd, forged, bomb                         those of `--lies`, each once

Whatever comes, reading to the end must give a StoreDamaged or ConfigError that names the file, or rows: where the
checksum was left alone exactly those of an original, otherwise such as keep every promise of docs/format.md. Never
another exception, a dead process, ten seconds, or a gigabyte. The reader therefore runs in a child under limits, which
is started again when it dies. Bytes of failures are kept in build/fuzz/. Last line: one JSON object; exit 1 if any
case failed.
"""

from __future__ import annotations

import argparse
import base64
import copy
import functools
import io
import json
import math
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qvsplit.errors import ERROR_KINDS, QvsplitError
from qvsplit.runtime.dtypes import token_bytes
from qvsplit.store.features import Features, StoredTensor
from qvsplit.store.footer import CHECKSUM_BYTES, MAGIC, insert_checksum
from qvsplit.store.row import KINDS, STATUSES, Row
from qvsplit.store.schema import METADATA_KEY, ShardSchema
from qvsplit.store.shard_reader import Shard
from qvsplit.store.shard_writer import ShardWriter
from qvsplit.store.storage import LocalStorage
from tests.support import rows

SECONDS = 10.0
MEMORY = 1 << 30
REFUSED = {4, 6}  # exit codes of ConfigError and StoreDamaged
WIDTH = 8
FILE = "shard-000001.parquet"
KEPT = Path(__file__).resolve().parents[2] / "build" / "fuzz"
LEVEL = "deepstack_features_1"
I32, I64 = 2**31 - 1, 2**63 - 1

Content = list[tuple[Row, dict[str, bytes] | None]]  # of a shard: its rows, each with the bytes of its features


# ---------------------------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True)
class Seed:
    """A valid shard: its bytes, and what reading it gives."""

    data: bytes
    content: Content
    schema: ShardSchema


def _row(name: str, tokens: int, **changes: Any) -> Row:
    return rows.row(name, tokens, **({"version": None} | changes))


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """Give shards of every sort: dtypes, levels, rows without features, several row groups, no row at all."""
    failed, deleted = rows.failed("b.png"), rows.deleted("c.png")
    names = ("a.png", "f/ü 猫.png", "//xff.png", "d.jpg", "e.jpg", "g.jpg")
    video: dict[str, Any] = {"kind": "video", "duration": 9.5, "media": '{"fps": 2}', "version": None}
    clips = [rows.part("ü.mp4", number, 3, 4 + 2 * number, **(video | {"duration": 4.5}))[0] for number in range(3)]
    return (
        _seed("bfloat16", [_row("a.png", 6), failed, _row("z.png", 6, has_features=False, sha256="5" * 64), deleted]),
        _seed("float32", [_row("a.png", 2), _row("ü 猫.mp4", 10, mtime_ns=None, **video), *clips]),
        _seed("float16", [_row(name, 2 * n + 2) for n, name in enumerate(names)], group_bytes=100),
        _seed("bfloat16", [_row(f"{n}.png", 4) for n in range(6)], group_bytes=60, first=7, levels=2),
        _seed("bfloat16", [failed, deleted]),
        _seed("float32", []),
        _seed("int8", [_row("a.png", 6), failed, _row("z.png", 4)]),
    )


def _seed(dtype: str, content: Sequence[Row], *, group_bytes: int = 0, first: int = 0, levels: int = 0) -> Seed:
    schema, kept = rows.schema(dtype, levels=levels, width=WIDTH), []
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(LocalStorage(Path(folder)), FILE, schema)
        waiting = 0
        for number, row in enumerate(content):
            features = None
            if row.has_features:
                features = rows.features(row.n_tokens or 0, dtype, first + number, levels=levels, width=WIDTH)
                waiting += features.tensors["pooler_output"].raw.nbytes
            writer.add(row, features)
            kept.append((row, rows.raws(features)))
            if group_bytes and waiting >= group_bytes:
                writer._flush()
                waiting = 0
        writer.finish()
        return Seed((Path(folder) / FILE).read_bytes(), kept, schema)


# --------------------------------------------------------------------------------------------------------- thrift

STOP, TRUE, FALSE, BYTE, I16_, I32_, I64_, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)
Fields = list[list[Any]]  # of a struct: [number, type, value]; a list is [type of its elements, [values]]


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _to_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return _to_varint(value << 1 if value >= 0 else (-value << 1) - 1)


def parse(data: bytes, at: int = 0) -> tuple[Fields, int]:
    """A struct of Thrift's compact protocol as a tree that may be altered, and where it ends."""
    fields: Fields = []
    number = 0
    while True:
        head = data[at]
        at += 1
        if head == STOP:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            raw, at = _varint(data, at)
            number = raw >> 1 ^ -(raw & 1)
        value, at = _parse_value(data, at, head & 15)
        fields.append([number, head & 15, value])


def _parse_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return data[at], at + 1
    if kind in (I16_, I32_, I64_):
        raw, at = _varint(data, at)
        return raw >> 1 ^ -(raw & 1), at
    if kind == DOUBLE:
        return data[at : at + 8], at + 8
    if kind == BINARY:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind in (LIST, SET):
        head, at = data[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(data, at)
        values = []
        for _ in range(count):
            value, at = _parse_value(data, at, BYTE if head & 15 in (TRUE, FALSE) else head & 15)
            values.append(value)
        return [head & 15, values], at
    if kind == STRUCT:
        return parse(data, at)
    raise ValueError(f"type {kind} has no place in Parquet")


def unparse(fields: Fields) -> bytes:
    """The inverse of `parse`, whatever was made of the tree."""
    out, last = [], 0
    for number, kind, value in fields:
        delta = number - last
        out.append(bytes([delta << 4 | kind]) if 0 < delta < 16 else bytes([kind]) + _zigzag(number))
        out.append(_unparse_value(kind, value))
        last = number
    return b"".join(out) + b"\0"


def _unparse_value(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([value & 255])
    if kind in (I16_, I32_, I64_):
        return _zigzag(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _to_varint(len(value)) + bytes(value)
    if kind in (LIST, SET):
        inner, values = value
        count = len(values)
        head = bytes([count << 4 | inner]) if count < 15 else bytes([0xF0 | inner]) + _to_varint(count)
        one = BYTE if inner in (TRUE, FALSE) else inner
        return head + b"".join(_unparse_value(one, each) for each in values)
    return value if isinstance(value, bytes) else unparse(value)  # bytes: the same struct many times over


def field(fields: Fields, number: int) -> Any:
    """The value of a field, None if it is not there."""
    return next((value for n, _, value in fields if n == number), None)


def put(fields: Fields, number: int, value: Any) -> None:
    """Replace the value of a field that is there."""
    for one in fields:
        if one[0] == number:
            one[2] = value


# -------------------------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Page:
    """Where one page of a shard lies."""

    group: int
    column: int
    start: int
    header: Fields
    body_at: int
    end: int


@dataclass(frozen=True)
class Anatomy:
    """Hold a shard taken apart: all before the footer checksum, the footer as a tree, the pages."""

    before: bytes
    footer: Fields
    pages: tuple[Page, ...]

    def page(self, column: str, group: int = 0) -> Page:
        """The first data page of a column."""
        number = next(
            n for n, one in enumerate(chunks(self.footer)[0]) if field(field(one, 3), 3)[1][0] == column.encode()
        )
        return next(p for p in self.pages if (p.group, p.column) == (group, number) and field(p.header, 1) != 2)


def chunks(footer: Fields) -> list[list[Fields]]:
    """The column chunks of each row group."""
    return [field(group, 1)[1] for group in field(footer, 4)[1]]


@functools.lru_cache(maxsize=16)
def anatomy(data: bytes) -> Anatomy:
    """Take a shard apart."""
    length = int.from_bytes(data[-8:-4], "little")
    footer, _ = parse(data[-8 - length : -8])
    pages = []
    for group, columns in enumerate(chunks(footer)):
        for column, chunk in enumerate(columns):
            meta = field(chunk, 3)
            at = min(n for n in (field(meta, 9), field(meta, 11)) if n)
            end = at + field(meta, 7)
            while at < end:
                header, body_at = parse(data, at)
                stop = body_at + field(header, 3)
                pages.append(Page(group, column, at, header, body_at, stop))
                at = stop
    return Anatomy(data[: -8 - length - CHECKSUM_BYTES], footer, tuple(pages))


def with_footer(before: bytes, footer: bytes) -> bytes:
    """Give a file of these pages and this footer, with the checksum that a writer would add."""
    return with_checksum(before + footer + len(footer).to_bytes(4, "little") + MAGIC)


def with_checksum(data: bytes) -> bytes:
    """Add a footer checksum to any Parquet file."""
    stream = io.BytesIO(data)
    insert_checksum(stream)
    return stream.getvalue()


def with_page(before: bytes, footer: Fields, page: Page, header: Fields, body: bytes) -> tuple[bytes, Fields]:
    """Another page in the place of `page`, its CRC and every offset and length in the footer put right."""
    header, footer = copy.deepcopy(header), copy.deepcopy(footer)
    put(header, 3, len(body))
    crc = zlib.crc32(body)
    put(header, 4, crc - (1 << 32) if crc >> 31 else crc)
    new = unparse(header) + body
    grown = len(new) - (page.end - page.start)
    more = (field(header, 2) or 0) - (field(page.header, 2) or 0)
    for group, columns in enumerate(chunks(footer)):
        for column, chunk in enumerate(columns):
            meta = field(chunk, 3)
            for number in (9, 10, 11):
                if (place := field(meta, number)) and place > page.start:
                    put(meta, number, place + grown)
            if (group, column) == (page.group, page.column):
                put(meta, 6, field(meta, 6) + more)
                put(meta, 7, field(meta, 7) + grown)
                of_group = field(footer, 4)[1][group]
                put(of_group, 2, field(of_group, 2) + more)
                put(of_group, 6, (field(of_group, 6) or 0) + grown)
    return before[: page.start] + new + before[page.end :], footer


# ------------------------------------------------------------------------------------------------------ mutations

_INTERESTING = (
    0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, 65537, 1 << 20, I32 - 1, I32, I32 + 1, -(1 << 31),
    (1 << 32) - 1, 1 << 32, 1 << 40, I64, -I64 - 1, 1 << 62,
)  # fmt: skip
_STRINGS = (
    b"", b"\0", b"\xff\xfe", b"a" * 300, b"../../etc/passwd", b"{", b"[" * 2000, "﷽".encode() * 9, b"qvsplit",
    b"embeds", b"ARROW:schema",
)  # fmt: skip


def flip(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """One to eight bytes altered."""
    out = bytearray(data)
    high = len(out) if high is None else high
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if high > low:
            out[rng.randrange(low, high)] ^= rng.choice((rng.randrange(1, 256), 1 << rng.randrange(8)))
    return bytes(out)


def run(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """A run of bytes overwritten: zeros, ones, or noise."""
    high = len(data) if high is None else high
    at = rng.randrange(low, max(high, low + 1))
    length = min(rng.choice((2, 4, 8, 32, 512)), high - at)
    new = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + new + data[at + length :]


def insert(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """Bytes put in, new ones or such as stand elsewhere in the file."""
    at = rng.randrange(low, (len(data) if high is None else high) + 1)
    length = rng.choice((1, 2, 4, 8, 64, 1000))
    there = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(length), bytes(length), data[there : there + length])) + data[at:]


def delete(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """Bytes taken out."""
    high = len(data) if high is None else high
    at = rng.randrange(low, max(high, low + 1))
    return data[:at] + data[min(at + rng.choice((1, 2, 4, 8, 64, 1000)), high) :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """A torn write."""
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes:
    """Something behind the end."""
    return data + rng.choice((b"\0", MAGIC, rng.randbytes(rng.randrange(1, 100)), data[-rng.randrange(1, 200) :]))


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The head of one shard and the tail of another, or a piece of one in the midst of another."""
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        return data[:at] + other[rng.choice((min(at, len(other)), rng.randrange(len(other)))) :]
    piece = other[(there := rng.choice((at, rng.randrange(len(other))))) : there + rng.choice((4, 32, 200, 1000))]
    return data[:at] + piece + data[at + len(piece) :]


_BYTES = (flip, flip, run, insert, delete)


def in_page(data: bytes, rng: random.Random) -> bytes:
    """Bytes within a page; its CRC tells."""
    page = rng.choice(anatomy(data).pages)
    return rng.choice((flip, run))(data, rng, page.start, page.end)


def in_page_header(data: bytes, rng: random.Random) -> bytes:
    """Bytes within a page's header, which no CRC covers, and now and then of its body too."""
    page = rng.choice(anatomy(data).pages)
    data = rng.choice((flip, flip, run))(data, rng, page.start, page.body_at)
    return flip(data, rng, page.body_at, page.end) if rng.random() < 0.4 else data


def footer_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change the footer's bytes, and its checksum with them."""
    whole = anatomy(data)
    footer = rng.choice(_BYTES)(unparse(whole.footer), rng)
    return with_footer(whole.before, footer)


def footer_fields(data: bytes, rng: random.Random) -> bytes:
    """Change the footer's fields, well-formed, and its checksum with them."""
    whole = anatomy(data)
    footer = copy.deepcopy(whole.footer)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _alter(footer, rng)
    return with_footer(whole.before, unparse(footer))


def page_fields(data: bytes, rng: random.Random) -> bytes:
    """Change a page header's fields; footer and checksum are put right."""
    whole = anatomy(data)
    page = rng.choice(whole.pages)
    header = copy.deepcopy(page.header)
    for _ in range(rng.choice((1, 1, 2))):
        _alter(header, rng)
    before, footer = with_page(whole.before, whole.footer, replace(page, header=header), header, _body(whole, page))
    return with_footer(before, unparse(footer))


def page_body(data: bytes, rng: random.Random) -> bytes:
    """Change what a page holds, before or after compression; CRC, footer and checksum are put right."""
    whole = anatomy(data)
    page = rng.choice(whole.pages)
    header, body = copy.deepcopy(page.header), _body(whole, page)
    if rng.random() < 0.2:
        body = rng.choice(_BYTES)(body, rng)
    else:
        plain = bytes(pa.Codec("zstd").decompress(body, field(header, 2)))
        plain = rng.choice(_BYTES)(plain, rng)
        put(header, 2, len(plain))
        body = bytes(pa.Codec("zstd").compress(plain))
    before, footer = with_page(whole.before, whole.footer, page, header, body)
    return with_footer(before, unparse(footer))


def _body(whole: Anatomy, page: Page) -> bytes:
    return whole.before[page.body_at : page.end]


def _places(fields: Fields) -> Iterator[tuple[Any, Any, int]]:
    """Every value in a tree: what holds it, its index there, its type."""
    for one in fields:
        yield one, 2, one[1]
        if one[1] == STRUCT:
            yield from _places(one[2])
        elif one[1] == LIST:
            inner, values = one[2]
            for index, value in enumerate(values):
                yield values, index, inner
                if inner == STRUCT:
                    yield from _places(value)


def _is_base64(value: bytes) -> bool:
    return len(value) > 100 and len(value) % 4 == 0 and re.fullmatch(rb"[A-Za-z0-9+/]+={0,2}", value) is not None


def _alter(fields: Fields, rng: random.Random) -> None:
    holder, index, kind = rng.choice(list(_places(fields)))
    value = holder[index]
    if kind in (I16_, I32_, I64_, BYTE):
        holder[index] = rng.choice((rng.choice(_INTERESTING), value + rng.randrange(-4, 5), rng.randrange(0, 20)))
    elif kind == BINARY:
        changed = rng.choice(_BYTES)(value, rng) if value else b"x"
        if _is_base64(value):
            inner = rng.choice(_BYTES)(base64.b64decode(value), rng)  # Arrow's own schema lies in the footer so
            changed = rng.choice((changed, base64.b64encode(inner)))
        holder[index] = rng.choice((rng.choice(_STRINGS), changed, changed))
    elif kind == LIST and value[1]:
        values = value[1]
        what = rng.randrange(4)
        if what == 0:
            values.pop(rng.randrange(len(values)))
        elif what == 1:
            values.insert(rng.randrange(len(values) + 1), copy.deepcopy(rng.choice(values)))
        elif what == 2:
            rng.shuffle(values)
        else:
            values *= rng.choice((0, 2, 5))
    elif kind == STRUCT and value:
        what = rng.randrange(3)
        if what == 0:
            value.pop(rng.randrange(len(value)))
        elif what == 1:
            value.append([value[-1][0] + rng.randrange(1, 9), rng.choice((TRUE, FALSE, I32_, I64_)), 1])
        else:
            one, two = rng.choice(value), rng.choice(value)
            one[1:], two[1:] = two[1:], one[1:]
    elif isinstance(holder, list) and index == 2:
        holder[1] = rng.choice((TRUE, FALSE))


# ----------------------------------------------------------------------------------------------------------- lies

HOSTILE_INTS = (-1, 0, 1, 3, 7, 2**15, 2**30, I32, -(2**31))
HOSTILE_TEXT = ("", "..", "../a", "/etc/passwd", "a/../b", "//x", "//xzz/a", "//x2e//x2e/a", "a\0b", "ok", "video", "￿", "[]", "{}", "[[]]", '[["x",5]]',
                "5" * 64)  # fmt: skip


def honest() -> pa.Table:
    """What the first seed holds, as a table to lie with."""
    return pq.read_table(io.BytesIO(seeds()[0].data))


def levels() -> pa.Table:
    """What the seed of three tensors holds."""
    return pq.read_table(io.BytesIO(seeds()[3].data))


def clips() -> pa.Table:
    """What the seed with a video in several parts holds."""
    return pq.read_table(io.BytesIO(seeds()[1].data))


def _clip(name: str, value: Any) -> pa.Table:
    """A table the second of whose three parts of a video has another value."""
    return changed(name, [*clips().column(name).to_pylist()[:3], value], clips())


def _level_values(change: Callable[[bytes], bytes | None]) -> pa.Table:
    """A table whose first row's second level is another."""
    return changed(LEVEL, [change(levels().column(LEVEL)[0].as_py())], levels())


def _level_type(values: pa.Array) -> pa.Table:
    table = levels()
    return table.set_column(table.schema.get_field_index(LEVEL), LEVEL, values)


def _level_declared(**fields: Any) -> pa.Table:
    """A table whose second level is declared as another."""
    table = levels()
    content = json.loads(table.schema.metadata[METADATA_KEY])
    content["tensors"][2].update(fields)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(content).encode()})


def _renamed(table: pa.Table, name: str, other: str) -> pa.Table:
    renamed = table.rename_columns([other if one == name else one for one in table.schema.names])
    return renamed.replace_schema_metadata(table.schema.metadata)


def _infinite_first(raw: bytes) -> bytes:
    spoiled = bytearray(raw)
    spoiled[0], spoiled[len(raw) // 2] = 0x7F, 0x80  # the two planes of the first bfloat16
    return bytes(spoiled)


def changed(name: str, values: Sequence[Any], table: pa.Table | None = None) -> pa.Table:
    """Give a table with one column's first values replaced."""
    return rows.changed(honest() if table is None else table, name, values)


def retyped(name: str, values: pa.Array) -> pa.Table:
    """A table one column of which has another type."""
    table = honest()
    return table.set_column(table.schema.get_field_index(name), name, values)


def described(change: Callable[[dict[str, Any]], Any]) -> pa.Table:
    """A table whose JSON was changed; what `change` gives stands in its place, unless None."""
    content = json.loads(honest().schema.metadata[METADATA_KEY])
    new = change(content)
    new = content if new is None else new
    return meta(new if isinstance(new, bytes) else json.dumps(new).encode())


def meta(text: bytes | None) -> pa.Table:
    """A table whose metadata is this."""
    return honest().replace_schema_metadata(None if text is None else {METADATA_KEY: text})


def written(table: pa.Table, **options: Any) -> bytes:
    """Give the table as pyarrow writes it, with a footer checksum."""
    return rows.with_checksum(table, **options)


def _features(data: bytes | None) -> pa.Table:
    return changed("embeds", [data])


def _tokens(grid: Any, tokens: Any) -> pa.Table:
    return changed("n_tokens", [tokens], changed("grid_thw", [grid]))


def _raw() -> bytes:
    return bytes(honest().column("embeds")[0].as_py())


def _config(**fields: Any) -> pa.Table:
    return described(lambda content: content["config"].update(fields))


def _processor(**fields: Any) -> pa.Table:
    return described(lambda content: content["config"]["processor"].update(fields))


def _tensor(**fields: Any) -> pa.Table:
    return described(lambda content: content["tensors"][0].update(fields))


def _tensors(change: Callable[[list[Any]], Any]) -> pa.Table:
    return described(lambda content: content.update(tensors=change(content["tensors"])))


def _level(tensor: dict[str, Any], level: Any) -> dict[str, Any]:
    return tensor | {"name": "deepstack_features", "level": level, "column": f"deepstack_features_{level}"}


def _format(value: Any) -> pa.Table:
    return described(lambda content: content.update(format=value))


def _without(*path: str) -> pa.Table:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return described(change)


def _infinite() -> pa.Table:
    return _features(_infinite_first(_raw()))


def _not_utf_8(name: str) -> pa.Table:
    table = honest()
    old = table.column(name).combine_chunks()
    bad = pa.array([b"\xff\xfe.png", *(v.as_py().encode() for v in old[1:])], pa.binary())
    return table.set_column(
        table.schema.get_field_index(name),
        table.schema.field(name),
        pa.Array.from_buffers(pa.string(), len(bad), bad.buffers()),
    )


def _input(**fields: Any) -> pa.Table:
    one = {"dtype": "int64", "shape": [1, 2], "values": [3, 4]} | fields
    return changed("inputs", [json.dumps({"image_sizes": one})])


def _nested(depth: int) -> bytes:
    content = json.loads(honest().schema.metadata[METADATA_KEY])
    content["provenance"] = "HERE"
    return json.dumps(content).encode().replace(b'"HERE"', b"[" * depth + b"]" * depth)


def _swapped(first: str, second: str) -> pa.Table:
    table = honest()
    names = table.schema.names
    a, b = names.index(first), names.index(second)
    names[a], names[b] = names[b], names[a]
    return table.select(names)


# Each must be refused: tables first, then whole files.
LIES: dict[str, Callable[[], pa.Table]] = {
    "grid negative": lambda: _tokens([-1, -4, 6], 6),
    "grid zero": lambda: _tokens([0, 4, 6], 0),
    "grid overflowing": lambda: _tokens([4, 2**30, 2**30], 0),
    "grid wraps to the right count": lambda: _tokens([1, 2**17, 2**17 + 2], 2**16),
    "grid at the limit": lambda: _tokens([I32, I32 - 1, I32 - 1], I32),
    "grid odd": lambda: _tokens([1, 3, 8], 6),
    "grid holds a null": lambda: _tokens([None, 4, 6], 6),
    "grid missing": lambda: _tokens(None, 6),
    "tokens too many": lambda: _tokens([1, 4, 6], 7),
    "tokens negative": lambda: _tokens([1, 4, 6], -6),
    "tokens missing": lambda: _tokens([1, 4, 6], None),
    "tokens of a copy": lambda: changed("n_tokens", [6, None, 7]),
    "grid of a copy": lambda: changed("grid_thw", [[1, 4, 6], None, [-1, 2**30, 6]]),
    "embeds short": lambda: _features(_raw()[:-1]),
    "embeds long": lambda: _features(_raw() + b"\0\0"),
    "embeds empty": lambda: _features(b""),
    "embeds missing": lambda: _features(None),
    "embeds infinite": _infinite,
    "embeds of a row that denies them": lambda: changed("has_features", [False]),
    "embeds of a failed row": lambda: changed("embeds", [_raw(), _raw()]),
    "embeds claimed by a failed row": lambda: changed("has_features", [True, True]),
    "embeds flag missing": lambda: changed("has_features", [None]),
    "hash missing": lambda: changed("sha256", [None]),
    "size missing": lambda: changed("size", [None]),
    "root missing": lambda: changed("root", [None]),
    "path missing": lambda: changed("path", [None]),
    "path empty": lambda: changed("path", [""]),
    "path leads up": lambda: changed("path", ["../../etc/passwd"]),
    "path leads up within": lambda: changed("path", ["a/../../b"]),
    "path absolute": lambda: changed("path", ["/etc/passwd"]),
    "path absolute, looks escaped": lambda: changed("path", ["//xyz/passwd"]),
    "path escapes ASCII": lambda: changed("path", ["a//x2e//x2e//x2f"]),
    "path holds a zero byte": lambda: changed("path", ["a\0.png"]),
    "path not UTF-8": lambda: _not_utf_8("path"),
    "root not UTF-8": lambda: _not_utf_8("root"),
    "status missing": lambda: changed("status", [None]),
    "kind missing": lambda: changed("kind", [None]),
    "type of size": lambda: retyped("size", pa.array(["a", "b", "c", "d"])),
    "type of hash": lambda: retyped("sha256", pa.array([b"5" * 32] * 4)),
    "type of path": lambda: retyped("path", pa.array([b"a", b"b", b"c", b"d"])),
    "type of embeds": lambda: retyped("embeds", pa.array([1.0, 2.0, 3.0, 4.0])),
    "type of grid": lambda: retyped("grid_thw", pa.array([[1, 4, 6]] * 4, pa.list_(pa.int64(), 3))),
    "type of grid, of any length": lambda: retyped("grid_thw", pa.array([[1, 4]] * 4, pa.list_(pa.int32()))),
    "type nested": lambda: retyped("error", pa.array([{"a": {"b": 1}}] * 4)),
    "type dictionary": lambda: retyped("status", pa.array(["ok"] * 4).dictionary_encode()),
    "column missing": lambda: honest().drop_columns(["sha256"]),
    "embeds column missing": lambda: honest().drop_columns(["embeds"]),
    "column twice": lambda: honest().append_column("path", honest().column("path")),
    "columns in another order": lambda: _swapped("root", "path"),
    "columns none": lambda: meta(honest().schema.metadata[METADATA_KEY]).select([]),
    "metadata none": lambda: meta(None),
    "metadata empty": lambda: meta(b""),
    "metadata not JSON": lambda: meta(b"{'a': 1}"),
    "metadata not UTF-8": lambda: meta(b'{"format": 1, "x": "\xff\xfe"}'),
    "metadata a list": lambda: meta(b"[1, 2]"),
    "metadata a number": lambda: meta(b"7"),
    "metadata null": lambda: meta(b"null"),
    "metadata deeply nested": lambda: meta(b"[" * 100_000),
    "metadata nested in provenance": lambda: meta(_nested(500)),
    "metadata of a giant int": lambda: meta(b'{"format": ' + b"9" * 1_000_000 + b"}"),
    "format missing": lambda: _without("format"),
    "format 0": lambda: _format(0),
    "format NaN": lambda: _format(math.nan),
    "format text": lambda: _format("2"),
    "tensors missing": lambda: _without("tensors"),
    "tensors none": lambda: _tensors(lambda listed: []),
    "tensors a text": lambda: _tensors(lambda listed: "embeds"),
    "tensors of nothing": lambda: _tensors(lambda listed: [None]),
    "tensors twice the same": lambda: _tensors(lambda listed: listed * 2),
    "tensors beyond number": lambda: _tensors(lambda listed: listed * 1000),
    "tensors without pooler_output": lambda: _tensor(name="deepstack_features", level=0, column="deepstack_features_0"),
    "tensor of another column": lambda: _tensor(column="path"),
    "tensor of no name": lambda: _tensor(name=None),
    "tensor of another dtype than the extraction config": lambda: _tensor(dtype="float16"),
    "tensor of a dtype that is a list": lambda: _tensor(dtype=["bfloat16"]),
    "tensor of no container": lambda: _tensor(container=None),
    "pooler_output with a level": lambda: _tensors(lambda listed: [*listed, listed[0] | {"level": 0}]),
    "level negative": lambda: _tensors(lambda listed: [*listed, _level(listed[0], -1)]),
    "level true": lambda: _tensors(lambda listed: [*listed, _level(listed[0], True)]),
    "level without a column": lambda: _tensors(lambda listed: [*listed, _level(listed[0], 0)]),
    "level short": lambda: _level_values(lambda raw: raw[:-1]),
    "level long": lambda: _level_values(lambda raw: raw + b"\0\0"),
    "level empty": lambda: _level_values(lambda raw: b""),
    "level missing in a row": lambda: _level_values(lambda raw: None),
    "level infinite": lambda: _level_values(_infinite_first),
    "level of a row that denies features": lambda: changed(
        "has_features", [False], changed("embeds", [None], levels())
    ),
    "level column missing": lambda: levels().drop_columns([LEVEL]),
    "level column all null": lambda: changed(LEVEL, [None] * 6, levels()),
    "level columns in another order": lambda: levels().select(
        [*levels().schema.names[:-2], LEVEL, "deepstack_features_0"]
    ),
    "type of a level": lambda: _level_type(pa.array([1.0] * 6)),
    "type of a level, of short binary": lambda: _level_type(levels().column(LEVEL).combine_chunks().cast(pa.binary())),
    "level of another dtype": lambda: _level_declared(dtype="float32"),
    "level of int8": lambda: _level_declared(dtype="int8"),
    "level of another width": lambda: _level_declared(width=4),
    "level declared twice": lambda: _level_declared(level=0, column="deepstack_features_0"),
    "level of another column": lambda: _level_declared(column="deepstack_features_7"),
    "level skipped": lambda: _renamed(
        _level_declared(level=2, column="deepstack_features_2"), LEVEL, "deepstack_features_2"
    ),
    "width zero": lambda: _tensor(width=0),
    "width negative": lambda: _tensor(width=-8),
    "width absurd": lambda: _tensor(width=10**30),
    "width at the bound": lambda: _tensor(width=1 << 20),
    "width a fraction": lambda: _tensor(width=8.0),
    "width text": lambda: _tensor(width="8"),
    "width NaN": lambda: _tensor(width=math.nan),
    "width true": lambda: _tensor(width=True),
    "width missing": lambda: described(lambda content: content["tensors"][0].pop("width") and None),
    "provenance missing": lambda: _without("provenance"),
    "provenance null": lambda: described(lambda content: content.update(provenance=None)),
    "extraction config missing": lambda: _without("config"),
    "extraction config a list": lambda: described(lambda content: content.update(config=[])),
    "extraction config a text": lambda: described(lambda content: content.update(config="qwen2_vl")),
    "extraction config of another width": lambda: _config(storage_dtype="float32"),
    "extraction config of a dtype that is a list": lambda: _config(storage_dtype=["bfloat16"]),
    "extraction config of an encoder that is a number": lambda: _config(encoder=0),
    "extraction config without kernels": lambda: _without("config", "kernels"),
    "processor null": lambda: _config(processor=None),
    "processor a list": lambda: _config(processor=[["merge_size", 2]]),
    "images a text": lambda: _config(images="upright"),
    "merge_size zero": lambda: _processor(merge_size=0),
    "merge_size negative": lambda: _processor(merge_size=-2),
    "merge_size absurd": lambda: _processor(merge_size=10**100),
    "merge_size infinite": lambda: _processor(merge_size=math.inf),
    "merge_size missing": lambda: _without("config", "processor", "merge_size"),
    "limits not numbers": lambda: _processor(min_pixels="few", max_pixels=None),
    "limits missing": lambda: _without("config", "processor", "min_pixels"),
    "part negative": lambda: changed("part", [-1]),
    "part missing": lambda: changed("part", [None]),
    "part of an image": lambda: changed("part", [1]),
    "part of an image, with its seconds": lambda: _clip("kind", "image"),
    "part without its start": lambda: _clip("start", None),
    "part without its end": lambda: _clip("end", None),
    "part without a duration": lambda: _clip("duration", None),
    "part zero in the middle": lambda: _clip("part", 0),
    "part that begins behind its end": lambda: _clip("start", 4.0),
    "part that begins before the video": lambda: _clip("start", -1.0),
    "part that begins nowhere": lambda: _clip("start", math.nan),
    "part that never ends": lambda: _clip("end", math.inf),
    "part behind the end of the video": lambda: _clip("end", 5.0),
    "duration negative": lambda: _clip("duration", -4.5),
    "duration not a number": lambda: _clip("duration", math.nan),
    "duration of an image": lambda: changed("duration", [9.5]),
    "videos a list": lambda: _config(videos=[1]),
    "videos of settings that are none": lambda: _config(videos={"settings": 7}),
    "videos of a merge_size that is none": lambda: _config(videos={"settings": {"merge_size": 0}}),
    "generation negative": lambda: changed("generation", [-1]),
    "generation missing": lambda: changed("generation", [None]),
    "hash of other letters": lambda: changed("sha256", ["G" * 64]),
    "hash of another length": lambda: changed("sha256", ["0" * 62]),
    "placeholder missing": lambda: changed("placeholder", [None]),
    "placeholder a text": lambda: changed("placeholder", ['"<|image_pad|>"']),
    "placeholder not JSON": lambda: changed("placeholder", ["<|image_pad|>"]),
    "placeholder deeply nested": lambda: changed("placeholder", ["[" * 100_000]),
    "placeholder of a run of none": lambda: changed("placeholder", ['[["x", 0]]']),
    "placeholder of a negative run": lambda: changed("placeholder", ['[["x", -5]]']),
    "placeholder of a run beyond all bounds": lambda: changed("placeholder", ['[["x", 99999999999]]']),
    "placeholder of a true run": lambda: changed("placeholder", ['[["x", true]]']),
    "placeholder of an empty text": lambda: changed("placeholder", ['[["", 5]]']),
    "placeholder of a run of three": lambda: changed("placeholder", ['[["x", 5, 5]]']),
    "placeholder of 70,000 runs": lambda: changed("placeholder", ["[" + '["x",1],' * 70_000 + '["x",1]]']),
    "inputs not JSON": lambda: changed("inputs", ["{"]),
    "inputs a list": lambda: changed("inputs", ["[]"]),
    "inputs of no tensors": lambda: changed("inputs", ['{"image_sizes": [1, 2]}']),
    "inputs of a dtype that is none": lambda: _input(dtype="load"),
    "inputs of another shape": lambda: _input(shape=[1, 3]),
    "inputs of texts": lambda: _input(values=["1", "2"]),
    "inputs deeply nested": lambda: changed("inputs", ['{"x": ' + "[" * 60_000]),
    "inputs of 70 kB": lambda: changed("inputs", ['{"x": "' + "x" * 70_000 + '"}']),
    "inputs of 70 kB in few letters": lambda: changed("inputs", ['{"x": "' + "猫" * 24_000 + '"}']),
    "media of 70 kB": lambda: changed("media", ["x" * 70_000]),
}

# A newer version may have written these: each must be refused, and not as damage.
NEWER: dict[str, Callable[[], pa.Table]] = {
    "format 2": lambda: _format(2),
    "format 10^4000": lambda: _format(10**4000),
    "field of the extraction config": lambda: _config(surprise=1),
    "kernels": lambda: _config(kernels="quantum"),
    "compute dtype": lambda: _config(compute_dtype="float8"),
    "storage dtype": lambda: _config(storage_dtype="float64"),
    "tensor": lambda: _tensors(lambda listed: [*listed, {**listed[0], "name": "audio_features", "column": "audio"}]),
    "field of a tensor": lambda: _tensor(scale=2),
    "dtype of a tensor": lambda: _tensor(dtype="int4"),
    "container": lambda: _tensor(container="set"),
    "column": lambda: honest().append_column("more", pa.array([1, 2, 3, 4])),
    "status": lambda: changed("status", ["fine"]),
    "status of a failed row": lambda: changed("status", ["ok", "skipped"]),
    "kind": lambda: changed("kind", ["sculpture"]),
    "kind of error": lambda: changed("error_kind", [None, "solar-flare"]),
}

# Strange, yet they keep every promise: these must be read.
ODD: dict[str, Callable[[], pa.Table]] = {
    "honest": honest,
    "the same row twice": lambda: pa.concat_tables([honest(), honest()]),
    "extraction config with NaN": lambda: _processor(image_mean=[math.nan]),
    "provenance of nothing": lambda: described(lambda content: content.update(provenance=[])),
    "provenance of numbers": lambda: described(
        lambda content: content.update(provenance=[7, {"model": 10**4000, "versions": [1]}])
    ),
    "processor of another family": lambda: changed(
        "grid_thw", [None, None, None], described(lambda content: content["config"].update(processor={"size": [8, 8]}))
    ),
    "inputs of a family": _input,
    "a video in parts": clips,
    "a part left out": lambda: clips().take([0, 1, 2, 4]),
    "videos null": lambda: _config(videos=None),
    "videos of another family": lambda: _config(videos={"anything": [1, 2]}),
    "placeholder of a copy": lambda: changed("placeholder", [rows.row().placeholder, None, "none of mine"]),
}


def _grown(column: str, length: int, *, groups: Sequence[int] = (0,), seed: int = 0) -> bytes:
    """A string or binary column whose first value is `length` zeros, in the given row groups."""
    data = seeds()[seed].data
    for group in groups:
        whole = anatomy(data)
        page = whole.page(column, group)
        rows = field(field(whole.footer, 4)[1][group], 3)
        # levels: one defined value, then nulls
        rounds = _to_varint(1 << 1) + b"\1" + (_to_varint(rows - 1 << 1) + b"\0" if rows > 1 else b"")
        lead = len(rounds).to_bytes(4, "little") + rounds + length.to_bytes(4, "little")
        header = copy.deepcopy(page.header)
        put(header, 2, len(lead) + length)
        put(field(header, 5), 2, 0)  # PLAIN
        before, footer = with_page(whole.before, whole.footer, page, header, _squeezed(lead, length))
        data = with_footer(before, unparse(footer))
    return data


def _squeezed(lead: bytes, zeros: int) -> bytes:
    """`lead` and then `zeros` bytes of nothing, compressed without ever being in memory: frame upon frame."""
    zstd, block = pa.Codec("zstd"), 1 << 24
    frames = [
        zstd.compress(lead),
        *[zstd.compress(bytes(block))] * (zeros // block),
        zstd.compress(bytes(zeros % block)),
    ]
    return b"".join(map(bytes, frames))


def _understated(data: bytes) -> bytes:
    """The same file, whose footer makes its columns out to be small."""
    whole = anatomy(data)
    footer = copy.deepcopy(whole.footer)
    for group in field(footer, 4)[1]:
        put(group, 2, 1000)
        for chunk in field(group, 1)[1]:
            put(field(chunk, 3), 6, 100)
    return with_footer(whole.before, unparse(footer))


def _claims() -> bytes:
    """A page header that says two gigabytes, over a page of a few bytes."""
    whole = anatomy(seeds()[0].data)
    page = whole.page("embeds")
    header = copy.deepcopy(page.header)
    put(header, 2, I32)
    before, footer = with_page(whole.before, whole.footer, page, header, _body(whole, page))
    return with_footer(before, unparse(footer))


def _dictionary(column: str, rows: int = 3000, length: int = 1 << 20) -> bytes:
    """Thousands of rows, each the same megabyte of text, which a dictionary holds once."""
    good = honest()
    table = pa.table(
        {name: pa.concat_arrays([good.column(name).combine_chunks()[1:2]] * rows) for name in good.schema.names}
    )
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * length]))
    table = table.set_column(table.schema.get_field_index(column), column, text)
    stream = io.BytesIO()
    pq.write_table(table, stream, write_page_checksum=True, compression="zstd", dictionary_pagesize_limit=1 << 30,
                   use_dictionary=[column], row_group_size=rows)  # fmt: skip
    whole = anatomy(with_checksum(stream.getvalue()))
    footer = copy.deepcopy(whole.footer)
    put(footer, 5, field(anatomy(seeds()[0].data).footer, 5))  # Arrow's types as in a true shard
    return with_footer(whole.before, unparse(footer))


def _levels(count: int = 1 << 30) -> bytes:
    """One row whose grid is a list of a thousand million nulls: in a page of some twenty bytes."""
    whole = anatomy(seeds()[4].data)
    page = whole.page("grid_thw")
    rows = field(field(whole.footer, 4)[1][0], 3)
    repeats = _to_varint(rows << 1) + b"\0" + _to_varint(count << 1) + b"\1"
    defined = _to_varint(rows + count << 1) + b"\2"
    plain = b"".join(len(part).to_bytes(4, "little") + part for part in (repeats, defined))
    header = copy.deepcopy(page.header)
    put(header, 2, len(plain))
    put(field(header, 5), 1, rows + count)
    put(field(header, 5), 2, 0)
    before, footer = with_page(whole.before, whole.footer, page, header, bytes(pa.Codec("zstd").compress(plain)))
    put(field(chunks(footer)[0][page.column], 3), 5, rows + count)
    return with_footer(before, unparse(footer))


def _groups(count: int) -> bytes:
    """As many row groups, all of them the same few pages."""
    whole = anatomy(seeds()[1].data)
    footer = copy.deepcopy(whole.footer)
    one = field(footer, 4)[1][0]
    put(one, 3, 1)
    field(footer, 4)[1][:] = [unparse(one)] * count
    put(footer, 3, count)
    return with_footer(whole.before, unparse(footer))


def _shell_groups(count: int) -> bytes:
    """As many row groups, without columns, which the schema contradicts."""
    whole = anatomy(seeds()[1].data)
    footer = copy.deepcopy(whole.footer)
    field(footer, 4)[1][:] = [unparse([[1, LIST, [STRUCT, []]], [2, I64_, 1], [3, I64_, 1]])] * count
    put(footer, 3, count)
    return with_footer(whole.before, unparse(footer))


def _deep(depth: int) -> bytes:
    """A schema of groups within groups."""
    whole = anatomy(seeds()[5].data)
    footer = copy.deepcopy(whole.footer)
    group = unparse([[3, I32_, 0], [4, BINARY, b"g"], [5, I32_, 1]])
    leaf = unparse([[1, I32_, 1], [3, I32_, 0], [4, BINARY, b"x"]])
    put(footer, 2, [STRUCT, [[[4, BINARY, b"schema"], [5, I32_, 1]], *([group] * depth), leaf]])
    return with_footer(whole.before, unparse(footer))


def _wide(count: int) -> bytes:
    """A schema of very many columns."""
    whole = anatomy(seeds()[5].data)
    footer = copy.deepcopy(whole.footer)
    leaf = unparse([[1, I32_, 1], [3, I32_, 0], [4, BINARY, b"x"]])
    put(footer, 2, [STRUCT, [[[4, BINARY, b"schema"], [5, I32_, count]], *([leaf] * count)]])
    return with_footer(whole.before, unparse(footer))


def _json(content: bytes) -> bytes:
    """Metadata put into the footer by hand: what pyarrow would not write, or only with much memory."""
    whole = anatomy(seeds()[0].data)
    footer = copy.deepcopy(whole.footer)
    for pair in field(footer, 5)[1]:
        if field(pair, 1) == METADATA_KEY:
            put(pair, 2, content)
    return with_footer(whole.before, unparse(footer))


def _elsewhere() -> bytes:
    """Columns said to lie in another file."""
    whole = anatomy(seeds()[0].data)
    footer = copy.deepcopy(whole.footer)
    for chunk in chunks(footer)[0]:
        chunk.insert(0, [1, BINARY, b"/etc/passwd"])
    return with_footer(whole.before, unparse(footer))


def _unchecked() -> bytes:
    """A hash altered in two bits: one makes the CRC a field of a type that readers pass over, the other is the lie."""
    data = bytearray(seeds()[0].data)
    page = anatomy(seeds()[0].data).page("sha256")
    crc = page.start
    for _ in range(3):  # the fourth field, each of one byte of type and a number
        _, crc = _varint(data, crc + 1)
    data[crc] ^= 1
    data[page.end - 10] ^= 0x80
    return bytes(data)


def _histograms() -> bytes:
    """Statistics that contradict the schema: pyarrow's own account of a column ends the process over them."""
    whole = anatomy(seeds()[0].data)
    footer = copy.deepcopy(whole.footer)
    for chunk in chunks(footer)[0]:
        of = field(chunk, 3)
        of[:] = [one for one in of if one[0] != 16] + [
            [16, STRUCT, [[2, LIST, [I64_, [1] * 9]], [3, LIST, [I64_, [1] * 9]]]]
        ]
    return with_footer(whole.before, unparse(footer))


def _entries() -> bytes:
    """A dictionary that claims 2^31 entries in a few bytes."""
    whole = anatomy(seeds()[0].data)
    page = next(page for page in whole.pages if field(page.header, 1) == 2)
    header = copy.deepcopy(page.header)
    put(field(header, 7), 1, I32)
    before, footer = with_page(whole.before, whole.footer, page, header, _body(whole, page))
    return with_footer(before, unparse(footer))


BOMBS: dict[str, Callable[[], bytes]] = {
    "page of 2 GB": lambda: _grown("embeds", I32 - 1000),
    "page of 2 GB, understated": lambda: _understated(_grown("embeds", I32 - 1000)),
    "page that claims 2 GB": _claims,
    "text of 2 GB": lambda: _grown("error", I32 - 1000),
    "text of 2 GB, understated": lambda: _understated(_grown("path", I32 - 1000)),
    "text of 400 MB in each row group": lambda: _understated(_grown("error", 400 << 20, groups=range(3), seed=3)),
    "dictionary of a megabyte, 3000 times": lambda: _dictionary("error"),
    "root of a megabyte, 3000 times": lambda: _dictionary("root"),
    "list of 2^30": _levels,
    "dictionary of 2^31 entries": _entries,
    "row groups, 20,000": lambda: _groups(20_000),
    "row groups without columns, 300,000": lambda: _shell_groups(300_000),
    "schema deep": lambda: _deep(200_000),
    "schema wide": lambda: _wide(300_000),
    "metadata of 30 million lists": lambda: _json(b'{"format": 1, "x": [' + b"[]," * 30_000_000 + b"[]]}"),
    "metadata of 90 MB": lambda: _json(b'{"format": 1, "x": "' + b"x" * 90_000_000 + b'"}'),
    "metadata as deep as JSON is read": lambda: _json(_nested(970)),
}

# Files put together by hand that are no larger than they say
FORGED: dict[str, Callable[[], bytes]] = {
    "checksum passed over": _unchecked,
    "columns in another file": _elsewhere,
    "statistics that contradict the schema": _histograms,
}  # fmt: skip
MAY_BE_READ = {
    "columns in another file",
    "statistics that contradict the schema",
    "metadata nested in provenance",
    "metadata as deep as JSON is read",
}


def random_table(rng: random.Random) -> bytes:
    """One to three columns, and the metadata now and then, filled with what a hostile hand would write."""
    table = rng.choice((honest, honest, clips))()
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(table.schema.names)
        kind = table.schema.field(name).type
        values = [_hostile(kind, old, rng) if rng.random() < 0.6 else old for old in table.column(name).to_pylist()]
        table = changed(name, values, table)
    if rng.random() < 0.2:
        text = rng.choice(_BYTES)(table.schema.metadata[METADATA_KEY], rng)
        table = table.replace_schema_metadata({METADATA_KEY: text})
    if rng.random() < 0.3:
        table = pa.concat_tables([table] * rng.choice((0, 2, 3)) or [table.slice(0, 0)])
    return written(
        table, row_group_size=rng.choice((1, 2, 1000)), compression=rng.choice(("zstd", "snappy", "none", "lz4")),
        use_dictionary=rng.choice((True, False, ["path"])), data_page_version=rng.choice(("1.0", "2.0")),
        version=rng.choice(("1.0", "2.4", "2.6")), data_page_size=rng.choice((64, None)),
    )  # fmt: skip


def _hostile(kind: pa.DataType, old: Any, rng: random.Random) -> Any:
    if rng.random() < 0.15:
        return None
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_integer(kind):
        return rng.choice((*HOSTILE_INTS, old))
    if pa.types.is_floating(kind):
        return rng.choice((math.nan, math.inf, -1.0, 0.0, 1e308, old))
    if pa.types.is_string(kind):
        return rng.choice((*HOSTILE_TEXT, *STATUSES, old))
    if pa.types.is_fixed_size_list(kind):
        return [rng.choice((*HOSTILE_INTS, 1, 2, 4, 4, 6, None)) for _ in range(3)]
    return rng.choice((b"", b"x", rng.randbytes(96), flip(old, rng) if old else b"y", (old or b"") + b"z"))


# ---------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A file to read. `originals` are what it may give; None where a hostile hand computed the checksum."""

    kind: str
    name: str
    data: bytes
    originals: tuple[Seed, ...] | None
    refused: bool = False  # whether nothing but a refusal will do


_ANYWHERE = {"flip": flip, "run": run, "insert": insert, "delete": delete, "truncate": truncate, "extend": extend}
_RESEALED = {
    "footer bytes": footer_bytes,
    "footer fields": footer_fields,
    "page fields": page_fields,
    "page body": page_body,
}
_WEIGHTS = {
    **dict.fromkeys(_ANYWHERE, 8), "splice": 8, "page": 8, "page header": 14, "footer bytes": 8, "footer fields": 12,
    "page fields": 8, "page body": 8, "written": 4,
}  # fmt: skip


def by_name() -> list[Callable[[], Case]]:
    """Give every lie, oddity and bomb, each to be made when its turn comes."""
    return [
        *(lambda n=n, t=t: Case("lie", n, written(t()), None, n not in MAY_BE_READ) for n, t in LIES.items()),
        *(lambda n=n, t=t: Case("newer", n, written(t()), None, refused=True) for n, t in NEWER.items()),
        *(lambda n=n, t=t: Case("odd", n, written(t()), None) for n, t in ODD.items()),
        *(lambda n=n, f=f: Case("forged", n, f(), None, n not in MAY_BE_READ) for n, f in FORGED.items()),
        *(lambda n=n, b=b: Case("bomb", n, b(), None, n not in MAY_BE_READ) for n, b in BOMBS.items()),
    ]


def random_case(number: int, seed: int) -> Case:
    """The case of this number: always the same one."""
    rng = random.Random(f"{seed}:{number}")
    kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    name = f"{seed}-{number}"
    usable = seeds() if kind in _ANYWHERE or kind.startswith("footer") else [s for s in seeds() if s.content]
    one = rng.choice(usable)
    if kind == "written":
        return Case(kind, name, random_table(rng), None)
    if kind in _RESEALED:
        return Case(kind, name, _RESEALED[kind](one.data, rng), None)
    if kind == "splice":
        other = rng.choice(usable)
        return Case(kind, name, splice(one.data, rng, other.data), (one, other))
    spoil = {"page": in_page, "page header": in_page_header}.get(kind) or _ANYWHERE[kind]
    return Case(kind, name, spoil(one.data, rng), (one,))


# --------------------------------------------------------------------------------------------------------- reader


@dataclass(frozen=True)
class Outcome:
    """What reading a case came to. `failure` says what should not have been, None if all is well."""

    what: str  # "refused", "read", or the sort of failure
    failure: str | None = None
    exit_code: int | None = None
    message: str = ""


def outcome(case: Case, file: Path) -> Outcome:
    """Read the case's file end to end, and hold what comes of it against what may."""
    file.write_bytes(case.data)
    content: Content = []
    try:
        shard = Shard(LocalStorage(file.parent), file.name)
        for _, row, features in shard:
            content.append((row, rows.raws(features)))
            if features is not None and (wrong := _broken(row, features, shard)):
                return Outcome("inconsistent", wrong)
        held = [index for index, row in enumerate(shard.rows) if row.has_features]
        if held and rows.raws(shard.features(held[-1])) != content[held[-1]][1]:
            return Outcome("inconsistent", f"row {held[-1]} alone is not what it is among all")
    except QvsplitError as error:
        told = str(error)
        if error.exit_code not in REFUSED:
            what = "memory" if "memory" in told else "exit code"
            return Outcome(what, told, error.exit_code, told)
        if file.name not in told:
            return Outcome("unnamed", f"does not name the file: {told}", error.exit_code, told)
        return Outcome("refused", None, error.exit_code, told)
    except MemoryError as error:
        return Outcome("memory", f"MemoryError: {error}")
    except BaseException as error:  # whatever else it is, it is a failure
        return Outcome("foreign", f"{type(error).__name__}: {error}"[:300])
    if case.refused:
        return Outcome("accepted", "was to be refused, and is read")
    if case.originals is not None:
        if not any(_same(content, shard, seed) for seed in case.originals):
            return Outcome("different", "silently gives other rows than were written")
    elif len(content) != len(shard.rows):
        return Outcome("inconsistent", f"{len(shard.rows)} rows, {len(content)} of them iterated")
    else:
        for index, row in enumerate(shard.rows):
            if wrong := _unsound(row, shard):
                return Outcome("inconsistent", f"row {index} {wrong}")
    return Outcome("read")


def _same(content: Content, shard: Shard, seed: Seed) -> bool:
    return content == seed.content and [row for row, _ in content] == shard.rows and shard.schema == seed.schema


def _broken(row: Row, features: Features, shard: Shard) -> str | None:
    """Say what is wrong with features that were handed out; counted here anew, not by the reader's own means."""
    if row.n_tokens != features.n_tokens or row.grid_thw != features.grid_thw:
        return f"{row.n_tokens} and {features.n_tokens} tokens, grids {row.grid_thw} and {features.grid_thw}"
    declared = {one.key: one for one in shard.schema.tensors}
    if set(features) != set(declared):
        return f"the tensors {sorted(features)}"
    for name in features:
        if wrong := _wrong_tensor(
            features.tensors[name], features.n_tokens, declared[name].dtype, declared[name].width
        ):
            return f"{name}: {wrong}"
    if any(not text or count < 1 for text, count in features.placeholder):
        return f"the placeholder {features.placeholder[:5]}"
    return _wrong_grid(row, shard)


def _wrong_tensor(tensor: StoredTensor, tokens: int, dtype: str, width: int) -> str | None:
    if tensor.dtype != dtype or tensor.raw.shape != (tokens, token_bytes(dtype, width)):
        return f"{tensor.dtype} of shape {tensor.raw.shape}"
    return None if bool(np.isfinite(tensor.numpy()).all()) else "values that are not finite"


def _wrong_grid(row: Row, shard: Shard) -> str | None:
    if row.grid_thw is None:
        return None
    t, h, w = row.grid_thw
    merge = shard.config.merge_size_of(row.kind)
    if min(t, h, w) < 1 or h % merge or w % merge or t * h * w != (row.n_tokens or 0) * merge**2:
        return f"has the grid {row.grid_thw} and {row.n_tokens} tokens"
    return None


def _unsound(row: Row, shard: Shard) -> str | None:
    """Say what is wrong with a row, by docs/format.md."""
    if row.status not in STATUSES or row.kind not in KINDS or row.error_kind not in (None, *ERROR_KINDS):
        return "has an unknown status, kind or kind of error"
    if not all(isinstance(text, str) for text in (row.root, row.path)) or not isinstance(row.size, int):
        return "lacks root, path or size"
    if min(row.part, row.generation) < 0 or (row.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", row.sha256)):
        return "has a part, generation or hash that cannot be"
    if row.grid_thw is not None and None in row.grid_thw:
        return f"has the grid {row.grid_thw}"
    if row.part > 0 and (row.kind, row.start is None) != ("video", False):
        return f"is part {row.part} of what has none"
    if row.start is not None and not 0 <= row.start < (row.end or 0) <= (row.duration or 0) + 1e-6:
        return f"has the seconds {row.start} to {row.end} of {row.duration}"
    root, name = _on_disk(row.root), _on_disk(row.path)
    if root is None or name is None:
        return f"has a root or path that no file can have: {row.root!r}, {row.path!r}"
    if not os.path.normpath(os.path.join(b"/root", name)).startswith(b"/root/"):
        return f"has a path that leads out of its root: {row.path!r}"
    return _wrong_grid(row, shard) if row.status == "ok" else None


def _on_disk(stored: str) -> bytes | None:
    """A stored name as a file system has it; None if it cannot be one. An escape stands for what is not ASCII."""
    plain = re.sub(rb"//x([89a-f][0-9a-f])", lambda m: bytes([int(m[1], 16)]), stored.encode())
    return None if b"\0" in plain or b"//" in plain else plain


# ---------------------------------------------------------------------------------------------------------- child


@dataclass(frozen=True)
class Result:
    """One case as the parent counts it."""

    number: int
    kind: str
    name: str
    outcome: Outcome
    seconds: float
    bytes: int  # of memory above what the child began with, at its highest so far


def results(make: Callable[[int], Case], count: int) -> Iterator[Result]:
    """Read cases 0 to `count` in children under limits; one that dies is told as a failure, and the next starts."""
    current = mmap.mmap(-1, 256)  # shared: which case is being read, should the child not live to say so
    start = 0
    with tempfile.TemporaryDirectory() as folder:
        while start < count:
            mine, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.close(mine)
                    _child(make, range(start, count), Path(folder), theirs, current)
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            os.close(theirs)
            begun = time.monotonic()
            with os.fdopen(mine, "rb") as stream:
                for line in stream:
                    number, kind, name, told, seconds, memory = json.loads(line)
                    begun, start = time.monotonic(), number + 1
                    yield Result(number, kind, name, Outcome(*told), seconds, memory)
            _, status = os.waitpid(child, 0)
            if status == 0:
                continue
            number, length = struct.unpack_from("<qi", current)
            if number < start:
                raise RuntimeError(f"a child ended with {status:#x} between two cases")
            kind, name = json.loads(current[12 : 12 + length])
            died = os.WTERMSIG(status)
            what = "time" if died == signal.SIGALRM else "crash"
            told = f"took over {SECONDS:g} s" if what == "time" else f"killed the process: status {status:#x}"
            _keep(name, Path(folder) / FILE)
            yield Result(number, kind, name, Outcome(what, told), time.monotonic() - begun, 0)
            start = number + 1


def _child(make: Callable[[int], Case], numbers: range, folder: Path, pipe: int, current: mmap.mmap) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also within compiled code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file = folder / FILE
    for seed in seeds():  # threads, pools and imports are not to be laid at a case's door
        assert outcome(Case("", "", seed.data, (seed,)), file).what == "read"
    limited = False
    for number in numbers:
        case = make(number)
        if not limited:
            base = _memory()
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, resource.RLIM_INFINITY))
            limited = True
        told = json.dumps([case.kind, case.name]).encode()
        struct.pack_into(f"<qi{len(told)}s", current, 0, number, len(told), told)
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        came = outcome(case, file)
        signal.setitimer(signal.ITIMER_REAL, 0)
        taken, more = time.monotonic() - begun, _memory() - base
        if came.failure is None and more > MEMORY:
            came = Outcome("memory", f"took {more >> 20} MiB", came.exit_code, came.message)
        if came.failure:
            _keep(case.name, file)
        fields = [came.what, came.failure, came.exit_code, came.message[:1000]]
        os.write(pipe, json.dumps([number, case.kind, case.name, fields, taken, more]).encode() + b"\n")
        if came.what == "memory" or more > MEMORY // 4:
            os._exit(0)  # what is left of it must not count against the next


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep(name: str, file: Path) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, KEPT / ("".join(c if c.isalnum() or c in "-" else "_" for c in name) + ".parquet"))


# ----------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Read every case, print a table of what came of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lies", action="store_true", help="only those that have a name, one JSON object a line")
    told = parser.parse_args()
    named = by_name()
    if told.lies:
        for result in results(lambda number: named[number](), len(named)):
            print(json.dumps({"kind": result.kind, "name": result.name, **vars(result.outcome),
                              "seconds": round(result.seconds, 3), "mib": result.bytes >> 20}), flush=True)  # fmt: skip
        return
    begun = time.monotonic()
    kinds: dict[str, Counter[str]] = {}
    failures, slowest = 0, 0.0

    def make(number: int) -> Case:
        return named[number]() if number < len(named) else random_case(number, told.seed)

    for result in results(make, max(told.cases, len(named))):
        kinds.setdefault(result.kind, Counter())[result.outcome.what] += 1
        slowest = max(slowest, result.seconds)
        if result.outcome.failure:
            failures += 1
            if failures <= 200:
                print(f"FAILED {result.kind} {result.name}: {result.outcome.failure[:200]}", flush=True)
    whats = sorted(
        {what for counts in kinds.values() for what in counts}, key=lambda w: (w not in ("refused", "read"), w)
    )
    print(f"{'kind':16}" + "".join(f"{what:>14}" for what in whats))
    for kind, counts in kinds.items():
        print(f"{kind:16}" + "".join(f"{counts[what]:14,}" for what in whats))
    total = sum(kinds.values(), Counter[str]())
    print(json.dumps({
        "cases": total.total(), "outcomes": dict(total), "failures": failures, "slowest": round(slowest, 3),
        "seconds": round(time.monotonic() - begun, 1), "seed": told.seed, "pyarrow": pa.__version__,
    }))  # fmt: skip
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
