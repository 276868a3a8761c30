"""Files whose pixels are whole and whose end is not as their header says: WebP and BMP. Standard library only."""

from __future__ import annotations

import struct

_RIFF_HEAD = 12  # "RIFF", bytes that follow, "WEBP"
_ANIMATION = 2  # a bit of the first chunk
_RLE = (1, 2)  # compressions of BMP


def whole_webp(data: bytes) -> tuple[bytes, bool]:
    """Give a WebP with those of its chunks that are whole and a size that is right, and whether something is missing.

    libwebp refuses a file of another size than its header says, though only metadata behind the pixels may be missing.
    A sound file is given back itself; so is one whose first chunk is not whole, and an animation that is cut off.
    """
    said, at, end = int.from_bytes(data[4:8], "little") + 8, _RIFF_HEAD, _RIFF_HEAD
    while at + 8 <= len(data):
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if at > len(data):
            break
        end = at = at + at % 2  # padding
        if end == said <= len(data):
            return data, False  # whatever comes behind it
    if end == _RIFF_HEAD or (said > len(data) and _is_animated(data)):
        return data, False  # of an animation, frames are missing
    content = (data + b"\0")[_RIFF_HEAD:end]
    return b"RIFF" + struct.pack("<I", end - 8) + b"WEBP" + content, said > len(data)


def _is_animated(data: bytes) -> bool:
    return data[_RIFF_HEAD : _RIFF_HEAD + 4] == b"VP8X" and bool(data[_RIFF_HEAD + 8] & _ANIMATION)


def whole_bmp(data: bytes, size: tuple[int, int]) -> bytes | None:
    """Give a BMP with the bytes that fill up its last row, which are no pixels; None where pixels are missing.

    Args:
        data: A file that is cut off.
        size: Width and height in pixels.
    """
    has_long_head = int.from_bytes(data[14:18], "little") >= 40
    if has_long_head and int.from_bytes(data[30:34], "little") in _RLE:
        return None
    (width, height), start = size, int.from_bytes(data[10:14], "little")
    bits = int.from_bytes(data[28:30] if has_long_head else data[24:26], "little")
    used = (width * bits + 7) // 8
    filling = -used % 4
    is_whole = len(data) >= start + (used + filling) * height - filling
    return data + bytes(filling) if is_whole else None
