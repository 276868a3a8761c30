"""The segments of a JPEG: its headers, and what applications have put between them. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAGIC = b"\xff\xd8\xff"
SOS, EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_BESIDE = {*range(0xE0, 0xF0), 0xFE}  # what applications say, and comments
_EXIF = b"Exif\0\0"
_ADOBE, _ADOBE_BYTES = 0xEE, 12  # says what the colours are


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Give each marker of a JPEG and what belongs to it, up to its end, or to what is not whole."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker == EOI:
            yield marker, b""
            return
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if len(body) != length - 2:
            return
        yield marker, body
        at += length


def without_metadata(data: bytes) -> bytes:
    """Give a JPEG without what lies beside its pixels, but for what says which way is up or what the colours are."""
    kept, end = [data[:2]], 2
    for marker, body in segments(data):
        if marker in (SOS, EOI):
            break
        head = bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big")
        end = data.find(head, end) + len(head) + len(body)
        is_adobe = marker == _ADOBE and len(body) >= _ADOBE_BYTES
        if marker not in _BESIDE or body.startswith(_EXIF) or is_adobe:
            kept += [head, body]
    return b"".join([*kept, data[end:]])
