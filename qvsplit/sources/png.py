"""PNG as Pillow should see it: the chunks that make the picture, and transparency at its full depth.

Text and colour profiles are of no use here, may be megabytes, and unpack to any size: Pillow refuses a file for them,
and lets a text by the name of one of its own settings stand in for that. They are passed over unread, but for what says
which way is up; and so is an ancillary chunk that is damaged, as in libpng. Standard library, and Pillow where it is
given an image.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Buffer

MAGIC = b"\x89PNG\r\n\x1a\n"
_PICTURE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION = frozenset({b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif"})  # where Pillow looks for it
_PACKED_BYTES = 1 << 20  # a text that unpacks to more is passed over
_TEXT_BYTES = 16 << 20  # of all texts that are kept
_GREY, _RGB = 0, 2  # colour types


@dataclass(frozen=True)
class Png:
    """What of a PNG makes its picture.

    Attributes:
        pieces: Those of its bytes, uncopied.
        depth: Bits of a sample.
        colour: The colour type.
        transparent: The content of `tRNS`; empty where there is none.
        is_whole: Whether the chunk that ends a PNG is there.
    """

    pieces: Sequence[memoryview] = field(repr=False)
    depth: int
    colour: int
    transparent: bytes
    is_whole: bool

    def open(self) -> io.BufferedReader:
        """Give these bytes as a file."""
        return io.BufferedReader(_Pieces(self.pieces))


def read(data: bytes) -> Png:
    """Find what of `data`, which begins with MAGIC, makes its picture. What is no chunk, and all behind it, is kept."""
    view, pieces, start = memoryview(data), [], 0
    texts, transparent, is_whole, is_kept = 0, b"", False, True
    for kind, at, end in _chunks(view):
        is_kept = kind in _PICTURE
        if end > len(data):
            break
        body = view[at + 8 : end - 4]
        if kind in _TEXTS and (size := _orientation_bytes(kind, body)) is not None:
            texts += size
            is_kept = texts <= _TEXT_BYTES
        elif kind in {b"tRNS", b"eXIf"}:
            is_kept = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
            transparent = bytes(body) if is_kept and kind == b"tRNS" else transparent
        if not is_kept:
            pieces.append(view[start:at])
            start = end
        is_whole = kind == b"IEND"
    else:
        is_kept = True
    pieces.append(view[start:] if is_kept else view[start:at])
    depth, colour = (data[24], data[25]) if len(data) > 25 else (0, 0)
    return Png([piece for piece in pieces if piece], depth, colour, transparent, is_whole)


def make_transparent(image: Image.Image, png: Png) -> None:
    """Give a loaded grey or RGB image the alpha that its `tRNS` asks for: none where a pixel is that colour.

    Pillow compares 2 and 4 bits scaled to 8 with a number that is not, and 16 bits of RGB by their high byte. Palettes
    and 16-bit greys are left to it, and to `pixels`.
    """
    count = {_GREY: 1, _RGB: 3}.get(png.colour)
    if count is None or image.mode == "I;16":
        return
    image.info.pop("transparency", None)
    if len(png.transparent) < 2 * count:
        return
    from PIL import ImageChops

    colour = [int.from_bytes(png.transparent[at : at + 2], "big") for at in range(0, 2 * count, 2)]
    if png.depth == 16:
        opaque = ImageChops.lighter(
            _differing(image, [value >> 8 for value in colour]),
            _differing(_low_bytes(png), [value & 255 for value in colour]),
        )
    else:
        most = (1 << png.depth) - 1
        opaque = _differing(image, [(value & most) * 255 // most for value in colour])
    image.putalpha(opaque)


def _differing(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """Give 255 where an 8-bit image is not of this colour, 0 where it is: an image of mode L."""
    from PIL import ImageChops

    bands = (image.convert("L"),) if len(colour) == 1 else (image.getchannel(number) for number in range(len(colour)))
    found: Image.Image | None = None
    for band, value in zip(bands, colour, strict=True):
        differs = band.point([0 if level == value else 255 for level in range(256)])
        found = differs if found is None else ImageChops.lighter(found, differs)
    assert found is not None
    return found


def _low_bytes(png: Png) -> Image.Image:
    """Decode a 16-bit RGB once more, for the low bytes, which Pillow drops: it is told that they are the high ones."""
    from PIL import Image

    image = Image.open(png.open(), formats=("PNG",))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    image.load()
    return image


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Give kind, beginning and end of one chunk after the other, up to IEND, or to what can be none."""
    at = len(MAGIC)
    while at + 12 <= len(view):
        kind = bytes(view[at + 4 : at + 8])
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if not kind.isalpha():
            return
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def _orientation_bytes(kind: bytes, body: memoryview) -> int | None:
    """Give the bytes of a text that may say which way is up, unpacked; None of any other, and of one too large."""
    keyword, found, _ = bytes(body[:80]).partition(b"\0")
    if not found or keyword not in _ORIENTATION:
        return None
    rest = body[len(keyword) + 1 :]
    if kind == b"tEXt" or (kind == b"iTXt" and not any(rest[:1])):
        return len(rest)
    packed = rest[1:] if kind == b"zTXt" else bytes(rest[2:]).split(b"\0", 2)[-1]
    try:
        unpacking = zlib.decompressobj()
        size = len(unpacking.decompress(packed, _PACKED_BYTES))
    except zlib.error:
        return None
    return None if unpacking.unconsumed_tail else size


class _Pieces(io.RawIOBase):
    """Pieces of bytes one behind the other, as a file that can be read."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self._starts = [0]
        for piece in pieces:
            self._starts.append(self._starts[-1] + len(piece))
        self._at = 0
        self._current = 0  # the piece that `_at` is in

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        from bisect import bisect_right

        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence]
        self._at = max(0, base + offset)
        self._current = bisect_right(self._starts, self._at) - 1
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        if self._current >= len(self._pieces):
            return 0
        begin = self._at - self._starts[self._current]
        target = memoryview(buffer).cast("B")
        piece = self._pieces[self._current][begin : begin + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        self._current += self._at == self._starts[self._current + 1]
        return len(piece)
