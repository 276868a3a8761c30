"""Hostile and broken image files, made on the fly: the same ones for the same seed and Pillow.

Every bad file is as small as it can be, but what it claims or unpacks to is not: hold a run over them against a limit
of memory and of time. What must come of a file is said by `expected`, where it is certain.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import itertools
import math
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image, features

# Patterns of fnmatch over paths relative to the corpus (as the file system has them). What is in none is not certain:
# broken pixels often still make a image, and who is root reads all.
EXPECTED_OK = (
    "sound/*",
    "names/*",
    "bombs/unpacks_*.png",
    "lying/wrong_name_*",
    "lying/trailing_*",
    "lying/exif_*",
    "lying/xmp_*",
    "lying/icc_*",
    "lying/mode_*",
    "lying/slim_*",
    "lying/palette_*",
    "lying/second_*.gif",
    "lying/second_*.png",
    "lying/second_*.tif",
    "special/link_to_image.png",
    "special/link_to_folder/*",
    "special/link_named_image.png/*",
    "special/images/inside.png",
    "special/ancient.png",
    "special/far_future.png",
)
EXPECTED_FAILED = (
    "truncated/first_half/*",
    "bombs/claims_*",
    "lying/not_a_image_*",
    "lying/no_finite_*",
    "special/fifo.png",
    "special/socket.png",
    "special/device_*",
    "special/dangling.png",
    "special/loop_*",
    "special/sparse.png",
)
# Behind a path that no call takes in one piece: whoever does not get there should say so.
EXPECTED_UNREACHED = ("names/too_deep/*",)
# Sound images, but too slim for the model's processor, which is not asked when a file is decoded.
TOO_SLIM = ("lying/slim_*",)

SAMPLE_STEP = 17
LIMIT = 178_956_970  # `max_image_pixels` where this corpus is read: by default more is, and takes as much longer
UNDER_LIMIT = 13377  # squared: just under it
NAME_MAX, PATH_MAX = 255, 4096


def expected(relative: str) -> bool | None:
    """Whether the file at `relative` must become a image (True), must fail (False), or may do either (None)."""
    for patterns, outcome in ((EXPECTED_UNREACHED, None), (EXPECTED_FAILED, False), (EXPECTED_OK, True)):
        if any(fnmatch.fnmatchcase(relative, pattern) for pattern in patterns):
            return outcome
    return None


def make_corpus(folder: Path, *, flips: int = 2000, seed: int = 0, sample: bool = False) -> dict[str, int]:
    """Fill `folder` and return how many entries of each kind it made. Remove it with `remove_corpus`.

    A `sample`, always the same, has every kind of file, but of the truncated ones only every SAMPLE_STEP-th, and none of
    the bombs that take a second or more each.
    """
    # bound by the length of a path: sockets, and what is nested to just below the limit, count from the root
    folder = Path(os.path.abspath(folder))
    makers: dict[str, Iterable[tuple[str, bytes]]] = {
        "sound": _sound(),
        "truncated": _truncated(SAMPLE_STEP if sample else 1),
        "flipped": _flipped(flips, random.Random(seed)),
        "bombs": (bomb for bomb in _bombs() if not (sample and _is_slow(bomb[0]))),
        "lying": _lying(random.Random(seed)),
    }
    counts = {kind: _write_all(folder / kind, files) for kind, files in makers.items()}
    counts["special"] = _make_special(folder / "special")
    counts["names"] = _make_names(folder / "names")
    return counts


def remove_corpus(folder: Path) -> None:
    """Delete it all: what is unreadable, and what lies deeper than a path can be long."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            inner = os.path.join(path, name)
            if len(os.fsencode(inner)) < PATH_MAX and not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder)  # by way of descriptors, so the length of a path does not matter


def _write_all(folder: Path, files: Iterable[tuple[str, bytes]]) -> int:
    count = 0
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), f"two files are called {path}"
        path.write_bytes(data)
        count += 1
    return count


# ------------------------------------------------------------------------------------------------- sound images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a file of this kind."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def drawing(width: int = 16, height: int = 12, shift: int = 0) -> Image.Image:
    """Slopes and an edge: enough that every coder has something to code."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            ((x * 15 + shift) % 256, (y * 20) % 256, 255 if x > y else (x * y + shift) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    return image


def small_images() -> dict[str, bytes]:
    """By file name: the common formats, each of some hundred bytes, so that every length of it can be tried."""
    image = drawing()
    palette = image.quantize(8)
    return {
        "jpeg.jpg": encoded(image, "JPEG", quality=30, optimize=True),
        "progressive.jpg": encoded(image, "JPEG", quality=30, progressive=True),
        "png.png": encoded(image, "PNG"),
        "webp.webp": encoded(image, "WEBP", quality=50),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "gif.gif": encoded(palette, "GIF"),
        "tiff.tif": encoded(palette.convert("L"), "TIFF"),
        "lzw.tif": encoded(image.convert("L"), "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(image.convert("L"), "TIFF", compression="tiff_adobe_deflate"),
        "bmp.bmp": encoded(image.resize((8, 6)), "BMP"),
    }


def larger_images() -> dict[str, bytes]:
    """By file name: every format this Pillow writes and qvsplit reads, with metadata, some kilobytes each."""
    image, second = drawing(48, 40), drawing(48, 40, 90)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2024:01:01 00:00:00"}
    block = exif.tobytes()
    meta = {"exif": block, "icc_profile": _profile()}
    more = {"save_all": True, "append_images": [second, image], "duration": 50}
    deep = Image.frombytes("I;16", (48, 40), bytes(i * 7 % 256 for i in range(48 * 40 * 2)))
    images = {
        "jpeg.jpg": encoded(image, "JPEG", **meta),
        "progressive.jpg": encoded(image, "JPEG", progressive=True, **meta),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG", restart_marker_blocks=2),
        "mpo.mpo": encoded(image, "MPO", save_all=True, append_images=[second]),
        "png.png": encoded(image, "PNG", **meta),
        "deep.png": encoded(deep, "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG", transparency=3),
        "animated.png": encoded(image, "PNG", **more),
        "webp.webp": encoded(image, "WEBP", **meta),
        "lossless.webp": encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "animated.webp": encoded(image, "WEBP", **more),
        "gif.gif": encoded(image.quantize(32), "GIF", transparency=1),
        "animated.gif": encoded(image, "GIF", **more),
        "tiff.tif": encoded(image, "TIFF", exif=block),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(image, "TIFF", compression="jpeg"),
        "float.tif": encoded(image.convert("F"), "TIFF"),
        "bilevel.tif": encoded(image.convert("1"), "TIFF", compression="group4"),
        "bmp.bmp": encoded(image, "BMP"),
        "palette.bmp": encoded(image.quantize(16), "BMP"),
        "dib.dib": encoded(image, "DIB"),
        "ppm.ppm": encoded(image, "PPM"),
        "plain.ppm": b"P3\n8 8\n255\n" + b" ".join(b"%d" % (i * 5 % 256) for i in range(192)),
        "pgm.pgm": encoded(image.convert("L"), "PPM"),
        "tga.tga": encoded(image, "TGA"),
        "rle.tga": encoded(image.convert("RGBA"), "TGA", compression="tga_rle"),
        "ico.ico": encoded(image, "ICO", sizes=[(32, 32), (16, 16)]),
        "bitmap.ico": encoded(image, "ICO", sizes=[(32, 32)], bitmap_format="bmp"),
    }
    if features.check("jpg_2000"):
        images["jpeg2000.jp2"] = encoded(image, "JPEG2000")
        images["codestream.j2k"] = encoded(image, "JPEG2000", no_jp2=True, tile_size=(16, 16))
    if features.check("avif"):
        images["avif.avif"] = encoded(image, "AVIF", speed=10, exif=block)
        images["animated.avif"] = _undated(encoded(image, "AVIF", speed=10, save_all=True, append_images=[second]))
    return images


def _undated(film: bytes) -> bytes:
    """Without when it was made, which would differ from run to run."""
    data = bytearray(film)
    for kind in (b"mvhd", b"tkhd", b"mdhd"):
        at = film.find(kind)
        if at >= 0:
            length = 16 if data[at + 4] == 1 else 8
            data[at + 8 : at + 8 + length] = bytes(length)
    return bytes(data)


def _profile() -> bytes:
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # when it was made, which would differ from run to run
    return bytes(profile)


def _sound() -> Iterator[tuple[str, bytes]]:
    yield from larger_images().items()
    for name, data in small_images().items():
        yield f"small_{name}", data


# ----------------------------------------------------------------------------------------------- broken by chance


def _truncated(step: int) -> Iterator[tuple[str, bytes]]:
    """Every length; the first half of a file is never a image, of the second half a viewer may make one."""
    for name, data in small_images().items():
        stem, suffix = name.split(".")
        for length in range(0, len(data), step):
            half = "first_half" if length < len(data) // 2 else "second_half"
            yield f"{half}/{stem}_{suffix}_{length:04d}.{suffix}", data[:length]


def _flipped(flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    images = larger_images()
    for i, (name, sound) in zip(range(flips), itertools.cycle(images.items()), strict=False):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            _damage(data, rng)
        yield f"{i:05d}_{name}", bytes(data)


def _damage(data: bytearray, rng: random.Random) -> None:
    """At one place; half of them in the head, where the sizes are."""
    at = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))
    run = rng.randint(1, 16)
    match rng.randrange(6):
        case 0 | 1:
            data[at] ^= 1 << rng.randrange(8)
        case 2:
            data[at] = rng.randrange(256)
        case 3:
            data[at : at + run] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * len(data[at : at + run])
        case 4:
            data[at : at + run] = rng.randbytes(len(data[at : at + run]))
        case _:
            if len(data) > 100:
                data[at : at + run] = b"" if rng.random() < 0.5 else data[at : at + run] * 2


# ---------------------------------------------------------------------------------------------------------- bombs


def _is_slow(name: str) -> bool:
    """Whether it takes a second or more. One such, and one that is not done in minutes, stay in a sample."""
    return ("under_limit" in name and name != "under_limit_one_row.png") or name in {
        "scans_3000.jpg",
        "runs_of_jumps.bmp",
    }


def _bombs() -> Iterator[tuple[str, bytes]]:
    for make in (_png_bombs, _gif_bombs, _tiff_bombs, _webp_bombs, _jpeg_bombs, _bmp_bombs, _other_bombs):
        yield from make()
    if features.check("jpg_2000"):
        yield from _jpeg2000_bombs()
    if features.check("avif"):
        yield from _avif_bombs()


def deflated_zeros(count: int) -> bytes:
    """What zlib makes of `count` zero bytes, without deflating them: one block after another, a thousandth in size."""
    block = 1 << 20
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    one = coder.compress(bytes(block)) + coder.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = last.compress(bytes(count % block)) + last.flush()
    return b"\x78\xda" + one * (count // block) + rest + struct.pack(">HH", count % 65521, 1)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0, data: bytes = b""
) -> bytes:
    """A PNG of these claims. `data` is the compressed pixels; without, they are zeros, just as many as are claimed."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    row = math.ceil(width * samples * depth / 8) + 1  # and 15/8 as many rows, each a byte or two longer, if interlaced
    data = data or deflated_zeros((row + 3 * interlaced) * height)
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *chunks, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")))


def _png_bombs() -> Iterator[tuple[str, bytes]]:
    side, nothing = UNDER_LIMIT, zlib.compress(b"")
    for width, height in ((60000, 60000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (2**31 - 1, 1), (13378, 13378)):
        yield f"claims_{width}x{height}.png", png(width, height, colour=2, data=nothing)
    yield "claims_zero.png", png(0, 0, data=nothing)
    yield "claims_2_to_32.png", png(2**32 - 1, 2**32 - 1, data=nothing)
    yield "under_limit_grey.png", png(side, side)
    yield "under_limit_bilevel.png", png(side, side, depth=1)
    yield "under_limit_interlaced.png", png(side, side, depth=1, interlaced=1)
    clear = (png_chunk(b"PLTE", bytes(6)), png_chunk(b"tRNS", b"\0\x80"))
    yield "under_limit_transparent.png", png(side, side, *clear, depth=1, colour=3)
    yield "under_limit_deep.png", png(12000, 12000, depth=16)
    yield "under_limit_one_row.png", png(side * side, 1, depth=1)
    yield "under_limit_one_column.png", png(1, 10_000_000, depth=1)
    yield "under_limit_no_data.png", png(side, side, colour=6, data=nothing)
    yield "more_data_than_claimed.png", png(16, 16, data=deflated_zeros(280 << 20))
    many = deflated_zeros(280 << 20)
    yield "unpacks_compressed_text.png", png(16, 16, png_chunk(b"zTXt", b"Comment\0\0" + many))
    yield "unpacks_international_text.png", png(16, 16, png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + many))
    yield "unpacks_profile.png", png(16, 16, png_chunk(b"iCCP", b"icc\0\0" + many))
    text = png_chunk(b"zTXt", b"Comment\0\0" + deflated_zeros(1_000_000))
    yield "unpacks_many_text.png", png(16, 16, *[text] * 250)
    yield "many_chunks.png", png(16, 16, *[png_chunk(b"teSt", b"")] * 20_000)
    data = zlib.compress(bytes(17 * 16))
    one_by_one = b"".join(png_chunk(b"IDAT", data[i : i + 1]) for i in range(len(data)))
    yield "empty_data_chunks.png", png(16, 16, png_chunk(b"IDAT", b"") * 20_000 + one_by_one)
    head = png(16, 16)[:33]
    for length in (2**31 - 1, 2**32 - 1):
        yield f"chunk_of_{length}.png", head + struct.pack(">I", length) + b"IDAT" + bytes(100)
        yield f"text_of_{length}.png", head + struct.pack(">I", length) + b"tEXt" + bytes(100)
    frames = png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    yield "claims_nothing_but_frames.png", b"\x89PNG\r\n\x1a\n" + frames + png_chunk(b"IEND", b"")
    yield "frames_2_to_31.png", png(16, 16, frames)


def gif(width: int, height: int, *blocks: bytes, colours: int = 2) -> bytes:
    table = bytes(range(3 * colours))
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80 | (colours.bit_length() - 2), 0, 0) + table
        + b"".join(blocks) + b";"
    )  # fmt: skip


def gif_frame(width: int, height: int, left: int = 0, top: int = 0, codes: bytes = b"\x02\x44\x01\x00") -> bytes:
    """`codes` as the coder puts them: blocks of bytes, each after its length, then an empty one. These: one pixel."""
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02" + codes


def gif_zeros(count: int) -> bytes:
    """LZW of `count` pixels of colour 0 for a minimal code size of 2: every code stands for one pixel more."""
    bits, held, out = 0, 0, bytearray()

    def put(code: int, width: int) -> None:
        nonlocal bits, held
        bits |= code << held
        held += width
        while held >= 8:
            out.append(bits & 255)
            bits >>= 8
            held -= 8

    while count > 0:
        put(4, 3)  # clear
        put(0, 3)
        count -= 1
        width, following = 3, 6
        while count > 0 and following < 4096:
            put(following, width)
            count -= following - 4
            following += 1
            if following == 1 << width and width < 12:
                width += 1
        # the decoder reads the next code with the width it has by then
        if count > 0:
            put(4, width)
            put(0, 3)
            count -= 1
            put(4, 3)
    put(5, 12)
    put(0, 7)
    blocks = b"".join(bytes([len(out[i : i + 255])]) + bytes(out[i : i + 255]) for i in range(0, len(out), 255))
    return blocks + b"\0"


def _gif_bombs() -> Iterator[tuple[str, bytes]]:
    yield "claims_65535x65535.gif", gif(65535, 65535, gif_frame(65535, 65535))
    yield "claims_large_frame.gif", gif(1, 1, gif_frame(65535, 65535))
    yield "claims_large_screen.gif", gif(65535, 65535, gif_frame(1, 1))
    yield "claims_frame_far_outside.gif", gif(16, 16, gif_frame(8, 8, 60000, 60000))
    yield "frame_outside.gif", gif(16, 16, gif_frame(8, 8, 1000, 1000))
    yield "frame_beyond_the_edge.gif", gif(16, 16, gif_frame(16, 16, 8, 8))
    yield "claims_zero.gif", gif(0, 0, gif_frame(0, 0))
    yield "no_frame.gif", gif(16, 16)
    yield "thousands_of_frames.gif", gif(1, 1, *[gif_frame(1, 1)] * 15_000)
    yield "thousands_of_comments.gif", gif(1, 1, *[b"!\xfe\x01x\0"] * 50_000, gif_frame(1, 1))
    yield "endless_comment.gif", gif(1, 1, b"!\xfe" + (b"\xff" + b"x" * 255) * 1000)
    yield "under_limit.gif", gif(UNDER_LIMIT, UNDER_LIMIT, gif_frame(UNDER_LIMIT, UNDER_LIMIT, codes=gif_zeros(UNDER_LIMIT**2)))  # fmt: skip
    yield "under_limit_screen.gif", gif(UNDER_LIMIT, UNDER_LIMIT, gif_frame(1, 1))
    control = b"!\xf9\x04\x01\0\0\0\0"
    yield "under_limit_transparent.gif", gif(UNDER_LIMIT, UNDER_LIMIT, control, gif_frame(1, 1))


Entry = tuple[int, int, int, bytes]  # tag, type, count, and either the value or what lies elsewhere


def tiff(entries: Iterable[Entry], data: bytes = b"", following: int = 0, at: int | None = None) -> bytes:
    """A little-endian TIFF: header, `data` (from byte 8 on), one directory, and the values too long for it.

    `following` is where it says that the next directory is; `at`, where it says that the first one is.
    """
    entries = sorted(entries)
    start = 8 + len(data) + len(data) % 2
    outside, table = b"", struct.pack("<H", len(entries))
    end = start + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        if len(value) > 4:
            table += struct.pack("<HHII", tag, kind, count, end + len(outside))
            outside += value + bytes(len(value) % 2)
        else:
            table += struct.pack("<HHI4s", tag, kind, count, value)
    head = b"II*\0" + struct.pack("<I", start if at is None else at)
    return head + data.ljust(start - 8, b"\0") + table + struct.pack("<I", following) + outside


def short(tag: int, *values: int) -> Entry:
    return tag, 3, len(values), struct.pack(f"<{len(values)}H", *values)


def long(tag: int, *values: int) -> Entry:
    return tag, 4, len(values), struct.pack(f"<{len(values)}I", *values)


def image_tags(
    width: int, height: int, *, bits: tuple[int, ...] = (8,), compression: int = 1, photometric: int = 1, rows: int = 0,
    offsets: tuple[int, ...] = (8,), counts: tuple[int, ...] = (192,), more: tuple[Entry, ...] = ()
) -> list[Entry]:  # fmt: skip
    """The tags of a image in strips; those in `more` stand instead of ours."""
    own = [
        long(256, width), long(257, height), short(258, *bits), short(259, compression), short(262, photometric),
        long(273, *offsets), short(277, len(bits)), long(278, rows or height), long(279, *counts),
    ]  # fmt: skip
    given = {entry[0] for entry in more}
    return [entry for entry in own if entry[0] not in given] + list(more)


def _tiff_bombs() -> Iterator[tuple[str, bytes]]:
    pixels = bytes(192)
    most = 2**32 - 1
    for name, width, height in (
        ("65535x65535", 65535, 65535), ("2_to_31", 2**31 - 1, 2**31 - 1), ("2_to_32", most, most),
        ("one_column", 1, most), ("one_row", most, 1), ("zero", 0, 0),
    ):  # fmt: skip
        yield f"claims_{name}.tif", tiff(image_tags(width, height), pixels)
    many = 1 << 24
    huge_arrays = ((273, 4, many, struct.pack("<I", 8)), (279, 4, many, struct.pack("<I", 8)))
    for compression, name in ((1, "raw"), (5, "lzw"), (8, "deflate")):
        tags = image_tags(16, many // 2, compression=compression, rows=1, more=huge_arrays)
        yield f"millions_of_strips_{name}.tif", tiff(tags, pixels)
        for what, offset, count in (("bytes_4_gb", 8, most), ("beyond_the_end", most - 1000, 192), ("no_bytes", 8, 0)):
            tags = image_tags(16, 12, compression=compression, offsets=(offset,), counts=(count,))
            yield f"strip_{what}_{name}.tif", tiff(tags, pixels)
        strips = 20_000
        tags = image_tags(16, strips, compression=compression, rows=1, offsets=(8,) * strips, counts=(16,) * strips)
        yield f"thousands_of_strips_{name}.tif", tiff(tags, pixels)
    plain = image_tags(16, 12)
    start = 8 + len(pixels)
    yield "next_is_itself.tif", tiff(plain, pixels, following=start)
    yield "next_is_beyond_the_end.tif", tiff(plain, pixels, following=most)
    yield "first_is_header.tif", tiff(plain, pixels, at=0)
    yield "first_is_beyond_the_end.tif", tiff(plain, pixels, at=most)
    yield "inner_directory_is_itself.tif", tiff([*plain, long(330, start), long(34665, start)], pixels)
    for tag in (256, 258, 270, 273, 277, 279, 320, 338, 339, 33550, 34675):
        for kind in (2, 4, 12):
            huge = (tag, kind, most, struct.pack("<I", 8))
            yield f"tag_{tag}_type_{kind}_count_2_to_32.tif", tiff(image_tags(16, 12, more=(huge,)), pixels)
    yield "tags_65535.tif", tiff(plain, pixels)[: start] + struct.pack("<H", 65535) + struct.pack("<HHII", 256, 4, 1, 16) * 20_000  # fmt: skip
    yield "samples_65535.tif", tiff(image_tags(16, 12, more=(short(277, 65535),)), pixels)
    yield "bits_65535.tif", tiff(image_tags(16, 12, bits=(65535,)), pixels)
    yield "planes_apart.tif", tiff(image_tags(16, 12, bits=(8,) * 3, photometric=2, more=(short(284, 2),)), pixels)
    for side in (1 << 16, 1 << 20, 1 << 31):
        tags = [e for e in image_tags(16, 12, compression=8) if e[0] not in {273, 278, 279}]
        tags += [long(322, side), long(323, side), long(324, 8), long(325, 192)]
        yield f"tile_of_{side}.tif", tiff(tags, zlib.compress(pixels))
    # one strip of a thousand rows that stands for every strip: large images out of little, and in costly modes
    side, rows = 13000, 1000
    for name, bits, photometric, extra in (
        ("grey", (8,), 1, ()), ("rgb", (8,) * 3, 2, ()), ("float", (32,), 1, (short(339, 3),)),
        ("integers", (32,), 1, (short(339, 2),)), ("lab", (8,) * 3, 8, ()), ("cmyk", (8,) * 4, 5, ()),
        ("rgba", (8,) * 4, 2, (short(338, 2),)), ("deep", (16,), 1, ()), ("deep_rgb", (16,) * 3, 2, ()),
    ):  # fmt: skip
        strip = deflated_zeros(side * rows * sum(bits) // 8)
        tags = image_tags(
            side, side, bits=bits, compression=8, photometric=photometric, rows=rows, offsets=(8,) * (side // rows),
            counts=(len(strip),) * (side // rows), more=extra,
        )  # fmt: skip
        yield f"under_limit_{name}.tif", tiff(tags, strip)
    strip = deflated_zeros(280 << 20)
    yield "more_data_than_claimed.tif", tiff(image_tags(16, 12, compression=8, counts=(len(strip),)), strip)
    inner = jpeg(65500, 65500)
    tags = image_tags(16, 12, bits=(8,), compression=7, counts=(len(inner),))
    yield "other_image_inside.tif", tiff(tags, inner)
    big = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63 - 1) + bytes(100)
    yield "big_tiff_tags_2_to_63.tif", big
    entry = struct.pack("<HHQQ", 256, 16, 2**61, 16)
    yield "big_tiff_count_2_to_61.tif", b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1) + entry + bytes(8)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(c)) + c + bytes(len(c) % 2) for kind, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"VP8X", bytes([flags, 0, 0, 0]) + size


def webp_lossless(width: int, height: int) -> tuple[bytes, bytes]:
    """All of one colour, and complete: codes that know one symbol take no bits, however many pixels there are."""
    bits, at = 0x2F, 8
    fields = [(width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1)]
    for symbol in (90, 160, 40, 255, 0):  # green, red, blue, alpha, distance
        fields += [(1, 1), (0, 1), (1, 1), (symbol, 8)]
    for value, width_in_bits in fields:
        bits |= value << at
        at += width_in_bits
    return b"VP8L", bits.to_bytes(at // 8 + 4, "little")


def _webp_bombs() -> Iterator[tuple[str, bytes]]:
    side = UNDER_LIMIT
    yield "claims_16383x16383_lossless.webp", riff(webp_lossless(16383, 16383))
    yield "claims_16384x16384_lossless.webp", riff(webp_lossless(16384, 16384))
    lossy = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(20)
    yield "claims_16383x16383_lossy.webp", riff((b"VP8 ", lossy))
    for width, height in ((16383, 16383), (65535, 65535), (1 << 24, 1), (1 << 24, 1 << 24)):
        yield f"canvas_{width}x{height}.webp", riff(webp_canvas(width, height), webp_lossless(16, 16))
    frame = bytes(6) + bytes(6) + bytes(4)  # at 0, 0; 1x1; no duration
    one = b"".join((b"VP8L", struct.pack("<I", len(webp_lossless(1, 1)[1])), webp_lossless(1, 1)[1]))
    one += bytes(len(one) % 2)
    animation = (b"ANIM", bytes(6))
    yield "claims_animated_16383x16383.webp", riff(webp_canvas(16383, 16383, 2), animation, (b"ANMF", frame + one))
    yield "under_limit_animated.webp", riff(webp_canvas(side, side, 0x12), animation, (b"ANMF", frame + one))
    yield "thousands_of_frames.webp", riff(webp_canvas(1, 1, 2), animation, *[(b"ANMF", frame + one)] * 5000)
    yield "under_limit.webp", riff(webp_lossless(side, side))
    nested = b""
    for _ in range(5000):
        nested = b"RIFF" + struct.pack("<I", len(nested) + 4) + b"WEBP" + nested
    yield "nested.webp", nested
    nested = b""
    for _ in range(5000):
        nested = b"ANMF" + struct.pack("<I", len(nested) + 16) + bytes(16) + nested
    yield "nested_frames.webp", riff(webp_canvas(16, 16, 2), animation, (b"ANMF", bytes(16) + nested))
    yield "length_2_to_32.webp", b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff" + bytes(100)
    yield "thousands_of_chunks.webp", riff(webp_canvas(16, 16), *[(b"JUNK", b"")] * 20_000, webp_lossless(16, 16))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(
    width: int, height: int, scans: bytes | None = None, *, components: int = 1, frame: int = 0xC0, before: bytes = b""
) -> bytes:
    """A JPEG whose one scan is empty, which decoders fill with grey; or with other `scans`."""
    parts = b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    coding = b"\x01" + bytes(15) + b"\0"  # one code, of one bit, for nothing
    chosen = b"".join(bytes([i + 1, 0]) for i in range(components))
    if scans is None:
        scans = segment(0xDA, bytes([components]) + chosen + (b"\0\x3f\0" if frame == 0xC0 else b"\0\0\0"))
    return b"".join((
        b"\xff\xd8", before, segment(0xDB, b"\0" + b"\1" * 64),
        segment(frame, struct.pack(">BHHB", 8, height, width, components) + parts),
        segment(0xC4, b"\0" + coding), segment(0xC4, b"\x10" + coding), scans, b"\xff\xd9",
    ))  # fmt: skip


def _jpeg_bombs() -> Iterator[tuple[str, bytes]]:
    side = UNDER_LIMIT
    for name, frame in (("baseline", 0xC0), ("progressive", 0xC2)):
        yield f"claims_65500x65500_{name}.jpg", jpeg(65500, 65500, frame=frame)
        yield f"claims_65535x65535_{name}.jpg", jpeg(65535, 65535, frame=frame, components=3)
        yield f"under_limit_{name}.jpg", jpeg(side, side, frame=frame, components=3)
        yield f"under_limit_cut_{name}.jpg", jpeg(side, side, frame=frame, components=3)[:-2]
        yield f"under_limit_cmyk_{name}.jpg", jpeg(side, side, frame=frame, components=4)
    first = segment(0xDA, b"\x01\x01\0\0\0\0")
    again = segment(0xDA, b"\x01\x01\0\x01\x3f\0")  # an empty scan of ten bytes goes over every block once more
    yield "scans_500_small.jpg", jpeg(1000, 1000, first + again * 500, frame=0xC2)
    yield "scans_3000.jpg", jpeg(4000, 4000, first + again * 3000, frame=0xC2)
    yield "scans_29000_under_limit.jpg", jpeg(side, side, first + again * 29_000, frame=0xC2)
    restart = b"".join(bytes([0xFF, 0xD0 + i]) for i in range(8))
    every = segment(0xDD, b"\0\1")
    yield "restarts.jpg", jpeg(64, 64, every + segment(0xDA, b"\x01\x01\0\0\x3f\0") + restart * 18_000)
    yield "restarts_before_the_scan.jpg", jpeg(64, 64, before=restart * 18_000)
    yield "restarts_no_end.jpg", jpeg(4000, 4000, every + segment(0xDA, b"\x01\x01\0\0\x3f\0") + restart * 18_000)[:-2]
    yield "fill_bytes.jpg", jpeg(16, 16, before=b"\xff" * 290_000)
    yield "no_end_of_fill_bytes.jpg", b"\xff\xd8" + b"\xff" * 290_000
    yield "comments.jpg", jpeg(16, 16, before=segment(0xFE, b"") * 60_000)
    yield "application_data.jpg", jpeg(16, 16, before=segment(0xE5, b"x" * 65_000) * 4)
    yield "profiles.jpg", jpeg(16, 16, before=segment(0xE2, b"ICC_PROFILE\0\1\xff") * 10_000)
    yield "exif_blocks.jpg", jpeg(16, 16, before=segment(0xE1, b"Exif\0\0" + exif_block(6)) * 8_000)
    yield "tables.jpg", jpeg(16, 16, before=segment(0xDB, b"\0" + b"\1" * 64) * 4_000)
    yield "frames.jpg", jpeg(16, 16, before=segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0") * 10_000)
    for marker, name in ((0xC1, "extended"), (0xC3, "lossless"), (0xC9, "arithmetic"), (0xCA, "arithmetic_steps")):
        yield f"coded_{name}.jpg", jpeg(16, 16, frame=marker)
    yield "claims_zero.jpg", jpeg(0, 0)
    yield "height_later.jpg", jpeg(16, 0, segment(0xDA, b"\x01\x01\0\0\x3f\0") + segment(0xDC, b"\xff\xff"))
    yield "components_255.jpg", jpeg(16, 16, components=255)


def bmp(
    width: int, height: int, *, bits: int = 8, compression: int = 0, data: bytes = b"", colours: int = 2, start: int = 0
) -> bytes:
    table = bytes(4 * min(colours, 256))
    at = start or 54 + len(table)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + head + table + data


def _bmp_bombs() -> Iterator[tuple[str, bytes]]:
    most = 2**31 - 1
    for name, width, height in (
        ("2_to_31", most, most), ("upside_down", most, -most), ("wide", most, 1), ("tall", 1, most),
        ("lowest", 1, -(2**31)), ("60000x60000", 60000, 60000), ("60000x60000_upside_down", 60000, -60000),
        ("zero", 0, 0),
    ):  # fmt: skip
        yield f"claims_{name}.bmp", bmp(width, height)
        yield f"claims_{name}.dib", bmp(width, height)[14:]
    for name, width, height in (("negative_width", -16, 12), ("both_negative", -16, -12), ("far_negative", -most, 1)):
        yield f"{name}.bmp", bmp(width, height, data=bytes(192))
    side = UNDER_LIMIT
    yield "under_limit_no_data.bmp", bmp(side, side, bits=24)
    # Run lengths: Pillow unpacks these byte by byte, and a line's end may stand for a whole line
    yield "runs_of_line_ends.bmp", bmp(side, side, compression=1, data=b"\x01\0\0\0" * side + b"\0\1")
    yield "runs_of_jumps.bmp", bmp(side, side, compression=1, data=b"\0\2\xff\xff" * 70_000 + b"\0\1")
    yield "runs_of_nothing.bmp", bmp(side, side, compression=1, data=b"\0\0" * 140_000)
    yield "runs.bmp", bmp(6000, 6000, compression=1, data=b"\xff\1" * 140_000 + b"\0\1")
    yield "runs_of_four_bits.bmp", bmp(6000, 6000, bits=4, compression=2, data=b"\xff\x10" * 140_000 + b"\0\1")
    yield "runs_end_at_once.bmp", bmp(side, side, compression=1, data=b"\0\1")
    yield "colours_2_to_32.bmp", bmp(16, 12, colours=2**32 - 1, data=bytes(192))
    yield "starts_beyond_the_end.bmp", bmp(16, 12, start=2**32 - 1)
    yield "bits_65535.bmp", bmp(16, 12, bits=65535, data=bytes(192))
    yield "compression_99.bmp", bmp(16, 12, compression=99, data=bytes(192))


def ico(*entries: tuple[int, int, int, int], data: bytes = b"", count: int | None = None) -> bytes:
    """Entries of width, height, length and offset."""
    table = b"".join(struct.pack("<BBBBHHII", w, h, 0, 0, 1, 32, length, offset) for w, h, length, offset in entries)
    return struct.pack("<HHH", 0, 1, len(entries) if count is None else count) + table + data


def _other_bombs() -> Iterator[tuple[str, bytes]]:
    for name, offset in (("itself", 0), ("its_entry", 6), ("beyond_the_end", 2**31), ("beyond_all", 2**32 - 1)):
        yield f"entry_is_{name}.ico", ico((16, 16, 100, offset))
    yield "thousands_of_entries.ico", ico(*[(16, 16, 100, 0)] * 18_000)
    yield "no_entries.ico", ico()
    yield "entries_65535.ico", ico((16, 16, 100, 22), count=65535)
    side = UNDER_LIMIT
    for name, inner in (
        ("claims_60000x60000", png(60000, 60000, data=zlib.compress(b""))),
        ("under_limit", png(side, side, depth=1)),
        ("claims_60000x60000_bitmap", bmp(60000, 60000, bits=32)[14:]),
        ("under_limit_bitmap", bmp(side, side, bits=32)[14:]),
        ("negative_bitmap", bmp(16, -32, bits=32, data=bytes(1024))[14:]),
        ("no_bits", bmp(16, 32, bits=0, data=bytes(1024))[14:]),
    ):
        yield f"{name}.ico", ico((16, 16, len(inner), 22), data=inner)
    for width, height, data in ((65535, 65535, b""), (65535, 2730, b"\xff\0" * 140_000), (6000, 6000, b"\xff\0" * 140_000)):  # fmt: skip
        for kind, bits in ((11, 8), (10, 24), (3, 8)):
            head = struct.pack("<BBBHHBHHHHBB", 0, 0, kind, 0, 0, 0, 0, 0, width, height, bits, 0)
            name = "claims" if width * height > 2e8 else "runs"
            yield f"{name}_{width}x{height}_kind_{kind}.tga", head + data
    yield "palette_65535.tga", struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 65535, 65535, 32, 0, 0, 16, 12, 8, 0) + bytes(192)
    yield "claims_99999x99999.pgm", b"P5 99999 99999 255\n" + bytes(100)
    yield "claims_99999x99999.ppm", b"P6 99999 99999 255\n" + bytes(100)
    yield "claims_99999x99999.pbm", b"P1 99999 99999\n" + b"1 0 " * 100
    yield "claims_digits.pgm", b"P5 " + b"9" * 200_000 + b" 9 255\n"
    yield "claims_many_digits.pgm", b"P5 9999999999 9999999999 255\n"
    yield "endless_comment.pgm", b"P5 #" + b"x" * 290_000
    yield "thousands_of_comments.pgm", b"P5\n" + b"#\n" * 140_000 + b"16 12 255\n" + bytes(192)
    yield "endless_space.pgm", b"P5" + b" " * 290_000
    yield "endless_space_before_pixels.pgm", b"P2 16 12 255" + b" " * 290_000
    yield "endless_pixel.pgm", b"P2 16 12 255\n" + b"1" * 290_000
    yield "pixels_too_many.pgm", b"P2 16 12 255\n" + b"1 " * 140_000
    yield "under_limit_plain.pgm", b"P2 13377 13377 255\n" + b"1 " * 140_000
    yield "under_limit_plain.pbm", b"P1 13377 13377\n" + b"1" * 290_000
    yield "under_limit_no_data.ppm", b"P6 13377 13377 255\n"
    yield "under_limit_deep.pgm", b"P5 13377 13377 65535\n" + bytes(1000)
    yield "greatest_0.pgm", b"P5 16 12 0\n" + bytes(192)
    yield "greatest_2_to_32.pgm", b"P5 16 12 4294967296\n" + bytes(192)
    yield "negative.pgm", b"P5 -16 -12 255\n" + bytes(192)
    yield "scale_nan.pnm", b"Pf 16 12 nan\n" + bytes(768)
    yield "scale_0.pnm", b"Pf 16 12 0\n" + bytes(768)
    yield "under_limit_float.pnm", b"Pf 13377 13377 -1\n" + bytes(768)
    yield "any_samples.pnm", b"P7\nWIDTH 60000\nHEIGHT 60000\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"


def codestream(width: int, height: int, tile_width: int, tile_height: int, components: int = 1) -> bytes:
    """The head of a JPEG 2000 image, and its end: nothing between."""
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, tile_width, tile_height, 0, 0, components)
    size += b"\x07\1\1" * components
    coding = b"\0\0\0\1\0\x05\4\4\0\1"
    quantities = b"\x40" + b"\x40" * 16
    part = segment(0x90, struct.pack(">HIBB", 0, 14, 0, 1)) + b"\xff\x93"
    return b"\xff\x4f" + segment(0x51, size) + segment(0x52, coding) + segment(0x5C, quantities) + part + b"\xff\xd9"


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def jp2(width: int, height: int, components: int, stream: bytes) -> bytes:
    head = box(b"ihdr", struct.pack(">IIHBBBB", height, width, components, 7, 7, 0, 0))
    colour = box(b"colr", b"\1\0\0" + struct.pack(">I", 17 if components < 3 else 16))
    return b"".join((
        box(b"jP  ", b"\r\n\x87\n"), box(b"ftyp", b"jp2 \0\0\0\0jp2 "), box(b"jp2h", head + colour), box(b"jp2c", stream),
    ))  # fmt: skip


def _jpeg2000_bombs() -> Iterator[tuple[str, bytes]]:
    most, side = 2**32 - 1, UNDER_LIMIT
    for name, width, height in (("2_to_32", most, most), ("60000x60000", 60000, 60000), ("one_column", 1, most)):
        yield f"claims_{name}.j2k", codestream(width, height, width, height)
        yield f"claims_{name}.jp2", jp2(width, height, 1, codestream(width, height, width, height))
    yield "under_limit_one_tile.j2k", codestream(side, side, side, side)
    yield "under_limit_one_tile_rgb.j2k", codestream(side, side, side, side, 3)
    yield "under_limit_large_tile.j2k", codestream(side, side, most, most)
    yield "under_limit_thousands_of_tiles.j2k", codestream(side, side, 53, 53)
    yield "under_limit_thousands_of_tiles_rgba.j2k", codestream(side, side, 53, 53, 4)
    yield "under_limit_tiny_tiles.j2k", codestream(side, side, 1, 1)
    yield "tiles_of_nothing.j2k", codestream(16, 16, 0, 0)
    yield "components_within.jp2", jp2(16, 16, 3, codestream(16, 16, 16, 16, 16384))
    yield "components_and_tiles_within.jp2", jp2(16, 16, 3, codestream(255, 255, 1, 1, 16384))
    yield "some_components_and_tiles_within.jp2", jp2(16, 16, 3, codestream(255, 255, 2, 2, 256))
    yield "other_size_within.jp2", jp2(16, 16, 1, codestream(60000, 60000, 60000, 60000))
    yield "other_size_within_under_limit.jp2", jp2(16, 16, 1, codestream(side, side, side, side))
    nested = b""
    for _ in range(10_000):
        nested = box(b"jp2h", nested)
    yield "nested.jp2", jp2(16, 16, 1, b"")[:32] + nested
    yield "boxes.jp2", jp2(16, 16, 1, b"")[:32] + box(b"free", b"") * 30_000
    sound = encoded(drawing(48, 40), "JPEG2000", no_jp2=True)
    yield "claims_60000x60000_with_data.j2k", sound[:8] + struct.pack(">II", 60000, 60000) + sound[16:]


def _avif_bombs() -> Iterator[tuple[str, bytes]]:
    sound = encoded(drawing(48, 40), "AVIF", speed=10)
    at = sound.index(b"ispe") + 8
    for name, width, height in (
        ("claims_65535x65535", 65535, 65535), ("claims_2_to_32", 2**32 - 1, 2**32 - 1), ("claims_zero", 0, 0),
        ("larger_16384x16384", 16384, 16384), ("larger_under_limit", UNDER_LIMIT, UNDER_LIMIT), ("smaller", 1, 1),
    ):  # fmt: skip
        yield f"{name}.avif", sound[:at] + struct.pack(">II", width, height) + sound[at + 8 :]
    brand = box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    nested = b""
    for _ in range(10_000):
        nested = box(b"meta", b"\0\0\0\0" + nested)
    yield "nested.avif", brand + nested
    yield "box_2_to_64.avif", brand + b"\0\0\0\1meta" + b"\xff" * 8 + bytes(100)
    yield "items_2_to_32.avif", brand + box(b"meta", bytes(4) + box(b"iinf", b"\1\0\0\0\xff\xff\xff\xff"))


# ---------------------------------------------------------------------------------------------------------- lying


def exif_block(orientation: int) -> bytes:
    return tiff([short(0x0112, orientation)])


def _with_exif(block: bytes) -> bytes:
    return encoded(drawing(16, 12), "JPEG", exif=b"Exif\0\0" + block)


def _lying(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    yield from _wrong_names(rng)
    yield from _wrong_metadata()
    yield from _odd_images()


def _wrong_names(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    small = small_images()
    for inside, suffix in (("png.png", "jpg"), ("jpeg.jpg", "png"), ("webp.webp", "jpeg"), ("gif.gif", "PNG"),
                           ("bmp.bmp", "webp"), ("lzw.tif", "gif"), ("jpeg.jpg", "tga"), ("png.png", "heic")):  # fmt: skip
        yield f"wrong_name_{inside.split('.')[0]}.{suffix}", small[inside]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("image.png"), small["png.png"])
    elf = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQ", 2, 62, 1, 0x400000, 64, 0) + bytes(200)
    for name, data in {
        "text.jpg": b"This is not an image.\n" * 20,
        "zip.png": archive.getvalue(),
        "pdf.jpg": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\nshowpage\n%%EOF\n",
        "film.jpg": box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + box(b"free", b"") + box(b"mdat", bytes(100)),
        "page.png": b"<!DOCTYPE html><html><body><img src='image.png'></body></html>\n",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
        "pickle.jpg": pickle.dumps({"image": [1, 2, 3]}),
        "program.jpg": elf,
        "script.png": b"#!/bin/sh\necho hello\n",
        "heif.heic": box(b"ftyp", b"heic\0\0\0\0heicmif1") + bytes(100),
        "heif.jpg": box(b"ftyp", b"mif1\0\0\0\0mif1heic") + bytes(100),
        "sequence.heif": box(b"ftyp", b"hevc\0\0\0\0hevcmsf1") + bytes(100),
        "avif.avif": box(b"ftyp", b"avif\0\0\0\0avifmif1") + bytes(100),
        "photoshop.jpg": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 12, 16, 8, 3) + bytes(12),
        "empty.png": b"",
        "newline.jpg": b"\n",
        "zero_byte.jpg": b"\0",
        "zeros.jpg": bytes(1_000_000),
        "zeros.tga": bytes(1_000_000),
        "noise.jpg": b"\xa5" + rng.randbytes(1_000_000),
        "noise.tga": b"\xa5" + rng.randbytes(1000),
    }.items():
        yield f"not_a_image_{name}", data
    for name, magic in {
        "jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF89a", "webp": b"RIFF\0\0\0\0WEBP", "bmp": b"BM",
        "tif": b"II*\0", "mpo": b"\xff\xd8\xff\xe2", "tiff": b"MM\0*\0\0\0\x08", "ico": b"\0\0\1\0", "ppm": b"P6",
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n", "j2k": b"\xff\x4f\xff\x51", "avif": b"\0\0\0\x1cftypavif",
    }.items():  # fmt: skip
        yield f"not_a_image_only_magic.{name}", magic
        yield f"not_a_image_magic_and_zeros.{name}", magic + bytes(1000)
        yield f"magic_and_noise.{name}", magic + rng.randbytes(1000)
    for name in ("jpeg.jpg", "png.png", "gif.gif", "webp.webp", "bmp.bmp", "lzw.tif"):
        yield f"trailing_zip_{name}", small[name] + archive.getvalue()
        yield f"leading_newline_{name}", b"\r\n" + small[name]
        yield f"as_text_{name}", small[name].replace(b"\n", b"\r\n")


def _wrong_metadata() -> Iterator[tuple[str, bytes]]:
    six = short(0x0112, 6)
    sizes = [long(0x0100, 60000), long(0x0101, 60000), long(0xA002, 99999), long(0xA003, 99999)]
    blocks = {
        "orientation_0": exif_block(0),
        "orientation_9": exif_block(9),
        "orientation_65535": exif_block(65535),
        "orientation_text": tiff([(0x0112, 2, 2, b"6\0")]),
        "orientation_bytes": tiff([(0x0112, 7, 4, b"\6\0\0\0")]),
        "orientation_fraction": tiff([(0x0112, 5, 1, struct.pack("<II", 6, 0))]),
        "orientation_nan": tiff([(0x0112, 11, 1, struct.pack("<f", math.nan))]),
        "orientation_negative": tiff([(0x0112, 8, 1, struct.pack("<h", -6))]),
        "orientation_many": tiff([short(0x0112, 6, 3, 1)]),
        "orientation_none": tiff([(0x0112, 3, 0, b"")]),
        "orientation_2_to_32": tiff([(0x0112, 3, 2**32 - 1, b"\x08\0\0\0")]),
        "orientation_unknown_type": tiff([(0x0112, 99, 1, b"\6\0\0\0")]),
        "orientation_twice": tiff([six, short(0x0112, 3)]),
        "other_sizes": tiff([six, *sizes]),
        "empty": b"",
        "only_order": b"II",
        "noise": bytes(i * 97 % 256 for i in range(400)),
        "text": b"this is not a block of tags",
        "first_beyond_the_end": tiff([six], at=2**32 - 1),
        "first_is_header": tiff([six], at=0),
        "loop": tiff([six], following=8),
        "inner_loop": tiff([six, long(0x8769, 8), long(0x8825, 8), long(0xA005, 8)]),
        "inner_beyond_the_end": tiff([six, long(0x8769, 2**32 - 1), long(0x8825, 2**31)]),
        "count_65535": tiff([six])[:8] + b"\xff\xff" + tiff([six])[10:],
        "thousands_of_tags": tiff([six, *((0x9000 + i, 4, 1, b"abcd") for i in range(5000))]),
        "maker_2_to_32": tiff([six, (0x927C, 7, 2**32 - 1, b"\x08\0\0\0"), (0x0110, 2, 2**31, b"\x08\0\0\0")]),
        "text_for_numbers": tiff([six, *((tag, 2, 4, b"odd\0") for tag in (0x0100, 0x0101, 0x0103, 0x0111, 0x0117))]),
        "big_tiff": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63 - 1) + bytes(30),
    }
    whole = tiff([six, short(0x0128, 2), (0x010F, 2, 12, b"some maker\0\0")])
    blocks |= {f"cut_{length:02d}": whole[:length] for length in range(2, len(whole), 5)}
    for name, block in blocks.items():
        yield f"exif_{name}.jpg", _with_exif(block)
        yield f"exif_{name}.png", encoded(drawing(16, 12), "PNG", exif=b"Exif\0\0" + block)
        yield f"exif_{name}.webp", encoded(drawing(16, 12), "WEBP", lossless=True, exif=b"Exif\0\0" + block)
    first, second = (segment(0xE1, b"Exif\0\0" + exif_block(n)) for n in (6, 3))
    plain = encoded(drawing(16, 12), "JPEG")
    yield "exif_two_blocks.jpg", plain[:2] + first + second + plain[2:]
    for orientation in (0, 1, 6, 9):
        # Pillow turns a TIFF by itself, as it loads it
        yield (
            f"exif_orientation_{orientation}.tif",
            tiff([*image_tags(16, 12), short(0x0112, orientation)], bytes(192)),
        )
    yield "exif_odd_beside.tif", tiff([*image_tags(16, 12), six, (0x0128, 2, 4, b"odd\0")], bytes(192))
    yield "exif_text_orientation.tif", tiff([*image_tags(16, 12), (0x0112, 2, 2, b"6\0")], bytes(192))

    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF><rdf:Description tiff:Orientation=\"%s\"/>"
    block = segment(0xE1, b"Exif\0\0" + exif_block(6))
    yield "xmp_contradicts_exif.jpg", plain[:2] + block + segment(0xE1, xmp % b"3") + plain[2:]
    yield "xmp_alone.jpg", plain[:2] + segment(0xE1, xmp % b"6") + plain[2:]
    yield "xmp_9.jpg", plain[:2] + segment(0xE1, xmp % b"9") + plain[2:]
    yield "xmp_billion_laughs.jpg", plain[:2] + segment(0xE1, xmp[:29] + _billion_laughs()) + plain[2:]

    profile = _profile()
    for name, broken in {
        "cut": profile[:100], "noise": bytes(i * 31 % 256 for i in range(3000)), "length": b"\xff\xff\xff\xff" + profile[4:],
        "cmyk": profile[:16] + b"CMYK" + profile[20:], "tags": profile[:128] + b"\xff\xff\xff\xff" + profile[132:],
    }.items():  # fmt: skip
        yield f"icc_{name}.jpg", encoded(drawing(16, 12), "JPEG", icc_profile=broken)
        yield f"icc_{name}.png", encoded(drawing(16, 12), "PNG", icc_profile=broken)
        yield f"icc_{name}.webp", encoded(drawing(16, 12), "WEBP", lossless=True, icc_profile=broken)
        yield f"icc_{name}.tif", encoded(drawing(16, 12), "TIFF", icc_profile=broken)
    lab = encoded(Image.new("LAB", (16, 12), (128, 128, 128)), "TIFF", icc_profile=profile[:100])
    yield "icc_cut_in_lab.tif", lab
    yield "broken_profile_chunk.png", png(16, 12, png_chunk(b"iCCP", b"icc\0\0not deflated"))
    yield "broken_text_chunk.png", png(16, 12, png_chunk(b"zTXt", b"Comment\0\0not deflated"))
    yield "broken_checksum.png", png(16, 12)[:-6] + b"\0\0\0\0\0\0"


def _billion_laughs() -> bytes:
    entities = b"".join(b'<!ENTITY l%d "%s">' % (i, b"&l%d;" % (i - 1) * 10) for i in range(1, 10))
    return b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">' + entities + b"]><x>&l9;</x>"


def _odd_images() -> Iterator[tuple[str, bytes]]:
    image = drawing(48, 40)
    mpo = encoded(image, "MPO", save_all=True, append_images=[drawing(48, 40, 90)])
    index = mpo.index(b"MPF\0")
    yield "index_of_noise.mpo", mpo[: index + 4] + bytes(i * 89 % 256 for i in range(40)) + mpo[index + 44 :]
    yield "index_of_2_to_32.mpo", mpo[: index + 4] + mpo[index + 4 :].replace(b"\1\xb0\4\0\1\0\0\0\2", b"\1\xb0\4\0\1\0\0\0\xff", 1)  # fmt: skip
    yield "index_alone.mpo", mpo[: mpo.index(b"\xff\xd8\xff", 10)]
    more = {"save_all": True, "append_images": [drawing(48, 40, 90)], "duration": 50}
    animated = encoded(image, "GIF", **more)
    yield "second_frame_broken.gif", animated[: len(animated) * 3 // 4] + b"\xff" * 20
    animated = encoded(image, "PNG", **more)
    at = animated.index(b"fdAT")
    yield "second_frame_broken.png", animated[: at + 8] + b"\xff" * 20 + animated[at + 28 :]
    animated = encoded(image, "WEBP", lossless=True, **more)
    at = animated.rindex(b"ANMF")
    yield "second_frame_broken.webp", animated[: at + 32] + b"\xff" * len(animated[at + 32 :])
    pages = encoded(image, "TIFF", save_all=True, append_images=[image])
    yield "second_page_broken.tif", pages[: len(pages) * 3 // 4]

    for width, height in ((1, 1), (1, 1000), (1000, 1), (1, 201), (3, 3000), (20_000, 20), (1, 65000)):
        if max(width, height) > 200 * min(width, height):
            yield f"slim_{width}x{height}.png", encoded(drawing(width, height), "PNG")
            yield f"slim_{width}x{height}.jpg", encoded(drawing(width, height), "JPEG")
        else:
            yield f"mode_rgb_{width}x{height}.png", encoded(drawing(width, height), "PNG")

    palette, table = bytes(17 * 12), png_chunk(b"PLTE", bytes(range(12)))
    for name, chunks, data in (
        ("long_transparency", (table, png_chunk(b"tRNS", bytes(256))), palette),
        ("empty_transparency", (table, png_chunk(b"tRNS", b"")), palette),
        ("index_out_of_range", (table,), (b"\0" + b"\xfe" * 16) * 12),
    ):
        yield f"palette_{name}.png", png(16, 12, *chunks, colour=3, data=zlib.compress(data))
    for name, before in (("none", []), ("empty", [png_chunk(b"PLTE", b"")]), ("odd", [png_chunk(b"PLTE", b"12345")])):
        yield f"table_{name}.png", png(16, 12, *before, colour=3, data=zlib.compress(palette))
    yield "transparency_of_grey_out_of_range.png", png(16, 12, png_chunk(b"tRNS", b"\xff\xff"))
    yield "transparency_cut.png", png(16, 12, png_chunk(b"tRNS", b"\1"))
    control = b"!\xf9\x04\x01\0\0\xfe\0"
    yield "palette_transparency_out_of_range.gif", gif(1, 1, control, gif_frame(1, 1))
    yield "no_palette.gif", b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + gif_frame(1, 1) + b";"

    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16", "LA", "I;16B"):
        yield f"mode_{mode.replace(';', '_')}.tif", encoded(_in_mode(mode), "TIFF")
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
        yield f"mode_{mode.replace(';', '_')}.png", encoded(_in_mode(mode), "PNG")
    nan, far = math.nan, math.inf
    for name, values in {
        "mode_f_nan": (nan, 0.5), "mode_f_inf": (far, -far, 1.0), "mode_f_huge": (3e38, -3e38, 0.0), "mode_f_tiny": (1e-45, 0.0),
        "mode_f_one_value": (7e9,), "no_finite_nan": (nan,), "no_finite_inf": (far, -far, nan),
    }.items():  # fmt: skip
        pixels = b"".join(
            struct.pack("<f", value) for value, _ in zip(itertools.cycle(values), range(192), strict=False)
        )
        yield f"{name}.tif", tiff(image_tags(16, 12, bits=(32,), counts=(768,), more=(short(339, 3),)), pixels)
    ends = struct.pack("<ii", 2**31 - 1, -(2**31)) * 96
    yield "mode_i_both_ends.tif", tiff(image_tags(16, 12, bits=(32,), counts=(768,), more=(short(339, 2),)), ends)
    doubles = struct.pack("<dd", 1e308, math.inf) * 96
    yield "doubles.tif", tiff(image_tags(16, 12, bits=(64,), counts=(1536,), more=(short(339, 3),)), doubles)


def _in_mode(mode: str) -> Image.Image:
    image = drawing(48, 40)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, image.size, bytes(i * 7 % 256 for i in range(48 * 40 * 2)))
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.tobytes())
    return image.convert("L").convert("F") if mode == "F" else image.convert(mode)


# -------------------------------------------------------------------------------------------------------- special


def _image(number: int) -> bytes:
    """A tiny one of its own content."""
    return encoded(drawing(30, 29, number), "PNG")


def _make_special(folder: Path) -> int:
    """What is no regular file, or cannot be read; outside of these folders it only links to devices."""
    folder.mkdir(parents=True)
    os.mkfifo(folder / "fifo.png")
    _make_socket(folder, "socket.png")
    for device in ("zero", "random", "urandom", "full", "null", "tty", "ptmx"):
        (folder / f"device_{device}.png").symlink_to(f"/dev/{device}")
    (folder / "images").mkdir()
    (folder / "images" / "inside.png").write_bytes(_image(0))
    (folder / "link_to_folder").symlink_to("images")
    (folder / "link_named_image.png").symlink_to("images")
    (folder / "link_to_image.png").symlink_to("images/inside.png")
    (folder / "images" / "loop").symlink_to("..")
    (folder / "images" / "loop_again").symlink_to(".")
    (folder / "dangling.png").symlink_to("nothing.png")
    (folder / "loop_self.png").symlink_to("loop_self.png")
    (folder / "loop_one.png").symlink_to("loop_two.png")
    (folder / "loop_two.png").symlink_to("loop_one.png")
    (folder / "loop_through.png").symlink_to("loop_self.png/image.png")
    (folder / "unreadable.png").write_bytes(_image(1))
    (folder / "unreadable.png").chmod(0)
    (folder / "unreadable_folder").mkdir()
    (folder / "unreadable_folder" / "inside.png").write_bytes(_image(2))
    (folder / "unreadable_folder").chmod(0)
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "folder.png").mkdir()
    with open(folder / "sparse.png", "wb") as stream:
        stream.write(_image(3))
        stream.truncate(2 << 30)
    for number, (name, seconds) in enumerate((("ancient", -(10**11)), ("far_future", 15 * 10**9)), 4):
        (folder / f"{name}.png").write_bytes(_image(number))
        # the file system may keep a nearer time; some keep these, which are beyond 64 bits of nanoseconds
        with contextlib.suppress(OSError, OverflowError):
            os.utime(folder / f"{name}.png", ns=(seconds * 10**9, seconds * 10**9))
    return sum(1 for _ in os.scandir(folder))


def _make_socket(folder: Path, name: str) -> None:
    """Its address may have some hundred bytes only: so it is made from within the folder."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    finally:
        os.fchdir(here)
        os.close(here)


# ---------------------------------------------------------------------------------------------------------- names


def _names() -> list[bytes]:
    text = [
        "plain.png", "UPPER.PNG", "two words.png", "new\nline.png", "tab\there.png", "return\rhere.png", "bell\a.png",
        "escape\x1b[31mred\x1b[0m.png", "delete\x7f.png", "emoji 🐈‍⬛👩‍👩‍👧.png", "猫.png", "قطة.png",
        "e\N{COMBINING ACUTE ACCENT}.png", "\N{LATIN SMALL LETTER E WITH ACUTE}.png", "z" + "\u0335\u0321\u0322" * 30 + ".png",
        "right\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe.png", "zero\N{ZERO WIDTH SPACE}width.png", "bom\ufeff.png",
        "separator\u2028line.png", "nel\x85.png", "'single'.png", '"double".png', "`back`.png", "back\\slash.png", "\\.png",
        "100%.png", "%s%n%d%(x)s.png", "%2e%2e%2f.png", "-rf.png", "--help.png", "-.png", " .png", "     .png", " lead.png",
        "trail .png", "trail.png .png", "[a-z].png", "[[]].png", "[bold]rich[_bold].png", "*.png", "?.png", "{a,b}.png",
        "{0}{x!r}.png", "$HOME.png", "$(touch oops).png", ";touch oops;.png", "a|b.png", "a&b.png", "<script>alert(1)<_script>.png",
        "#hash.png", "~.png", "~root.png", "!bang.png", "colon:.png", "C:\\image.png", "file:___image.png", "comma,.png",
        "=1+1.png", "@sum.png", "+1.png", "NULL.png", "nan.png", "a...png", "con.png", "x.png.jpg.png",
        "shard-000001.parquet.png", "xx2f.png", "_xff.png", "\uffff.png", "\U0010ffff.png", "\ue000.png",
    ]  # fmt: skip
    raw = [name.encode() for name in text]
    raw += [b"caf\xe9.png", b"\xff\xfe.png", b"\x80.png", b"\xed\xa0\x80.png", b"\xc0\xaf.png", b"cut\xf0\x9f\x90.png"]
    raw += [b"x" * (NAME_MAX - 4) + b".png", "猫".encode() * 83 + b"xx.png", b"\xff" * (NAME_MAX - 4) + b".png"]
    return raw


def _make_names(folder: Path) -> int:
    folder.mkdir(parents=True)
    numbers = itertools.count()
    made = 0
    inside = [
        b"   ",
        b"new\nline",
        b"caf\xe9",
        b"-d",
        b"[x]",
        b"folder.png",
        b"%s",
        b"\\",
        "\N{RIGHT-TO-LEFT OVERRIDE}x".encode(),
    ]
    places: list[tuple[bytes, bytes]] = [(b"", name) for name in _names()] + [(place, b"a.png") for place in inside]
    for place, name in places:
        made += _if_allowed(lambda: _write_at(os.path.join(os.fsencode(folder), place), name, _image(next(numbers))))  # noqa: B023

    # as deep as one path may say it, whatever this corpus lies in
    steps = max(1, (PATH_MAX - 100 - len(os.fsencode(folder))) // 201)
    long_path = os.path.join(os.fsencode(folder), b"deep", *[b"d" * 200] * (steps - 1))
    made += _if_allowed(lambda: _write_at(long_path, b"deep.png", _image(next(numbers))))
    made += _if_allowed(lambda: _make_too_deep(folder / "too_deep", _image(next(numbers))))
    return made


def _write_at(folder: bytes, name: bytes, data: bytes) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "xb") as stream:
        stream.write(data)


def _make_too_deep(folder: Path, data: bytes) -> None:
    """A image behind more than PATH_MAX bytes of path: made step by step, each from the one before."""
    folder.mkdir()
    at = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(PATH_MAX // 250 + 1):
            os.mkdir("d" * 250, dir_fd=at)
            inner = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        with os.fdopen(os.open("deep.png", os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=at), "wb") as stream:
            stream.write(data)
    finally:
        os.close(at)


def _if_allowed(make: Callable[[], None]) -> bool:
    """Whether it was made: not every file system takes any bytes for a name, or tells any two of them apart."""
    try:
        make()
    except OSError as error:
        if error.errno not in {errno.EILSEQ, errno.EINVAL, errno.EEXIST, errno.ENAMETOOLONG}:
            raise
        return False
    return True
