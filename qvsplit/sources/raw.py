"""Camera RAW files, told by their content. Most are TIFF, and Pillow would take their thumbnail for the image.

A RAW file has the values of the sensor, from which each developer makes another image. Standard library only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = {
    b"IIRO": "Olympus ORF", b"IIRS": "Olympus ORF", b"MMOR": "Olympus ORF", b"IIU\0": "Panasonic RW2",
    b"FUJIFILMCCD-RAW": "Fujifilm RAF", b"FOVb": "Sigma X3F", b"\0MRM": "Minolta MRW",
}  # fmt: skip
_CR2, _CR2_DIRECTORY = b"CR\2", 16  # behind the head of a TIFF, and where the first directory lies then
_IIQ = re.compile(rb"IIII.waR|MMMMRaw", re.DOTALL)
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
_IFDS, _ENTRIES = 64, 4096  # that are looked at, of a file and of a directory

_COMPRESSION, _PHOTOMETRIC, _MAKE, _INNER, _DNG_VERSION = 259, 262, 271, 330, 50706
_SENSOR = frozenset({32803, 34892})  # photometric interpretations: behind a colour filter each, or all colours of each
# Sony ARW 32767; packed by Epson and Samsung 32769, 32770; Nikon NEF 34713; Kodak 65000; Pentax PEF 65535
_COMPRESSIONS = frozenset({32767, 32769, 32770, 34713, 65000, 65535})
_BY_MAKE = {
    "NIKON": "Nikon NEF", "SONY": "Sony ARW", "PENTAX": "Pentax PEF", "SAMSUNG": "Samsung SRW", "EPSON": "Epson ERF",
    "KODAK": "Kodak DCR", "EASTMAN KODAK": "Kodak DCR", "HASSELBLAD": "Hasselblad 3FR", "MAMIYA": "Mamiya MEF",
    "LEAF": "Leaf MOS", "CANON": "Canon TIF", "RICOH": "Pentax PEF", "LEICA": "Leica RWL", "PHASE ONE": "Phase One IIQ",
}  # fmt: skip


@dataclass(frozen=True)
class _Format:
    """How a TIFF has its numbers: the order of bytes."""

    order: str

    def number(self, data: bytes, at: int, code: str) -> int:
        return int(struct.unpack_from(self.order + code, data, at)[0])


def raw_kind(data: bytes) -> str | None:
    """Name the kind of RAW file that `data` is; None where it is none."""
    if data[4:12] == b"ftypcrx ":
        return "Canon CR3"
    if data[6:14] == b"HEAPCCDR":
        return "Canon CRW"
    if (named := next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)) is not None:
        return named
    order = _TIFF.get(data[:4])
    if order is None:
        return None
    form = _Format(order)
    if data.startswith(_CR2, 8) and form.number(data, 4, "I") == _CR2_DIRECTORY:
        return "Canon CR2"
    return "Phase One IIQ" if _IIQ.match(data, 8) else _tiff_kind(data, form)


def _tiff_kind(data: bytes, form: _Format) -> str | None:
    """Name the kind by the directories of a TIFF: by its DNG version, or by an image of the sensor's values."""
    make = ""
    for tags in _directories(data, form):
        if _DNG_VERSION in tags:
            return "DNG"
        if _MAKE in tags:
            make = make or _text(data, form, tags[_MAKE]).upper()
        photometric, compression = (_short(data, form, tags, tag) for tag in (_PHOTOMETRIC, _COMPRESSION))
        if photometric in _SENSOR or compression in _COMPRESSIONS:
            return next((kind for name, kind in _BY_MAKE.items() if make.startswith(name)), "unknown maker")
    return None


def _directories(data: bytes, form: _Format) -> Iterator[dict[int, int]]:
    """Give the directories of a TIFF, and those within: each tag → where its entry lies; broken ones are left out."""
    waiting, seen = [form.number(data, 4, "I") if len(data) >= 8 else 0], set[int]()
    while waiting and len(seen) < _IFDS:
        at = waiting.pop(0)
        if at in seen or not 0 < at <= len(data) - 2:
            continue
        seen.add(at)
        count = form.number(data, at, "H")
        end = at + 2 + 12 * count
        if count > _ENTRIES or end > len(data):
            continue
        tags = {form.number(data, place, "H"): place for place in range(at + 2, end, 12)}
        yield tags
        waiting += _inner(data, form, tags)
        if end + 4 <= len(data):
            waiting.append(form.number(data, end, "I"))


def _inner(data: bytes, form: _Format, tags: dict[int, int]) -> list[int]:
    """Give where the directories within one lie."""
    if _INNER not in tags:
        return []
    place = tags[_INNER]
    count = min(form.number(data, place + 4, "I"), _IFDS)
    at = place + 8 if count == 1 else form.number(data, place + 8, "I")
    return [form.number(data, one, "I") for one in range(at, at + 4 * count, 4) if one + 4 <= len(data)]


def _short(data: bytes, form: _Format, tags: dict[int, int], tag: int) -> int | None:
    """Give the one number of a tag, of 16 or 32 bits; None where it has none."""
    if tag not in tags:
        return None
    place = tags[tag]
    return form.number(data, place + 8, "I" if form.number(data, place + 2, "H") == 4 else "H")


def _text(data: bytes, form: _Format, place: int) -> str:
    """Give the text of a tag."""
    count = form.number(data, place + 4, "I")
    at = place + 8 if count <= 4 else form.number(data, place + 8, "I")
    return data[at : at + min(count, 64)].split(b"\0")[0].decode("latin-1").strip()
