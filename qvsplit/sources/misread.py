"""Images that Pillow decodes to other pixels than they mean without a word, told by their headers: they are refused.

So are sound ones that it would call broken. Each kind was found by holding Pillow against a second decoder over public
test files: docs/images.md. What is cut off or damaged is left to Pillow. Standard library only; nothing is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from qvsplit.sources.faults import iso_kind, not_supported
from qvsplit.sources.jpeg_segments import MAGIC, SOS, segments

_JP2, _CODESTREAM = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
_SIZ = struct.Struct(">HHIIIIIIIIH")  # length, capabilities; size, offset, tile and its offset; channels
_MOST_CHANNELS = 4
_DEEPEST = 38  # bits of a sample; more is damage
_NAMED = 1  # how a box of colours says its space; all other ways are profiles
_KNOWN_SPACES = {12, 16, 17, 18}  # CMYK, sRGB, grey and sYCC
_SPACES = {14: "CIE L*a*b*", 20: "e-sRGB", 21: "ROMM RGB", 24: "e-sYCC"}
# Boxes that hold boxes, of JPEG 2000 and AVIF: how many bytes come before those
_CONTAINERS = {
    b"jp2h": 0, b"meta": 4, b"iprp": 0, b"ipco": 0,
    b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0, b"stsd": 8, b"av01": 78,
}  # fmt: skip
_RLE4 = 2
_PROCESSES = {
    0xC3: "lossless", 0xC5: "differential", 0xC6: "differential", 0xC7: "lossless", 0xCB: "lossless",
    0xCD: "differential", 0xCE: "differential", 0xCF: "lossless",
}  # fmt: skip


def check(data: bytes) -> None:
    """Refuse what would come out wrong. ItemError with the reason."""
    try:
        what = _misread(data)
    except (struct.error, IndexError):  # it is cut off
        return
    if what is not None:
        raise not_supported(what)


def _misread(data: bytes) -> str | None:
    if data.startswith((_JP2, _CODESTREAM)):
        fault = _jpeg2000_fault(data)
        return None if fault is None else f"a JPEG 2000 file {fault}"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") >= 40:
        return "a BMP file of 4 bits packed by runs" if int.from_bytes(data[30:34], "little") == _RLE4 else None
    if data.startswith(MAGIC):
        return _unread_jpeg(data)
    if iso_kind(data) == "AVIF" and any(kind == b"clap" for kind, _, _ in _boxes(data)):
        return "an AVIF file of whose pixels some are to be cut off (clap)"
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Give each box of an ISO file, a container before what it holds: its kind, where its content begins and ends."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, at + 8), 16
        end = at + length if length else len(data)
        if end < at + head:
            return
        yield kind, at + head, end
        at = at + head + _CONTAINERS[kind] if kind in _CONTAINERS else end


# ---------------------------------------------------------------------------------------------------------- JPEG 2000


def _jpeg2000_fault(data: bytes) -> str | None:
    """Say what Pillow gets wrong, by the boxes around the samples and by the samples' header."""
    if data.startswith(_CODESTREAM):
        return _samples_fault(data, 0)
    spaces, is_named = [], True
    for kind, at, _ in _boxes(data):
        if kind == b"cdef" and _is_reordered(data, at):
            return "whose colours are stored in another order"
        if kind == b"colr":
            is_named = is_named and data[at] == _NAMED
            spaces.append(int.from_bytes(data[at + 3 : at + 7], "big"))
        if kind == b"jp2c":
            if spaces and is_named and not _KNOWN_SPACES & set(spaces):
                return f"in {_SPACES.get(spaces[0], f'the colour space {spaces[0]}')}"
            return _samples_fault(data, at)
    return None


def _is_reordered(data: bytes, at: int) -> bool:
    """Say whether the box of channels gives the colours another order than they are stored in."""
    (count,) = struct.unpack_from(">H", data, at)
    channels = (struct.unpack_from(">HHH", data, at + 2 + 6 * number) for number in range(min(count, 16)))
    return any(kind == 0 and colour not in (0, 65535, number + 1) for number, kind, colour in channels)


def _samples_fault(data: bytes, start: int) -> str | None:
    if not data.startswith(_CODESTREAM, start):
        return None
    _, _, right, bottom, left, top, *tile, count = _SIZ.unpack_from(data, start + len(_CODESTREAM))
    if count > _MOST_CHANNELS:
        return f"of {count:,} channels"
    at = start + len(_CODESTREAM) + _SIZ.size
    channels = [(data[place] % 128 + 1, data[place + 1], data[place + 2]) for place in range(at, at + 3 * count, 3)]
    depth = max((bits for bits, _, _ in channels), default=0)
    # Pillow rounds all but greys to 8 bits, and the highest values wrap: white becomes black. A grey of 9 bits is one
    # of 16 to it where there are no boxes.
    if 8 < depth <= _DEEPEST and (count > 1 or (depth == 9 and start > 0)):
        return f"whose colours have {depth} bits"
    steps = {(across, down) for _, across, down in channels}
    if len(steps) < 2 or any(0 in step for step in steps):
        return None  # all have as many pixels, or it is damaged
    corners = [(right, bottom), (left, top)]
    if tile[0] < right - left or tile[1] < bottom - top:
        corners += [(tile[0], tile[1]), (tile[2], tile[3])]
    if count != 3 or not _are_multiples(corners, steps):
        return "some of whose colours have fewer pixels than others, in this way"
    return None


def _are_multiples(corners: Sequence[tuple[int, int]], steps: set[tuple[int, int]]) -> bool:
    """Whether no corner lies within a step: Pillow takes smaller planes for rounded down, which are rounded up."""
    return all(x % across == 0 and y % down == 0 for x, y in corners for across, down in steps)


# --------------------------------------------------------------------------------------------------------------- JPEG


def _unread_jpeg(data: bytes) -> str | None:
    """Say what kind of JPEG it is, of those that Pillow calls broken: another process, or other than 8 bits."""
    for marker, body in segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if (process := _PROCESSES.get(marker)) is not None:
                return f"a {process} JPEG file"
            return f"a JPEG file of {body[0]} bits a sample" if body[0] in (12, 16) else None
        if marker == SOS:
            return None
    return None
