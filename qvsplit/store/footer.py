"""The footer checksum: 40 bytes before a Parquet footer that no Parquet reader looks at.

Parquet's own checksums cover pages, not the footer. A flipped byte there can change a name or a count and still parse.
"""

from __future__ import annotations

import hashlib
import os
from typing import IO

MAGIC = b"PAR1"
CHECKSUM_MAGIC = b"QVSEAL01"
CHECKSUM_BYTES = len(CHECKSUM_MAGIC) + 32
MAX_FOOTER_BYTES = 8 << 20  # a shard of 64 row groups has some 400 kB


class NotAShard(ValueError):
    """The file is something else altogether."""


def insert_checksum(stream: IO[bytes]) -> int:
    """Insert the footer's checksum before the footer of a finished Parquet file; gives the file's size in bytes."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(end - 8)
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(end - 8 - length)
    footer = stream.read(length)
    stream.seek(end - 8 - length)
    stream.write(CHECKSUM_MAGIC + hashlib.sha256(footer).digest() + footer + length.to_bytes(4, "little") + MAGIC)
    return stream.tell()


def read_footer(stream: IO[bytes]) -> bytes:
    """Give the footer, held against its checksum. Reads the file's two ends only.

    Raises:
        NotAShard: The file is no Parquet file, or has no footer checksum.
        ValueError: It is damaged.
    """
    head = _exactly(stream, 0, 4)
    end = stream.seek(0, os.SEEK_END)
    if head != MAGIC:
        raise NotAShard("it is not a Parquet file")
    tail = _exactly(stream, max(0, end - 8), 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length > min(end - 12 - CHECKSUM_BYTES, MAX_FOOTER_BYTES):
        raise ValueError("it is cut short or overwritten")
    both = _exactly(stream, end - 8 - length - CHECKSUM_BYTES, CHECKSUM_BYTES + length)
    checksum, footer = both[:CHECKSUM_BYTES], both[CHECKSUM_BYTES:]
    if not checksum.startswith(CHECKSUM_MAGIC):
        raise NotAShard("it is a Parquet file without a footer checksum of qvsplit's, or altered since")
    if checksum[len(CHECKSUM_MAGIC) :] != hashlib.sha256(footer).digest():
        raise ValueError("its footer checksum does not match")
    return footer


def _exactly(stream: IO[bytes], start: int, length: int) -> bytes:
    """Read so many bytes, fewer only at the file's end: an unbuffered stream may give fewer at a time."""
    stream.seek(start)
    parts = bytearray()
    while len(parts) < length and (more := stream.read(length - len(parts))):
        parts += more
    return bytes(parts)
