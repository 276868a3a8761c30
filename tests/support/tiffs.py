"""Sound TIFF files of every layout, written byte by byte from sample values: what they show is known without a reader.

`write` lays samples out as tags say; `CASES` names layouts, each with its file and the 8-bit RGB image it shows.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

UINT, INT, FLOAT, COMPLEX = 1, 2, 3, 6  # SampleFormat
WHITE_IS_ZERO, GREY, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB, ICCLAB, ITULAB = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
CFA, LINEAR_RAW, LOGL, LOGLUV = 32803, 34892, 32844, 32845
NO_ALPHA, PREMULTIPLIED, ALPHA = 0, 1, 2  # ExtraSamples
NONE, G3, G4, LZW, OLD_JPEG, JPEG, DEFLATE, PACKBITS, OLD_DEFLATE = 1, 3, 4, 5, 6, 7, 8, 32773, 32946
LZMA, ZSTD, WEBP, LERC, JPEG_2000 = 34925, 50000, 50001, 34887, 34712

_BITS_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
_ASCII, _SHORT, _LONG, _RATIONAL, _LONG8 = 2, 3, 4, 5, 16
_CODES = {1: "B", 2: "s", 7: "B", 3: "H", 4: "I", 5: "I", 16: "Q"}

Samples = npt.NDArray[Any]  # [height, width, samples]: whole numbers of any width, or floats
Encode = Callable[[Samples, bytes], bytes]  # a strip or tile, and its packed bytes, compressed


@dataclass(frozen=True)
class Page:
    """One page: its `samples` [height, width, n] and how they are laid out. Tags in `tags` stand instead of ours."""

    samples: Samples
    photometric: int
    bits: int = 8
    kind: int = UINT
    extra: Sequence[int] = ()
    planes: bool = False  # PlanarConfiguration 2
    rows: int = 5  # a strip
    tile: int = 0  # side of square tiles, instead of strips
    tiles_as_strips: bool = False  # tiles that the tags of strips point to, as some writers have it
    compression: int = NONE
    encode: Encode | None = None  # instead of the one of `compression`
    predictor: int = 1
    fill_order: int = 1
    subsampling: tuple[int, int] | None = None
    tags: dict[int, tuple[int, Sequence[int]] | None] = field(default_factory=dict)


def write(*pages: Page, order: str = "<", big: bool = False) -> bytes:
    """Give a TIFF of `pages` in byte order `order`, as a BigTIFF or a classic one."""
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42))
    out += struct.pack(f"{order}HHQ", 8, 0, 0) if big else struct.pack(f"{order}I", 0)
    link = 8 if big else 4
    offset_code = "Q" if big else "I"
    for page in pages:
        chunks = list(_chunks(page, order))
        offsets = []
        for chunk in chunks:
            offsets.append(len(out))
            out += chunk + bytes(len(chunk) % 2)
        tags = _tags(page, offsets, [len(chunk) for chunk in chunks])
        values = {}
        for tag, (code, numbers) in tags.items():
            raw = struct.pack(f"{order}{len(numbers)}{_CODES[code]}", *numbers)
            count = len(numbers) // 2 if code == _RATIONAL else len(numbers)
            if len(raw) > (8 if big else 4):
                at = len(out)
                out += raw + bytes(len(raw) % 2)
                raw = struct.pack(f"{order}{offset_code}", at)
            values[tag] = struct.pack(f"{order}HH{offset_code}", tag, code, count) + raw.ljust(8 if big else 4, b"\0")
        struct.pack_into(f"{order}{offset_code}", out, link, len(out))
        out += struct.pack(f"{order}{'Q' if big else 'H'}", len(values))
        out += b"".join(values[tag] for tag in sorted(values))
        link = len(out)
        out += bytes(8 if big else 4)
    return bytes(out)


def _tags(page: Page, offsets: list[int], counts: list[int]) -> dict[int, tuple[int, Sequence[int]]]:
    height, width, number = page.samples.shape
    tags: dict[int, tuple[int, Sequence[int]] | None] = {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [page.bits] * number),
        259: (_SHORT, [page.compression]),
        262: (_SHORT, [page.photometric]),
        277: (_SHORT, [number]),
        284: (_SHORT, [2 if page.planes else 1]),
    }
    if page.fill_order != 1:
        tags[266] = (_SHORT, [page.fill_order])
    if page.predictor != 1:
        tags[317] = (_SHORT, [page.predictor])
    if page.extra:
        tags[338] = (_SHORT, list(page.extra))
    if page.kind != UINT:
        tags[339] = (_SHORT, [page.kind] * number)
    if page.subsampling:
        tags[530] = (_SHORT, page.subsampling)
    if page.tile:
        where, how_many = (273, 279) if page.tiles_as_strips else (324, 325)
        tags |= {322: (_SHORT, [page.tile]), 323: (_SHORT, [page.tile])}
        tags |= {where: (_LONG, offsets), how_many: (_LONG, counts)}
    else:
        tags |= {273: (_LONG, offsets), 278: (_SHORT, [page.rows]), 279: (_LONG, counts)}
    if page.compression == OLD_JPEG:
        tags |= {512: (_SHORT, [1]), 513: (_LONG, offsets), 514: (_LONG, counts)}
    tags |= page.tags
    return {tag: value for tag, value in tags.items() if value is not None}


def _chunks(page: Page, order: str) -> Iterator[bytes]:
    """Give the strips or tiles, plane by plane where planes are apart, compressed."""
    planes = [page.samples[:, :, [one]] for one in range(page.samples.shape[2])] if page.planes else [page.samples]
    height, width, _ = page.samples.shape
    encode = page.encode or _ENCODERS[page.compression]
    for plane in planes:
        down, across = (page.tile, page.tile) if page.tile else (page.rows, width)
        for top in range(0, height, down):
            for left in range(0, width, across):
                chunk = plane[top : top + down, left : left + across]
                if page.tile:
                    missing = (page.tile - chunk.shape[0], page.tile - chunk.shape[1])
                    chunk = np.pad(chunk, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
                data = encode(chunk, _packed(chunk, page, order))
                yield data.translate(_BITS_REVERSED) if page.fill_order == 2 else data


def _packed(chunk: Samples, page: Page, order: str) -> bytes:
    """Lay samples out in bytes, row by row, each row from a new byte on."""
    if page.subsampling and page.subsampling != (1, 1):
        return _data_units(chunk, *page.subsampling)
    rows, _, number = chunk.shape
    if page.predictor == 2:
        chunk = np.diff(chunk, axis=1, prepend=np.zeros_like(chunk[:, :1]))
    values = chunk.reshape(rows, -1)
    if page.predictor == 3:
        size = values.dtype.itemsize
        planes = np.frombuffer(values.astype(values.dtype.newbyteorder(">")).tobytes(), np.uint8)
        planes = planes.reshape(rows, -1, size).transpose(0, 2, 1).reshape(rows, -1)
        before = np.pad(planes, ((0, 0), (number, 0)))[:, : planes.shape[1]]
        return (planes - before).tobytes()
    if page.bits % 8 == 0 and values.dtype.itemsize * 8 == page.bits:
        return values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = np.unpackbits(values.astype(">u4").view(np.uint8).reshape(rows, -1, 4), axis=2)[:, :, 32 - page.bits :]
    if page.bits == 24 and order == "<":
        return np.packbits(bits, axis=2)[:, :, ::-1].tobytes()
    return np.packbits(bits.reshape(rows, -1), axis=1).tobytes()


def _data_units(chunk: Samples, across: int, down: int) -> bytes:
    """Lay YCbCr out in units of some luma samples and one pair of chroma samples, the mean of theirs."""
    rows, width = chunk.shape[:2]
    chunk = np.pad(chunk, ((0, -rows % down), (0, -width % across), (0, 0)), mode="edge")
    units = chunk.reshape(chunk.shape[0] // down, down, chunk.shape[1] // across, across, 3).transpose(0, 2, 1, 3, 4)
    luma = units[..., 0].reshape(*units.shape[:2], -1)
    chroma = np.rint(units[..., 1:].astype(float).mean(axis=(2, 3))).astype(np.uint8)
    return np.concatenate([luma, chroma], axis=2).tobytes()


# -------------------------------------------------------------------------------------------------------- compressions


def _packbits(data: bytes) -> bytes:
    """Write literal runs alone, which is allowed."""
    runs = [data[at : at + 128] for at in range(0, len(data), 128)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def _lzw(data: bytes) -> bytes:
    """Write literal codes alone, and clear the table before codes get longer than 9 bits."""
    codes = []
    for at in range(0, len(data), 200):
        codes += [256, *data[at : at + 200]]
    text = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(text.ljust(len(text) + -len(text) % 8, "0"), 2).to_bytes((len(text) + 7) // 8, "big")


def pillow_strip(chunk: Samples, **how: object) -> bytes:
    """Compress a chunk with Pillow's libtiff, as the one strip of a file, and give that strip."""
    if chunk.dtype == np.bool_:
        image = Image.fromarray(chunk[..., 0])
    else:
        image = Image.fromarray(chunk[..., 0] if chunk.shape[2] == 1 else chunk)
    stream = io.BytesIO()
    image.save(stream, "TIFF", tiffinfo={278: chunk.shape[0]}, **how)
    with Image.open(stream) as written:
        (at,), (count,) = written.tag_v2[273], written.tag_v2[279]  # type: ignore[attr-defined]
    return stream.getvalue()[at : at + count]


def jpeg(chunk: Samples, mode: str, **how: object) -> bytes:
    """Compress a chunk as a JPEG stream of its own, of the samples as they are, not converted."""
    stream = io.BytesIO()
    if mode == "CMYK":
        chunk = 255 - chunk  # as Pillow writes them inverted
    image = Image.frombytes(mode, (chunk.shape[1], chunk.shape[0]), chunk.tobytes())
    image.save(stream, "JPEG", quality=95, keep_rgb=True, **how)
    return stream.getvalue()


_ENCODERS: dict[int, Encode] = {
    NONE: lambda chunk, data: data,
    LZW: lambda chunk, data: _lzw(data),
    DEFLATE: lambda chunk, data: zlib.compress(data),
    OLD_DEFLATE: lambda chunk, data: zlib.compress(data),
    PACKBITS: lambda chunk, data: _packbits(data),
    LZMA: lambda chunk, data: lzma.compress(data, lzma.FORMAT_XZ),
    # a bilevel chunk has 1 for white here, and these have black on white
    G3: lambda chunk, data: pillow_strip(chunk.astype(bool), compression="group3"),
    G4: lambda chunk, data: pillow_strip(chunk.astype(bool), compression="group4"),
}

# --------------------------------------------------------------------------------------------------------------- cases

HEIGHT, WIDTH = 19, 37


@dataclass(frozen=True, eq=False)
class Content:
    """What pages of one kind hold, however they are laid out.

    Attributes:
        samples: [height, width, n], as `Page` has them.
        shown: The 8-bit RGB image that they show, [height, width, 3].
        page: The rest of `Page`.
        levels: How far a reader may be off `shown`.
    """

    samples: Samples
    shown: npt.NDArray[np.uint8]
    page: dict[str, Any]
    levels: int = 1


def _ramps() -> npt.NDArray[np.float64]:
    """Red, green, blue and alpha [height, width, 4], each from 0 to 1, none like another."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    down, across = down / (HEIGHT - 1), across / (WIDTH - 1)
    return np.stack([across, down, (across + down) / 2, 1 - across * down], axis=2)


def whole(values: npt.NDArray[np.float64], bits: int) -> Samples:
    """Give values from 0 to 1 as whole numbers of so many bits."""
    kind = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32 if bits <= 32 else np.uint64
    most = 2**bits - 1
    return np.minimum(np.rint(values * most), np.nextafter(float(2**bits), 0)).astype(kind)


def _eight(samples: Samples, bits: int) -> npt.NDArray[np.float64]:
    """Give whole numbers of so many bits as 0…255."""
    return samples.astype(np.float64) * (255 / (2**bits - 1)) if bits <= 8 else (samples >> (bits - 8)).astype(float)


def _rgb(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Give one or three channels of 0…255 as an RGB image."""
    image = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()


def _over_white(values: npt.NDArray[np.float64], alpha: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values * alpha + 255 * (1 - alpha)


def _greys() -> Iterator[tuple[str, Content]]:
    ramp = _ramps()[..., 2:3]
    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64):
        samples = whole(ramp, bits)
        shown = _rgb(_eight(samples, bits))
        yield f"grey {bits}", Content(samples, shown, {"photometric": GREY, "bits": bits})
        yield f"white-is-zero {bits}", Content(samples, 255 - shown, {"photometric": WHITE_IS_ZERO, "bits": bits})
    for bits in (8, 16, 32, 64):
        half = 2 ** (bits - 1)
        signed = (whole(ramp, bits) - np.asarray(half, f"u{bits // 8}")).view(f"i{bits // 8}")  # −half … half − 1
        page = {"bits": bits, "kind": INT}
        yield f"grey int{bits}", Content(signed, _rgb(ramp * 255), {"photometric": GREY, **page})
        yield (
            f"white-is-zero int{bits}",
            Content(signed, _rgb(255 - ramp * 255), {"photometric": WHITE_IS_ZERO, **page}),
        )
    few = whole(ramp, 7)
    yield "grey int8, none negative", Content(few.view(np.int8), _rgb(few), {"photometric": GREY, "kind": INT})
    for bits in (16, 32, 64):
        for name, scale in (("", 1), (" beyond one", 1000)):
            page = {"bits": bits, "kind": FLOAT}
            samples = (ramp * scale).astype(f"f{bits // 8}")
            yield f"grey float{bits}{name}", Content(samples, _rgb(ramp * 255), {"photometric": GREY, **page})
            white = {"photometric": WHITE_IS_ZERO, **page}
            yield f"white-is-zero float{bits}{name}", Content(samples, _rgb(255 - ramp * 255), white)
    page = {"photometric": GREY, "bits": 64, "kind": COMPLEX}
    yield "grey complex64", Content(ramp.astype(np.complex64), _rgb(ramp * 255), page)


def _with_alpha() -> Iterator[tuple[str, Content]]:
    ramps = _ramps()
    for bits in (8, 16, 32):
        alpha = ramps[..., 3:]
        deep = whole(alpha, bits)
        for name, photometric, values in (
            ("grey", GREY, ramps[..., 2:3]), ("white-is-zero", WHITE_IS_ZERO, ramps[..., 2:3]), ("rgb", RGB, ramps[..., :3])
        ):  # fmt: skip
            light = 1 - values if photometric == WHITE_IS_ZERO else values
            plain, clear = _rgb(light * 255), _rgb(_over_white(light * 255, alpha))
            page = {"photometric": photometric, "bits": bits}
            levels = 2 if bits == 8 else 4  # deep ones lose up to a level of colour and of alpha
            joined = np.concatenate([whole(values, bits), deep], axis=2)
            yield f"{name} {bits} + unspecified", Content(joined, plain, page | {"extra": [NO_ALPHA]})
            yield f"{name} {bits} + alpha", Content(joined, clear, page | {"extra": [ALPHA]}, levels)
            both = np.concatenate([joined, deep], axis=2)
            yield (
                f"{name} {bits} + alpha, unspecified",
                Content(both, clear, page | {"extra": [ALPHA, NO_ALPHA]}, levels),
            )
            yield f"{name} {bits} + two unspecified", Content(both, plain, page | {"extra": [NO_ALPHA, NO_ALPHA]})
            yield (
                f"{name} {bits} + unspecified, alpha",
                Content(both, clear, page | {"extra": [NO_ALPHA, ALPHA]}, levels),
            )
            times = values * alpha if photometric != WHITE_IS_ZERO else 1 - light * alpha
            joined = np.concatenate([whole(times, bits), deep], axis=2)
            yield f"{name} {bits} + premultiplied", Content(joined, clear, page | {"extra": [PREMULTIPLIED]}, levels)


def _colours() -> Iterator[tuple[str, Content]]:
    ramps = _ramps()
    colour = ramps[..., :3]
    for bits in (1, 2, 4, 8, 10, 12, 14, 16, 24, 32, 64):
        samples = whole(colour, bits)
        yield f"rgb {bits}", Content(samples, _rgb(_eight(samples, bits)), {"photometric": RGB, "bits": bits})
    for bits in (8, 16, 32):
        half = 2 ** (bits - 1)
        signed = (whole(colour, bits) - np.asarray(half, f"u{bits // 8}")).view(f"i{bits // 8}")
        yield f"rgb int{bits}", Content(signed, _rgb(colour * 255), {"photometric": RGB, "bits": bits, "kind": INT})
    for bits in (16, 32, 64):
        page = {"photometric": RGB, "bits": bits, "kind": FLOAT}
        yield f"rgb float{bits}", Content(colour.astype(f"f{bits // 8}"), _rgb(colour * 255), page)
    four = np.concatenate([whole(colour, 8), whole(ramps[..., 3:], 8)], axis=2)
    shown = _rgb(_over_white(colour * 255, ramps[..., 3:]))
    yield "rgb 8, fourth sample unnamed", Content(four, shown, {"photometric": RGB})
    inks = whole(ramps, 8)
    shown = _rgb(255 * (1 - ramps[..., :3]) * (1 - ramps[..., 3:]))
    yield "cmyk 8", Content(inks, shown, {"photometric": CMYK})
    yield "cmyk 16", Content(whole(ramps, 16), shown, {"photometric": CMYK, "bits": 16})
    named = {"photometric": CMYK, "tags": {332: (_SHORT, [1])}}
    yield "cmyk 8 by name", Content(inks, shown, named)
    other = {"photometric": CMYK, "tags": {332: (_SHORT, [2]), 334: (_SHORT, [4])}}
    yield "other inks 8", Content(inks, shown, other)
    five = np.concatenate([inks, inks[..., :1]], axis=2)
    yield "cmyk 8 + unspecified", Content(five, shown, {"photometric": CMYK, "extra": [NO_ALPHA]})
    yield "five inks 8", Content(five, shown, {"photometric": CMYK, "tags": {332: (_SHORT, [2]), 334: (_SHORT, [5])}})


def _palettes() -> Iterator[tuple[str, Content]]:
    ramps = _ramps()
    for bits in (1, 2, 4, 8, 16):
        number = 2**bits
        index = whole(ramps[..., 2:3], bits)
        table = np.stack([np.linspace(0, 1, number), np.linspace(1, 0, number), np.linspace(0.2, 0.7, number)])
        shown = _rgb(table.T[index[..., 0]] * 255)
        for name, most in (("", 65535), (", 8-bit table", 255)):
            tags = {320: (_SHORT, np.rint(table * most).astype(int).ravel().tolist())}
            page = {"photometric": PALETTE, "bits": bits, "tags": tags}
            yield f"palette {bits}{name}", Content(index, shown, page)
        if bits == 8:
            alpha = ramps[..., 3:]
            joined = np.concatenate([index, whole(alpha, 8)], axis=2)
            clear = _rgb(_over_white(table.T[index[..., 0]] * 255, alpha))
            yield "palette 8 + alpha", Content(joined, clear, page | {"extra": [ALPHA]}, levels=2)
            yield "palette 8 + unspecified", Content(joined, shown, page | {"extra": [NO_ALPHA]})


def _ycbcr(colour: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give RGB of 0…1 as full-range YCbCr of 0…255, by the weights of BT.601."""
    red, green, blue = (colour * 255).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], axis=2)


def _other_spaces() -> Iterator[tuple[str, Content]]:
    ramps = _ramps()
    colour = ramps[..., :3]
    full = _ycbcr(colour)
    samples = np.clip(np.rint(full), 0, 255).astype(np.uint8)
    weights = (_RATIONAL, [299, 1000, 587, 1000, 114, 1000])
    for across, down in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)):
        page = {"photometric": YCBCR, "subsampling": (across, down), "rows": 8, "tags": {529: weights}}
        levels = 3 if across == 1 else 26  # chroma is shared by samples that differ
        yield f"ycbcr {across}x{down}", Content(samples, _rgb(colour * 255), page, levels)
    page = {"photometric": YCBCR, "subsampling": (1, 1)}
    studio = np.stack([16 + full[..., 0] * 219 / 255, *(128 + (full[..., 1:] - 128) * 224 / 255).transpose(2, 0, 1)], 2)
    black_white = {532: (_RATIONAL, [16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1])}
    held = np.clip(np.rint(studio), 0, 255).astype(np.uint8)
    yield "ycbcr studio range", Content(held, _rgb(colour * 255), page | {"tags": black_white}, 4)
    red, green, blue = (colour * 255).transpose(2, 0, 1)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    hd = np.stack([luma, (blue - luma) / 1.8556 + 128, (red - luma) / 1.5748 + 128], axis=2)
    tags = {529: (_RATIONAL, [2126, 10000, 7152, 10000, 722, 10000])}
    held = np.clip(np.rint(hd), 0, 255).astype(np.uint8)
    yield "ycbcr BT.709", Content(held, _rgb(colour * 255), page | {"tags": tags}, 4)
    lab = np.stack([40 + ramps[..., 0] * 40, ramps[..., 1] * 20 - 10, ramps[..., 2] * 20 - 10], axis=2)
    shown = _rgb(_lab_to_srgb(lab) * 255)
    light = np.rint(lab[..., :1] * 2.55)
    around = np.rint(lab[..., 1:])
    signed = np.concatenate([light, around], axis=2).astype(np.int16).astype(np.uint8)
    shifted = np.concatenate([light, around + 128], axis=2).astype(np.uint8)
    yield "cielab 8", Content(signed, shown, {"photometric": CIELAB}, 3)
    yield "icclab 8", Content(shifted, shown, {"photometric": ICCLAB}, 5)
    yield "itulab 8", Content(shifted, shown, {"photometric": ITULAB}, 5)
    sixteen = np.concatenate([lab[..., :1] * 655.35, lab[..., 1:] * 256], axis=2)
    sixteen = np.rint(sixteen).astype(np.int32).astype(np.uint16)
    yield "cielab 16", Content(sixteen, shown, {"photometric": CIELAB, "bits": 16}, 5)
    yield "icclab 16", Content(sixteen + np.asarray([0, 32768, 32768], np.uint16), shown, {"photometric": ICCLAB, "bits": 16}, 5)  # fmt: skip
    one = whole(ramps[..., :1], 1)
    yield "mask", Content(one, _rgb(one * 255.0), {"photometric": MASK, "bits": 1})
    deep = whole(ramps[..., :1], 16)
    mosaic = {"photometric": CFA, "bits": 16, "tags": {33421: (_SHORT, [2, 2]), 33422: (1, [0, 1, 1, 2])}}
    yield "cfa 16", Content(deep, _rgb(deep >> 8), mosaic)
    yield "cfa 8", Content(deep.astype(np.uint8), _rgb(deep >> 8), mosaic | {"bits": 8})
    yield "linear raw 16", Content(whole(colour, 16), _rgb(colour * 255), {"photometric": LINEAR_RAW, "bits": 16})
    yield "logl 16", Content(deep, _rgb(deep >> 8), {"photometric": LOGL, "bits": 16, "kind": INT})
    yield "logluv 16", Content(whole(colour, 16), _rgb(colour * 255), {"photometric": LOGLUV, "bits": 16, "kind": INT})


def _lab_to_srgb(lab: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert CIE L*a*b* of D50 to sRGB of 0…1 [height, width, 3]."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=2)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    to_linear = np.asarray([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]])  # fmt: skip
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def contents() -> dict[str, Content]:
    """Give contents of every photometric interpretation, sample format, depth and number of samples, by name."""
    makers = (_greys, _with_alpha, _colours, _palettes, _other_spaces)
    return {name: content for make in makers for name, content in make()}


def layouts(content: Content) -> Iterator[tuple[str, bytes]]:
    """Give files of `content`, in every way that its samples can be laid out, with a name for each."""
    whole_bytes = content.page.get("bits", 8) % 8 == 0 and content.page.get("subsampling", (1, 1)) == (1, 1)
    differs = {"predictor": 3 if content.page.get("kind") == FLOAT else 2} if whole_bytes else {}
    if content.page.get("bits", 8) == 24 or content.page.get("kind") == COMPLEX:
        differs = {}
    tile = {"tile": 16}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "strips": ({}, {}),
        "strips MM": ({}, {"order": ">"}),
        "one strip": ({"rows": HEIGHT}, {}),
        "tiles": (tile, {}),
        "tiles MM": (tile, {"order": ">"}),
        "deflate": ({"compression": DEFLATE, **differs}, {}),
        "deflate MM": ({"compression": DEFLATE, **differs}, {"order": ">"}),
        "lzw tiles": ({"compression": LZW, **tile}, {}),
        "packbits": ({"compression": PACKBITS}, {}),
        "bits reversed": ({"fill_order": 2}, {}),
        "bits reversed MM": ({"fill_order": 2}, {"order": ">"}),
        "bits reversed deflate": ({"fill_order": 2, "compression": DEFLATE}, {}),
        "big": ({}, {"big": True}),
        "big MM": ({}, {"big": True, "order": ">"}),
    }
    if content.page.get("subsampling", (1, 1)) == (1, 1):
        ways |= {
            "planes": ({"planes": True}, {}),
            "planes MM": ({"planes": True}, {"order": ">"}),
            "planes tiles": ({"planes": True, **tile}, {}),
            "planes deflate": ({"planes": True, "compression": DEFLATE, **differs}, {}),
            "planes lzw tiles MM": ({"planes": True, "compression": LZW, **tile}, {"order": ">"}),
        }
    for name, (page, file) in ways.items():
        page = {"rows": 5} | content.page | page
        if name == "one strip" and "subsampling" in page:
            page["rows"] = 24
        yield name, write(Page(content.samples, **page), **file)


def _bytes_of(data: bytes) -> tuple[int, Sequence[int]]:
    return 7, list(data)


def others() -> Iterator[tuple[str, bytes, npt.NDArray[np.uint8], int]]:
    """Give files that `layouts` does not make: name, file, what it shows, and how many levels a reader may be off."""
    ramps = _ramps()
    colour = ramps[..., :3]
    grey, rgb, inks = whole(ramps[..., 2:3], 8), whole(colour, 8), whole(ramps, 8)
    ycbcr = np.clip(np.rint(_ycbcr(colour)), 0, 255).astype(np.uint8)
    from_inks = _rgb(255 * (1 - ramps[..., :3]) * (1 - ramps[..., 3:]))
    for name, samples, photometric, mode, shown in (
        ("grey", grey, GREY, "L", _rgb(grey)), ("white-is-zero", grey, WHITE_IS_ZERO, "L", 255 - _rgb(grey)),
        ("rgb", rgb, RGB, "RGB", _rgb(rgb)), ("ycbcr", ycbcr, YCBCR, "YCbCr", _rgb(rgb)),
        ("cmyk", inks, CMYK, "CMYK", from_inks),
    ):  # fmt: skip
        for order in "<>":
            encode = partial(_jpeg_chunk, mode=mode)
            plain = {"compression": JPEG, "encode": encode, "rows": 8}
            if mode == "YCbCr":
                plain["subsampling"] = (1, 1)
            suffix = " MM" if order == ">" else ""
            yield f"jpeg {name}{suffix}", write(Page(samples, photometric, **plain), order=order), shown, 12
            tiles = plain | {"tile": 16}
            yield f"jpeg {name} tiles{suffix}", write(Page(samples, photometric, **tiles), order=order), shown, 12
            one = plain | {"rows": HEIGHT}
            yield f"jpeg {name} one strip{suffix}", write(Page(samples, photometric, **one), order=order), shown, 12
            apart = plain | {"planes": True, "encode": partial(_jpeg_chunk, mode="L")}
            yield f"jpeg {name} planes{suffix}", write(Page(samples, photometric, **apart), order=order), shown, 12
            shared = partial(_jpeg_chunk, mode=mode, streamtype=2)
            tables = _bytes_of(jpeg(samples, mode, streamtype=1, **_sampling(mode)))
            held = plain | {"encode": shared, "tags": {347: tables}}
            yield (
                f"jpeg {name} shared tables{suffix}",
                write(Page(samples, photometric, **held), order=order),
                shown,
                12,
            )
            old = plain | {"compression": OLD_JPEG, "rows": HEIGHT}
            yield f"old jpeg {name}{suffix}", write(Page(samples, photometric, **old), order=order), shown, 12
    for across, down, name in ((2, 1, "4:2:2"), (2, 2, "4:2:0")):
        encode = partial(_jpeg_chunk, mode="YCbCr", subsampling=name)
        for kind, compression, rows in (("jpeg", JPEG, 16), ("jpeg", JPEG, HEIGHT), ("old jpeg", OLD_JPEG, HEIGHT)):
            page = Page(ycbcr, YCBCR, compression=compression, encode=encode, rows=rows, subsampling=(across, down))
            yield f"{kind} ycbcr {name} {rows} rows", write(page), _rgb(rgb), 40
    bilevel = whole(ramps[..., 2:3], 1)
    for name, compression, how, tags in (
        ("rle", 2, {"compression": "tiff_ccitt"}, {}), ("group 3", G3, {"compression": "group3"}, {}),
        ("group 4", G4, {"compression": "group4"}, {}), ("rle in words", 32771, {"compression": "tiff_raw_16"}, {}),
    ):  # fmt: skip
        encode = partial(_bilevel_chunk, how=how)
        for photometric in (WHITE_IS_ZERO, GREY):
            shown = _rgb(bilevel * 255.0) if photometric == GREY else 255 - _rgb(bilevel * 255.0)
            for fill in (1, 2):
                page = Page(bilevel, photometric, 1, compression=compression, encode=encode, fill_order=fill, tags=tags)
                yield f"{name}, photometric {photometric}, fill order {fill}", write(page), shown, 0
    for name, encode, compression in (
        ("lzma", None, LZMA), ("old deflate", None, OLD_DEFLATE), ("zstd", partial(_by_pillow, compression="zstd"), ZSTD)
    ):  # fmt: skip
        yield name, write(Page(rgb, RGB, compression=compression, encode=encode)), _rgb(rgb), 0
    for name, compression in (
        ("webp", WEBP), ("lerc", LERC), ("jpeg 2000", JPEG_2000), ("jpeg xl", 50002), ("unknown compression", 60000)
    ):  # fmt: skip
        page = Page(rgb, RGB, compression=compression, encode=lambda chunk, data: data)
        yield name, write(page), _rgb(rgb), 0
    abbreviated = partial(_jpeg_chunk, mode="L", streamtype=2)
    old = Page(grey, GREY, compression=OLD_JPEG, encode=abbreviated, rows=HEIGHT)
    yield "old jpeg without tables", write(old), _rgb(grey), 0
    deep = whole(ramps[..., 2:3], 16)
    lossless = Page(deep, GREY, 16, compression=JPEG, encode=lambda chunk, data: data)
    yield "jpeg of 16 bits", write(lossless), _rgb(deep >> 8), 0
    twelve = whole(ramps[..., 2:3], 12)
    page = Page(twelve, GREY, 12, compression=DEFLATE, predictor=2)
    yield "12 bits and a predictor", write(page), _rgb(twelve >> 4), 0
    for photometric, shown in ((GREY, _rgb(grey)), (WHITE_IS_ZERO, 255 - _rgb(grey))):
        page = Page(grey, photometric, tile=16, tiles_as_strips=True)
        yield f"tiles as strips, photometric {photometric}", write(page), shown, 0
    yield "bits once", write(Page(rgb, RGB, tags={258: (_SHORT, [8])})), _rgb(rgb), 0
    yield "bits of 5, 6 and 5", write(Page(rgb, RGB, tags={258: (_SHORT, [5, 6, 5])})), _rgb(rgb), 0
    yield "no rows a strip", write(Page(rgb, RGB, rows=HEIGHT, tags={278: None})), _rgb(rgb), 0
    yield "no end of rows a strip", write(Page(rgb, RGB, rows=HEIGHT, tags={278: (_LONG, [2**32 - 1])})), _rgb(rgb), 0
    yield "grey and another, no extra samples", write(Page(rgb[..., :2], GREY)), _rgb(rgb[..., :1]), 0
    small = Page(rgb[::4, ::4], RGB, tags={254: (_LONG, [1])})
    mask = Page(bilevel, MASK, 1, tags={254: (_LONG, [4])})
    full = Page(rgb, RGB, tags={254: (_LONG, [0])})
    yield "a smaller copy first", write(small, full), _rgb(rgb), 0
    yield "a smaller copy first, then a mask", write(small, mask, full), _rgb(rgb), 0
    yield "a smaller copy last", write(full, small), _rgb(rgb), 0
    yield "a mask last", write(full, mask), _rgb(rgb), 0
    yield "a mask first", write(mask, full), _rgb(rgb), 0
    inner = Page(rgb[::4, ::4], RGB, tags={254: (_LONG, [1]), 330: (_LONG, [8])})
    yield "a smaller copy of an inner page", write(inner), _rgb(rgb), 0
    yield "a smaller copy of one that is not read", write(small, Page(whole(ramps[..., :1], 16), CFA, 16)), _rgb(rgb), 0
    yield "a smaller copy alone", write(small), _rgb(rgb[::4, ::4]), 0
    yield "several pages", write(full, Page(grey, GREY), full, big=True), _rgb(rgb), 0
    turned = {
        1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1), 6: rgb[::-1].swapaxes(0, 1),
        7: rgb[::-1, ::-1].swapaxes(0, 1), 8: rgb[:, ::-1].swapaxes(0, 1),
    }  # fmt: skip
    for orientation, upright in turned.items():
        tags = {274: (_SHORT, [orientation])}
        yield f"orientation {orientation}", write(Page(rgb, RGB, tags=tags)), upright, 0
        yield f"orientation {orientation} planes", write(Page(rgb, RGB, planes=True, tags=tags)), upright, 0
        deep = whole(upright[..., :1] / 255, 16)
        back = whole(rgb[..., :1] / 255, 16)
        page = Page(back, WHITE_IS_ZERO, 16, compression=DEFLATE, tags=tags)
        yield f"orientation {orientation} white-is-zero 16", write(page), 255 - _rgb(deep >> 8), 1


def _sampling(mode: str) -> dict[str, object]:
    return {"subsampling": "4:4:4"} if mode == "YCbCr" else {}


def _jpeg_chunk(chunk: Samples, data: bytes, *, mode: str, **how: object) -> bytes:
    return jpeg(chunk, mode, **(_sampling(mode) | how))


def _bilevel_chunk(chunk: Samples, data: bytes, *, how: dict[str, object]) -> bytes:
    """Compress bits with Pillow, which writes True as white: as 0 of white-is-zero, so the bits as they are in 1."""
    return pillow_strip(chunk.astype(bool), **how)


def _by_pillow(chunk: Samples, data: bytes, *, compression: str) -> bytes:
    return pillow_strip(chunk, compression=compression)
