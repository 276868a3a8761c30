"""TIFF files, whose samples may be laid out in hundreds of ways: which of them are read, and how.

Pillow opens most layouts and reads many of them rightly. This module tells by the tags of a page what its layout is; it
has Pillow read those right that it would not by itself, and says of every other one that it is not supported. It
decodes nothing on its own.
"""

from __future__ import annotations

import functools
import io
import itertools
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError
from qvsplit.sources import pixels

if TYPE_CHECKING:
    from PIL import Image

# tags
_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _STRIP_BYTES, _SAMPLES, _PLANES, _PREDICTOR = 266, 273, 279, 277, 284, 317
_COLOUR_TABLE, _TILE_WIDTH, _TILES, _TILE_BYTES, _INNER_PAGES = 320, 322, 324, 325, 330
_INK_SET, _EXTRA, _FORMAT, _WEIGHTS, _SUBSAMPLING, _RANGE = 332, 338, 339, 529, 530, 532
_WANTED = {
    _SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _SAMPLES, _PLANES,
    _PREDICTOR, _TILE_WIDTH, _TILES, _INK_SET, _EXTRA, _FORMAT, _SUBSAMPLING,
}  # fmt: skip
_MOST_VALUES = 16  # of a tag that are looked at: no layout that is read has more samples
_MOST_NAMED = 3  # of samples that differ
_MOST_WORDS = 110  # characters that say what a layout is

_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_PHOTOMETRICS: Mapping[int, str] = {
    0: "grey (white is zero)", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIE L*a*b*",
    9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "colour filter array", 32844: "LogL", 32845: "LogLuv",
    34892: "linear raw", 51177: "depth map",
}  # fmt: skip
_UINT, _INT, _FLOAT = 1, 2, 3
_FORMATS: Mapping[int, str] = {
    2: "signed", 3: "floating point", 4: "of no stated kind", 5: "complex integers", 6: "complex"
}  # fmt: skip
_NONE, _OLD_JPEG, _JPEG, _RLE_IN_WORDS, _THUNDERSCAN = 1, 6, 7, 32771, 32809
_FAX = (2, 3, 4)
_PREDICTED = (5, 8, 32946, 34925, 50000)  # the compressions that heed a predictor: LZW, deflate, LZMA, zstd
_COMPRESSIONS: Mapping[int, str] = {
    1: "none", 2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate",
    9: "JBIG", 10: "JBIG", 32766: "NeXT", 32771: "CCITT RLE in words", 32773: "PackBits", 32809: "ThunderScan",
    32908: "PixarFilm", 32909: "PixarLog", 32946: "deflate", 33003: "JPEG 2000", 33004: "JPEG 2000",
    33005: "JPEG 2000", 34661: "JBIG", 34676: "SGILog", 34677: "SGILog24", 34712: "JPEG 2000", 34713: "Nikon NEF",
    34887: "LERC", 34892: "lossy JPEG of DNG", 34925: "LZMA", 34933: "PNG", 34934: "JPEG XR", 50000: "zstd",
    50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_PLAIN = (1, 5, 8, 32773, 32946)  # that are no reason not to be read: none, LZW, deflate, PackBits
_EXTRAS: Mapping[int, str] = {0: "unnamed", 1: "premultiplied alpha", 2: "alpha"}
_IS_REDUCED, _IS_MASK = 1, 4
_ADOBE_MARKER = b"\xff\xee\x00\x0eAdobe"  # of JPEG streams that say what their colours are


@dataclass(frozen=True, slots=True)
class Layout:
    """How the samples of one page are laid out, by its tags; the names are TIFF's. None where a tag is missing."""

    byte_order: str  # "<" or ">"
    is_big: bool
    width: int | None
    height: int | None
    has_pixels: bool  # strips or tiles are named
    photometric: int | None
    bits: tuple[int, ...]
    formats: tuple[int, ...]
    samples: int
    extra: tuple[int, ...]
    planes: int
    compression: int
    predictor: int
    is_tiled: bool
    are_strips_named: bool
    fill_order: int
    ink_set: int
    subsampling: tuple[int, ...]

    @property
    def in_planes(self) -> bool:
        """Whether the samples of a pixel lie in planes of their own."""
        return self.planes == 2 and self.samples > 1  # of one sample it says nothing

    @property
    def depth(self) -> int:
        """Bits of a sample, 0 where they differ."""
        return self.bits[0] if len(set(self.bits)) == 1 else 0

    @property
    def kind(self) -> int:
        """SampleFormat of the samples, 0 where they differ."""
        return self.formats[0] if len(set(self.formats)) == 1 else 0


def read_layout(data: bytes, at: int | None = None) -> Layout | None:
    """Read the layout of the page whose directory is `at`, of the first one without it; None where there is none."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[:4] in (b"II+\0", b"MM\0+")
    try:
        if at is None:
            (at,) = struct.unpack_from(f"{order}Q", data, 8) if is_big else struct.unpack_from(f"{order}I", data, 4)
        tags = _read_tags(data, at, order, is_big)
    except (struct.error, OverflowError):  # beyond the end
        return None
    one: Mapping[int, int] = {tag: values[0] for tag, values in tags.items()}
    bits = tags.get(_BITS, (1,))
    samples = one.get(_SAMPLES, len(bits))
    return Layout(
        byte_order=order,
        is_big=is_big,
        width=one.get(_WIDTH),
        height=one.get(_HEIGHT),
        has_pixels=_STRIPS in tags or _TILES in tags or one.get(_COMPRESSION) == _OLD_JPEG,
        photometric=one.get(_PHOTOMETRIC),
        bits=bits * samples if len(bits) == 1 and samples <= _MOST_VALUES else bits[:samples],
        formats=tags.get(_FORMAT, (_UINT,)),
        samples=samples,
        extra=tags.get(_EXTRA, ()),
        planes=one.get(_PLANES, 1),
        compression=one.get(_COMPRESSION, _NONE),
        predictor=one.get(_PREDICTOR, 1),
        is_tiled=_TILE_WIDTH in tags,
        are_strips_named=_STRIPS in tags,
        fill_order=one.get(_FILL_ORDER, 1),
        ink_set=one.get(_INK_SET, 1),
        subsampling=tags.get(_SUBSAMPLING, (2, 2)),
    )


def _read_tags(data: bytes, at: int, order: str, is_big: bool) -> dict[int, tuple[int, ...]]:
    """Read the first few values of the tags that are wanted, whole numbers all; the first of a name counts."""
    head, entry, inline = (f"{order}Q", f"{order}HHQ", 8) if is_big else (f"{order}H", f"{order}HHI", 4)
    (number,) = struct.unpack_from(head, data, at)
    at += struct.calcsize(head)
    tags: dict[int, tuple[int, ...]] = {}
    for _ in range(min(number, 65535)):
        tag, kind, count = struct.unpack_from(entry, data, at)
        value = at + struct.calcsize(entry)
        at = value + inline
        code = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(kind)
        if tag not in _WANTED or tag in tags or code is None or not count:
            continue
        if count * struct.calcsize(f"={code}") > inline:
            (value,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, value)
        with suppress(struct.error, OverflowError):
            tags[tag] = struct.unpack_from(f"{order}{min(count, _MOST_VALUES)}{code}", data, value)
    return tags


# -------------------------------------------------------------------------------------------------- what is supported


def unidentified(data: bytes) -> ItemError:
    """Say what is wrong with a file that begins as a TIFF does and that Pillow does not open."""
    layout = read_layout(data)
    if layout is None or not layout.width or not layout.height or not layout.has_pixels or _is_known(layout):
        return ItemError("is a TIFF file that is cut off or damaged")
    return not_supported(describe(layout))


def _is_known(layout: Layout) -> bool:
    """Whether Pillow opens sound files of a layout."""
    from PIL import TiffImagePlugin

    if layout.in_planes and layout.extra and layout.compression == _NONE:
        return False
    return _key(layout, layout.fill_order) in TiffImagePlugin.OPEN_INFO


def _key(layout: Layout, fill_order: int) -> tuple[bytes, int, tuple[int], int, tuple[int, ...], tuple[int, ...]]:
    """Give what Pillow knows a layout by."""
    extra = () if layout.in_planes and not any(layout.extra) else layout.extra
    bits = layout.bits[: len(layout.bits) - len(layout.extra) + len(extra)]
    prefix = b"II" if layout.byte_order == "<" else b"MM"
    photometric = _YCBCR if layout.compression == _OLD_JPEG and layout.samples > 1 else layout.photometric or 0
    return prefix, photometric, (layout.kind,), fill_order, bits, extra


def not_supported(what: str) -> ItemError:
    """Give the error of a layout that is sound and not read."""
    return ItemError(
        f"is a TIFF file of a layout that is not supported: {what}; convert it, for example to PNG", "reader-missing"
    )


def describe(layout: Layout) -> str:
    """Say in words what a layout is: what the samples mean, how many of how many bits, and what is unusual."""
    photometric = layout.photometric
    space = "of no stated colours" if photometric is None else _PHOTOMETRICS.get(photometric, f"colours {photometric}")
    if photometric == _CMYK and layout.ink_set != 1:
        space = "inks other than CMYK"
    depth = str(layout.depth) if layout.depth else " + ".join(map(str, layout.bits[:_MOST_NAMED])) or "no"
    samples, bits = "sample" if layout.samples == 1 else "samples", "bit" if depth == "1" else "bits"
    parts = [space, f"{layout.samples} {samples} of {depth} {bits}"]
    if layout.kind != _UINT:
        parts.append(_FORMATS.get(layout.kind, "of several kinds" if not layout.kind else f"of kind {layout.kind}"))
    if layout.compression not in _PLAIN:
        parts.append("compression " + _COMPRESSIONS.get(layout.compression, str(layout.compression)))
    elif layout.predictor != 1 and layout.compression in _PREDICTED:
        parts.append(f"predictor {layout.predictor}")
    if layout.extra:
        names = (_EXTRAS.get(extra, "unknown") for extra in layout.extra[:_MOST_NAMED])
        parts.append("extra samples: " + " + ".join(names))
    if layout.in_planes:
        parts.append("separate planes")
    if layout.fill_order == 2:
        parts.append("bits of a byte reversed")
    if layout.byte_order == ">":
        parts.append("big-endian" + (" BigTIFF" if layout.is_big else ""))
    while len(", ".join(parts)) > _MOST_WORDS:
        parts.pop()
    return ", ".join(parts)


def check(data: bytes) -> None:
    """Refuse a file whose first page Pillow would read wrongly, or take for damaged.

    Raises:
        ItemError: Its layout is not supported.
    """
    layout = read_layout(data)
    if layout is not None:
        _check(layout, data)


def _check(layout: Layout, data: bytes) -> None:
    from PIL import TiffImagePlugin

    if layout.compression == _OLD_JPEG and layout.photometric == _RGB and _ADOBE_MARKER in data:
        raise not_supported(describe(layout))  # libtiff takes any such file for YCbCr, as most are in truth
    if layout.compression not in TiffImagePlugin.COMPRESSION_INFO or _is_read_wrongly(layout):
        raise not_supported(describe(layout))


def _is_read_wrongly(layout: Layout) -> bool:
    if layout.is_big and layout.byte_order == ">":
        return True  # Pillow takes it for a classic TIFF
    if layout.photometric is None and layout.compression not in _FAX:
        return True  # whether 0 is black or white is anybody's guess; in a fax it is white
    if layout.compression in (_RLE_IN_WORDS, _THUNDERSCAN) or (layout.compression == _JPEG and layout.depth == 16):
        return True  # libtiff aligns rows by where they happen to lie in memory, wants whole strips, has no such JPEG
    if layout.predictor != 1 and layout.compression in _PREDICTED and layout.depth not in (8, 16, 32):
        return True
    if layout.photometric == _CMYK and layout.ink_set != 1:
        return True  # the inks are any, and Pillow takes them for cyan, magenta, yellow and black
    return layout.in_planes and _are_planes_read_wrongly(layout)


_SEPARABLE = {1: (_WHITE_IS_ZERO, _GREY), 3: (_RGB, _YCBCR), 4: (_CMYK,)}  # what is read of planes, by their number


def _are_planes_read_wrongly(layout: Layout) -> bool:
    photometric, extra = layout.photometric, layout.extra
    colours = next((n for n, spaces in _SEPARABLE.items() if photometric in spaces), 0)
    if not colours or colours + len(extra) != layout.samples:
        return True  # of L*a*b*, a and b are taken wrongly; a sample without a name, for premultiplied alpha
    if photometric == _YCBCR and layout.subsampling != (1, 1):
        return True
    if any(extra) and (photometric != _RGB or len(extra) > 1):
        return True
    return colours > 1 and (layout.kind != _UINT or layout.depth not in (8, 16))


# ------------------------------------------------------------------------------------------------------------ reading


def select_page(image: Image.Image, data: bytes) -> None:
    """Turn to the page that is meant: the first one, unless that is a smaller copy of a later one.

    Raises:
        ItemError: The first page is a smaller copy of one that is not supported.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    has_inner_pages = _INNER_PAGES in tags
    number = 0
    while tags.get(_SUBFILE_TYPE, 0) & (_IS_REDUCED | _IS_MASK):
        number += 1
        try:
            image.seek(number)
        except SyntaxError:  # Pillow does not read this page, but its tags
            layout = read_layout(data, tags.offset)
            if layout is not None and not tags.get(_SUBFILE_TYPE, 0) & (_IS_REDUCED | _IS_MASK):
                raise not_supported(describe(layout)) from None
        except EOFError:
            if has_inner_pages:
                raise not_supported("a smaller copy of an image that lies in an inner directory") from None
            image.seek(0)
            return


def count_pages(image: Image.Image) -> int:
    """Count the pages of a TIFF but for smaller copies and masks."""
    pages = 0
    with suppress(EOFError):
        for number in itertools.count():
            with suppress(SyntaxError):  # Pillow does not read this page, but its tags
                image.seek(number)
            pages += not image.tag_v2.get(_SUBFILE_TYPE, 0) & (_IS_REDUCED | _IS_MASK)  # type: ignore[attr-defined]
    return max(1, pages)


def load(image: Image.Image, data: bytes) -> Image.Image:
    """Load the page of `data` that `image` has open, and give it as an image that `pixels.to_rgb` reads rightly.

    Raises:
        ItemError: Its layout is not supported.
        Exception: Whatever Pillow says of a damaged file.
    """
    layout = read_layout(data, image.tag_v2.offset)  # type: ignore[attr-defined]
    assert layout is not None  # Pillow has read it
    _check(layout, data)
    if _needs_libtiff(layout, image.tag_v2):  # type: ignore[attr-defined]
        _have_libtiff_read(image, layout)
    if layout.photometric == _YCBCR and layout.is_tiled and not _are_parts_whole(image, data):
        raise ItemError("is a TIFF file that is cut off or damaged")  # of which libtiff would tell nothing
    if image.mode in ("P", "PA"):
        _read_colour_table(image)
    try:
        image.load()
    except OSError:
        if not _has_codec(layout.compression) or (layout.compression == _OLD_JPEG and _are_parts_whole(image, data)):
            raise not_supported(describe(layout)) from None
        raise
    return _meant(image, layout)


def _needs_libtiff(layout: Layout, tags: Mapping[int, Any]) -> bool:
    """Whether Pillow's own reader of samples that are not compressed, or its call of libtiff, goes wrong."""
    if layout.compression == _OLD_JPEG:  # of which Pillow expects three samples, whatever it says
        return layout.samples == 1
    if layout.compression != _NONE:
        return layout.kind != _UINT and layout.byte_order == ">"
    if layout.planes == 2 or layout.fill_order == 2 or (layout.is_tiled and layout.are_strips_named):
        return True
    return layout.photometric == _YCBCR and not (
        layout.subsampling == (1, 1)
        and _are_about(tags.get(_WEIGHTS), (0.299, 0.587, 0.114))
        and _are_about(tags.get(_RANGE), (0, 255, 128, 255, 128, 255))
    )


def _are_about(given: Sequence[float] | None, usual: Sequence[float]) -> bool:
    return given is None or (
        len(given) == len(usual) and all(abs(one - other) < 1e-4 for one, other in zip(given, usual, strict=True))
    )


def _are_parts_whole(image: Image.Image, data: bytes) -> bool:
    """Whether all strips and tiles of the page lie within the file."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    offsets = tags.get(_TILES) or tags.get(_STRIPS) or ()
    counts = tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES) or ()
    return all(at + count <= len(data) for at, count in zip(offsets, counts, strict=False))


def _have_libtiff_read(image: Image.Image, layout: Layout) -> None:
    """Have Pillow load the page by libtiff, which gives samples in the machine's byte order, bits in the usual one."""
    from PIL import TiffImagePlugin

    if layout.photometric == _YCBCR:
        mode, raw = "RGB", "RGBX"
    else:
        mode, raw = TiffImagePlugin.OPEN_INFO[_key(layout, 1)]
    image._mode = mode
    image.use_load_libtiff = True  # type: ignore[attr-defined]
    page = (0, 0, layout.width, layout.height)
    offset = image.tag_v2.offset  # type: ignore[attr-defined]
    image.tile = [type(image.tile[0])("libtiff", page, 0, (_NATIVE.get(raw, raw), False, offset))]  # type: ignore[attr-defined]


_NATIVE: Mapping[str, str] = {
    "I;16": "I;16N", "I;16B": "I;16N", "I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS",
    "F;32F": "F;32NF", "F;32BF": "F;32NF",
    **{f"{mode};16{order}": f"{mode};16N" for mode in ("RGB", "RGBX", "RGBA", "RGBa", "CMYK") for order in "LB"},
}  # fmt: skip


def _read_colour_table(image: Image.Image) -> None:
    """Read a table of colours of 8 bits, which some writers write instead of 16, as libtiff does."""
    from PIL import ImagePalette

    table: Sequence[int] = image.tag_v2[_COLOUR_TABLE]  # type: ignore[attr-defined]
    if max(table) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(table))


@functools.cache
def _has_codec(compression: int) -> bool:
    """Say whether this Pillow's libtiff has a compression that is optional, by trying to write it."""
    from PIL import Image

    name = {34925: "lzma", 50000: "zstd", 50001: "webp"}.get(compression)
    if name is None:
        return True
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), "TIFF", compression=name)
    except Exception:
        return False
    return True


def _meant(image: Image.Image, layout: Layout) -> Image.Image:
    """Give a page that is loaded as what its samples mean, where Pillow leaves that open."""
    from PIL import ImageOps

    given: Any = image
    if image.mode == "La":
        given = image.convert("LA")
    elif layout.depth == 12:
        given = pixels.twelve_bits(image)
    elif layout.depth == 8 and layout.kind == _INT:
        # the tag is often wrong: most such files are meant without signs, some with, and nothing tells which
        if image.getextrema()[1] > 127:  # type: ignore[operator]
            raise not_supported(describe(layout))
    elif layout.depth == 32 and layout.kind == _UINT:
        given = pixels.stretched(image, "uint32")
    if layout.photometric == _WHITE_IS_ZERO and layout.depth > 8:
        given = ImageOps.invert(pixels.eight_bits(given))
    return given  # type: ignore[no-any-return]
