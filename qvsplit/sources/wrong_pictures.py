"""Images that Pillow decodes to a wrong picture without a word, told by their headers: they are refused.

Each was found by holding Pillow against a second decoder over public test files: docs/images.md. Standard library only.
"""

from __future__ import annotations

import struct

from qvsplit.sources.faults import not_supported

_CODESTREAM = b"\xff\x4f\xff\x51"
_SIZ = struct.Struct(">HHIIIIIIIIH")  # length, capabilities; size, offset, tile and its offset; components
_MOST_CHANNELS = 4
_DEEPEST = 38  # bits of a sample; more is damage
_RLE4 = 2
_PROCESSES = {
    0xC3: "lossless", 0xC5: "differential", 0xC6: "differential", 0xC7: "lossless", 0xCB: "lossless",
    0xCD: "differential", 0xCE: "differential", 0xCF: "lossless",
}  # fmt: skip


def check(data: bytes) -> None:
    """Refuse what would come out wrong. ItemError with the reason."""
    what = None
    if data.startswith((b"\0\0\0\x0cjP  ", _CODESTREAM)):
        what = _wrong_in_jpeg2000(data)
    elif data.startswith(b"BM") and len(data) >= 34 and int.from_bytes(data[14:18], "little") >= 40:
        what = "a BMP file of 4 bits packed by runs" if int.from_bytes(data[30:34], "little") == _RLE4 else None
    elif data.startswith(b"\xff\xd8\xff"):
        what = _unread_jpeg(data)
    if what is not None:
        raise not_supported(what)


def _wrong_in_jpeg2000(data: bytes) -> str | None:
    """Say what Pillow gets wrong: deep colours wrap from white to black, chroma of odd sizes is sheared."""
    at = data.find(_CODESTREAM) + len(_CODESTREAM)
    if at < len(_CODESTREAM) or len(data) < at + _SIZ.size:
        return None
    _, _, right, bottom, left, top, tile_width, tile_height, _, _, count = _SIZ.unpack_from(data, at)
    parts = data[at + _SIZ.size : at + _SIZ.size + 3 * count]
    depth = max((bits & 127) + 1 for bits in parts[::3]) if parts[::3] else 0
    if count > _MOST_CHANNELS:
        return f"a JPEG 2000 file of {count:,} channels"
    if (count > 1 and 8 < depth <= _DEEPEST) or (count == 1 and depth == 9 and not data.startswith(_CODESTREAM)):
        return f"a JPEG 2000 file whose colours have {depth} bits"
    steps = set(zip(parts[1::3], parts[2::3], strict=False))
    if len(steps) > 1:  # some have fewer pixels than others
        across, down = max(step[0] for step in steps) or 1, max(step[1] for step in steps) or 1
        one_tile = tile_width >= right and tile_height >= bottom
        sizes = (
            [(right - left, bottom - top)] if one_tile else [(right - left, bottom - top), (tile_width, tile_height)]
        )
        if count > 3 or any(width % across or height % down for width, height in sizes):
            return "a JPEG 2000 file whose colours have fewer pixels than it, in this way"
    channels = _channels(data[: at - len(_CODESTREAM)])
    if any(kind == 0 and meant not in (0, 65535, number + 1) for number, kind, meant in channels):
        return "a JPEG 2000 file whose colours are stored in another order"
    return None


def _channels(head: bytes) -> list[tuple[int, int, int]]:
    """Give what the channel definition box says, if there is one: number, kind and what colour it is."""
    at = head.find(b"cdef")
    if at < 4 or len(head) < at + 6:
        return []
    count = int.from_bytes(head[at + 4 : at + 6], "big")
    return [
        struct.unpack_from(">HHH", head, place)
        for place in range(at + 6, at + 6 + 6 * count, 6)
        if place + 6 <= len(head)
    ]


def _unread_jpeg(data: bytes) -> str | None:
    """Say what kind of JPEG it is, of those that Pillow calls broken: another process, or other than 8 bits."""
    at = 2
    while at + 5 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if (process := _PROCESSES.get(marker)) is not None:
                return f"a {process} JPEG file"
            return f"a JPEG file of {data[at + 4]} bits a sample" if data[at + 4] in (12, 16) else None
        if marker in (0xDA, 0xD9):
            return None
        at += 2 + length
    return None
