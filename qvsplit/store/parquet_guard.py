"""The page headers of a Parquet file: what a page says it will grow to, before anything is given room for it.

A footer may understate its columns, and Parquet readers give a page the room its own header asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

MAX_HEADER_BYTES = 1 << 16
DELTA_BYTE_ARRAY = 7
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_OWN_FIELDS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # each kind's own field


class Page(NamedTuple):
    """What one page's header says."""

    size: int  # once decompressed
    values: int  # rows or list items; 0 for a dictionary
    repeats: bool  # whether a few of its bytes may stand for one value after another


def pages(stream: IO[bytes], start: int, length: int) -> Iterator[Page]:
    """The pages of one column chunk. ValueError for what is no page, has no CRC, or leaves the chunk."""
    at, end = start, start + length
    while at < end:
        stream.seek(at)
        data = stream.read(min(MAX_HEADER_BYTES, end - at, 512))
        try:
            header, used = _struct(data, 0, _HEADER)
        except (IndexError, RecursionError):
            stream.seek(at)
            try:
                header, used = _struct(stream.read(min(MAX_HEADER_BYTES, end - at)), 0, _HEADER)
            except (IndexError, RecursionError):
                raise ValueError("a page without a header") from None
        kind, size, packed = header.get(1), header.get(2), header.get(3)
        own = header.get(_OWN_FIELDS[kind]) if isinstance(kind, int) and kind in _OWN_FIELDS else None
        if not (isinstance(own, dict) and isinstance(size, int) and isinstance(packed, int) and size >= 0 <= packed):
            raise ValueError("a page header that says nothing")
        if not isinstance(header.get(4), int):
            raise ValueError("a page without a checksum")
        at += used + packed
        if at > end:
            raise ValueError("a page that is longer than its column")
        values = own.get(1)
        encoding = own.get(4 if kind == _DATA_V2 else 2)
        if not isinstance(values, int) or values < 0:
            raise ValueError("a page of no number of values")
        if kind == _DICTIONARY and values > size:
            raise ValueError("a dictionary of more values than bytes")
        yield Page(size, 0 if kind == _DICTIONARY else values, kind == _DICTIONARY or encoding == DELTA_BYTE_ARRAY)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")


_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
# Fields wanted of a struct: their types, as a reader passes over a field of another type. A dict: of a struct, or of
# each struct of a list
Wanted = dict[int, Any]
# row_groups: columns: meta_data: path_in_schema, total_compressed_size, data_page_offset, dictionary_page_offset
_FOOTER: Wanted = {4: {1: {3: {3: _LIST, 7: _I64, 9: _I64, 11: _I64}}}}
_HEADER: Wanted = {1: _I32, 2: _I32, 3: _I32, 4: _I32, 5: {1: _I32, 2: _I32}, 7: {1: _I32, 2: _I32},
                   8: {1: _I32, 4: _I32}}  # fmt: skip


class Chunk(NamedTuple):
    """Where the pages of one column of one row group lie."""

    column: str
    start: int
    length: int


def chunks(footer: bytes) -> list[list[Chunk]]:
    """The column chunks of each row group. ValueError for a footer without them.

    pyarrow's own account of them ends the process where a footer's statistics contradict its schema.
    """
    try:
        groups = _struct(footer, 0, _FOOTER)[0].get(4) or []
        return [[_chunk(column[3]) for column in group.get(1) or []] for group in groups]
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("a footer that does not say where its columns are") from None


def _chunk(meta: dict[int, Any]) -> Chunk:
    start, length = min(place for place in (meta[9], meta.get(11)) if place), meta[7]
    if not (isinstance(start, int) and isinstance(length, int) and start >= 4 and length > 0):
        raise ValueError("a column that lies nowhere")
    return Chunk(meta[3][0].decode(), start, length)


def _struct(data: bytes, at: int, wanted: Wanted) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: those of its fields that are `wanted`. IndexError where it is cut."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            raw, at = _varint(data, at)
            number = raw >> 1 ^ -(raw & 1)
        of = wanted.get(number)
        kind = head & 15
        value, at = _value(data, at, kind, of if isinstance(of, dict) else {})
        if of is not None:
            if number in fields or not (kind == of or (isinstance(of, dict) and kind in (_LIST, _STRUCT))):
                raise ValueError("a field of another type, or there twice")
            fields[number] = value
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, wanted: Wanted) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        raw, at = _varint(data, at)
        return raw >> 1 ^ -(raw & 1), at
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind == 12:
        return _struct(data, at, wanted)
    if kind in (1, 2):
        return None, at
    if kind in (3, 7):
        return None, at + (1 if kind == 3 else 8)
    if kind not in (9, 10):
        raise ValueError("a type that has no place here")
    head, at = data[at], at + 1
    count, inner = head >> 4, head & 15
    if count == 15:
        count, at = _varint(data, at)
    if count > len(data) - at:  # each takes a byte at least
        raise IndexError(count)
    if inner in (1, 2):
        return None, at + count
    values = []
    for _ in range(count):
        value, at = _value(data, at, inner, wanted)
        values.append(value)
    return values, at
