"""PNG as Pillow should see it: the chunks that make the image, and transparency at its full depth.

Text and colour profiles are of no use here, may be megabytes, and unpack to any size: Pillow refuses a file for them,
and lets a text by the name of one of its own settings stand in for that. They are passed over unread, but for what says
which way is up; so are the frames of an animation behind the first one, and an ancillary chunk that is damaged, as in
libpng. Standard library, and Pillow where it is given an image.
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
_IMAGE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION = frozenset({b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif"})  # where Pillow looks for it
_PACKED_BYTES = 1 << 20  # a text that unpacks to more is passed over
_TEXT_BYTES = 16 << 20  # of all texts that are kept
_LEAST_BYTES = 12  # of a chunk
_GREY, _RGB = 0, 2  # colour types


@dataclass(frozen=True)
class Png:
    """What of a PNG makes its image.

    Attributes:
        pieces: Those of its bytes, uncopied.
        depth: Bits of a sample.
        colour: The colour type.
        transparent: The content of `tRNS`; empty where there is none.
        is_whole: Whether the chunk that ends a PNG is there.
        frames: How many images of an animation there are, with one that is not shown in it; 1 where there is none.
    """

    pieces: Sequence[memoryview] = field(repr=False)
    depth: int
    colour: int
    transparent: bytes
    is_whole: bool
    frames: int

    def open(self) -> io.BufferedReader:
        """Give these bytes as a file."""
        return io.BufferedReader(_Pieces(self.pieces))


def read(data: bytes) -> Png:
    """Find what of `data`, which begins with MAGIC, makes its image. What is no chunk, and all behind it, is kept."""
    view, pieces, start, end = memoryview(data), [], 0, len(MAGIC)
    texts, transparent, is_whole, has_pixels = 0, b"", False, False
    order: list[bytes] = []  # in which what tells of an animation comes
    for kind, at, end in _chunks(view):
        is_kept = kind in _IMAGE
        if end > len(data):
            stop = len(data) if is_kept else at
            break
        if kind in {b"acTL", b"fcTL"} or (kind == b"IDAT" and not has_pixels):
            order.append(kind)
        has_pixels = has_pixels or kind == b"IDAT"
        body = view[at + 8 : end - 4]
        if kind in _TEXTS and (size := _orientation_bytes(kind, body)) is not None:
            texts += size
            is_kept = texts <= _TEXT_BYTES
        elif kind in {b"tRNS", b"eXIf"}:
            is_kept = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if kind == b"tRNS":  # the first one counts, and none behind the pixels
            is_kept = is_kept and not (has_pixels or transparent)
            transparent = bytes(body) if is_kept else transparent
        if not is_kept:
            if start < at:
                pieces.append(view[start:at])
            start = end
        is_whole = kind == b"IEND"
    else:
        stop = len(data) if len(data) - end >= _LEAST_BYTES else end  # what is less is not the head of a chunk
    pieces.append(view[start:stop])
    depth, colour = (data[24], data[25]) if len(data) > 25 else (0, 0)
    return Png([piece for piece in pieces if piece], depth, colour, transparent, is_whole, _frames(order))


def _frames(order: Sequence[bytes]) -> int:
    """Count the frames of an animation by the order of its chunks: the first image is one, shown in it or not."""
    before = order[: order.index(b"IDAT")] if b"IDAT" in order else ()
    if b"acTL" not in before:
        return 1
    return order.count(b"fcTL") + (b"fcTL" not in before)


def make_transparent(image: Image.Image, png: Png) -> None:
    """Give a loaded grey or RGB image the alpha that its `tRNS` asks for: none where a pixel is that colour.

    Pillow compares 2 and 4 bits scaled to 8 with a number that is not, and 16 bits of RGB by their high byte. Palettes
    and 16-bit greys are left to it, and to `pixels`.
    """
    count = {_GREY: 1, _RGB: 3}.get(png.colour)
    if count is None or image.mode == "I;16":
        return
    image.info.pop("transparency", None)
    if len(png.transparent) != 2 * count:
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
    while at + _LEAST_BYTES <= len(view):
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
