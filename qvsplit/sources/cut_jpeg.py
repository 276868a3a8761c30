"""A JPEG that is whole but for its last bytes: which of its rows of pixels the file has.

A decoder of JPEG never says where the data ended: it goes on with zeros, and gives grey. So the file is decoded several
times, each with other bytes for those that are missing. A row that is the same every time came from the file; from the
first that is not on, something is missing. For that to hold, every part of the image must have begun: each component,
and of a progressive file each bit of each coefficient.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qvsplit.sources.jpeg_segments import EOI, SOS, segments

if TYPE_CHECKING:
    from PIL import Image

MISSING_SHARE = 16  # of its rows one in so many may be touched
_PADDING_BYTES = 16
_END = b"\xff\xd9"
_FILLERS = 4
_FILLER_BYTES = 4096  # where they begin to make a difference is what counts, so these need not last
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
_COEFFICIENTS = 64
_RESTART_INTERVAL, _SCAN = b"\xff\xdd\0\4", b"\xff\xda"
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


def completed(data: bytes) -> bytes:
    """Give the file with an end: what is missing becomes grey."""
    return _without_padding(data) + _END


def missing_rows(data: bytes, load: Callable[[bytes], Image.Image]) -> int | None:
    """Count the rows of pixels, from the last one up, of which something is missing; 0 where only the end is.

    Args:
        data: A JPEG that ends too early.
        load: Decodes a JPEG.

    Returns:
        None where that are more than one in MISSING_SHARE, or a part of the image has not even begun.
    """
    if not _is_begun(data):
        return None
    there = _row_checksums(load(completed(data)))
    first, begun = len(there), _without_padding(data)
    for filler in _fillers(begun):
        filled = _row_checksums(load(begun + filler + _END))
        first = next((row for row in range(first) if filled[row] != there[row]), first)
        if (len(there) - first) * MISSING_SHARE > len(there):
            return None
    return len(there) - first


def _fillers(data: bytes) -> Iterator[bytes]:
    """Give bytes that may follow: any, and where a file has restarts also such behind the next of their markers.

    At the end of an interval a decoder skips all that is no such marker, whatever it is.
    """
    markers = [b""]
    if _RESTART_INTERVAL in data:
        last = next(iter(_RESTART.findall(data, max(0, data.rfind(_SCAN)))[-1:]), b"\xff\xd7")
        markers.append(bytes((0xFF, 0xD0 + (last[1] + 1) % 8)))
    for number in range(_FILLERS):
        filler = random.Random(number).randbytes(_FILLER_BYTES).replace(b"\xff", b"\xfe")
        yield from (marker + filler for marker in markers)


def _without_padding(data: bytes) -> bytes:
    """Take off half a marker, and the one byte, over and over, with which a file is filled that was never finished."""
    stripped = data.rstrip(data[-1:])
    return (data if len(data) - len(stripped) < 2 else stripped).rstrip(b"\xff")


def _row_checksums(image: Image.Image) -> list[int]:
    width, height = image.size
    return [zlib.crc32(image.crop((0, row, width, row + 1)).tobytes()) for row in range(height)]


def is_padded(data: bytes) -> bool:
    """Say whether one byte, over and over, stands where a JPEG would go on: a decoder would make an image of it."""
    return data.endswith(data[-1:] * _PADDING_BYTES) and all(marker != EOI for marker, _ in segments(data))


def _is_begun(data: bytes) -> bool:
    """Say whether there is a scan of every component, and in the end of every bit of every coefficient."""
    to_come: dict[int, set[int]] = {}  # component → coefficients whose last bits have not been seen
    progressive = False
    for marker, body in segments(data):
        if marker == EOI:
            return False  # it has an end: something else is wrong with it
        if marker in _SEQUENTIAL + _PROGRESSIVE:
            progressive = marker in _PROGRESSIVE
            to_come = {body[6 + 3 * number]: set(range(_COEFFICIENTS)) for number in range(body[5])}
        elif marker == SOS:
            count = body[0]
            first, last, bits = body[2 * count + 1 : 2 * count + 4] if progressive else (0, _COEFFICIENTS - 1, 0)
            for component in body[1 : 2 * count : 2] if not bits & 15 else ():
                to_come.get(component, set()).difference_update(range(first, last + 1))
    return bool(to_come) and not any(to_come.values())
