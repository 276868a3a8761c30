"""ICO files: which of their images is meant. Standard library only."""

from __future__ import annotations

import struct

from qvsplit.sources import png

MAGIC = b"\0\0\1\0"
_HEAD = struct.Struct("<4sH")  # magic, number of images
_ENTRY = struct.Struct("<BBBBHHII")  # width, height, colours, reserved; planes, bits, bytes, offset
_DIB_BITS = 14  # where the head of a bitmap has its bits of a pixel
_PNG_DEPTH = 24  # where that of a PNG has its bits of a sample, and then its colour type
_PNG_SAMPLES = {2: 3, 4: 2, 6: 4}


def largest(data: bytes) -> bytes:
    """Give a file of its largest image alone; of equally large ones, the one of most bits a pixel counts.

    Pillow takes the one of fewest, and refuses a PNG for the texts within it. What is no ICO is given back.
    """
    try:
        _, count = _HEAD.unpack_from(data)
        entries = [_ENTRY.unpack_from(data, _HEAD.size + _ENTRY.size * number) for number in range(count)]
        chosen = max(entries, key=lambda entry: _rank(data, entry))
    except (struct.error, ValueError):  # cut off, or empty
        return data
    *about, length, offset = chosen
    content = data[offset:]
    if content.startswith(png.MAGIC):
        with png.read(content).open() as stream:
            content = stream.read()
        length = len(content)
    return _HEAD.pack(MAGIC, 1) + _ENTRY.pack(*about, length, _HEAD.size + _ENTRY.size) + content


def _rank(data: bytes, entry: tuple[int, ...]) -> tuple[int, int, int]:
    """Give pixels, and bits of each by the image's own head and by the directory, which may say 0."""
    width, height, *_, said, _, offset = entry
    return (width or 256) * (height or 256), _bits(data, offset), said


def _bits(data: bytes, offset: int) -> int:
    """Give the bits a pixel of the image at `offset`, by its own head."""
    if data.startswith(png.MAGIC, offset):
        depth, colour = data[offset + _PNG_DEPTH : offset + _PNG_DEPTH + 2]
        return depth * _PNG_SAMPLES.get(colour, 1)
    return int.from_bytes(data[offset + _DIB_BITS : offset + _DIB_BITS + 2], "little")
