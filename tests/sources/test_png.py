"""PNG: transparency at every depth, held against NumPy; and whatever stands beside the picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qvsplit.errors import ItemError
from qvsplit.sources import images, png
from tests.support.nasty_images import deflated_zeros, encoded, png_chunk
from tests.support.photographs import same_rgb

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
COLOUR_TYPES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # → samples


def rows_of(samples: np.ndarray, depth: int) -> bytes:
    flat = samples.reshape(len(samples), -1)
    if depth >= 8:
        packed = [row.astype(f">u{depth // 8}").tobytes() for row in flat]
    else:
        packed = [np.packbits((row[:, None] >> np.arange(depth - 1, -1, -1)) & 1).tobytes() for row in flat]
    return b"".join(b"\0" + row for row in packed)


def made(samples: np.ndarray, depth: int, colour: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG of these samples, [height, width, samples of a pixel]."""
    height, width = samples.shape[:2]
    parts = [samples[y::dy, x::dx] for x, y, dx, dy in PASSES] if interlaced else [samples]
    data = zlib.compress(b"".join(rows_of(part, depth) for part in parts if part.size))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    tail = png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return png.MAGIC + png_chunk(b"IHDR", head) + b"".join(chunks) + tail


def samples_of(depth: int, colour: int) -> np.ndarray:
    """Random samples; the upper rows are of one colour, and of such that are next to it."""
    samples = np.random.default_rng(depth).integers(0, 1 << depth, (13, 19, COLOUR_TYPES[colour])).astype(np.uint32)
    samples[:6] = np.array([0x1234, 0x5678, 0x9ABC, 0xFFFF])[: samples.shape[2]] & ((1 << depth) - 1)
    samples[2, :, -1] ^= 1
    samples[3, :, 0] ^= 1 << (depth - 1)
    return samples


def eight_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    return (samples >> 8 if depth == 16 else samples * 255 // ((1 << depth) - 1)).astype(np.uint8)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
def test_a_transparent_colour_is_white_and_no_other(colour, depth, interlaced):
    samples = samples_of(depth, colour)
    key = samples[0, 0]
    beyond = 0x4000 if depth < 16 else 0  # bits that do not count
    chunk = png_chunk(b"tRNS", b"".join(struct.pack(">H", int(value) | beyond) for value in key))
    decoded = np.asarray(images.decode(made(samples, depth, colour, chunk, interlaced=interlaced)))
    is_key = (samples == key).all(axis=2)
    assert 0 < is_key.sum() < is_key.size
    assert (decoded == np.where(is_key[..., None], 255, eight_bits(samples, depth))).all()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("entries", ["one", "half", "all"])
def test_a_palette_with_alpha_is_over_white(depth, entries, interlaced):
    rng, size = np.random.default_rng(depth), 1 << depth
    palette = rng.integers(0, 256, (size, 3)).astype(np.uint8)
    given = {"one": 1, "half": max(1, size // 2), "all": size}[entries]
    alphas = (rng.integers(0, 256, given), np.where(np.arange(given) == given - 1, 0, 255), np.zeros(given, int))
    for alpha in alphas:
        samples = rng.integers(0, size, (13, 19, 1)).astype(np.uint32)
        chunks = png_chunk(b"PLTE", palette.tobytes()), png_chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
        decoded = np.asarray(images.decode(made(samples, depth, 3, *chunks, interlaced=interlaced)))
        opacity = np.concatenate([alpha, np.full(size - given, 255)])[samples]
        expected = np.rint((palette[samples[..., 0]].astype(int) * opacity + 255 * (255 - opacity)) / 255)
        assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(4, 8), (4, 16), (6, 8), (6, 16)])
def test_alpha_is_over_white(colour, depth, interlaced):
    samples = samples_of(depth, colour)
    samples[:2, :, -1], samples[2:6, :, -1] = 0, (1 << depth) - 1
    decoded = np.asarray(images.decode(made(samples, depth, colour, interlaced=interlaced))).astype(int)
    eight = eight_bits(samples, depth).astype(int)
    colours, alpha = eight[..., :-1], eight[..., -1:]
    assert (decoded == np.rint((colours * alpha + 255 * (255 - alpha)) / 255)).all()
    assert (decoded[:2] == 255).all()
    assert (decoded[2:6] == colours[2:6]).all()


# -------------------------------------------------------------------------------------------- beside the picture

TEXT = zlib.compress(b"x" * 1_700_000)
PROFILE = zlib.compress(np.random.default_rng(0).bytes(1_400_000))
BESIDE = {
    "a large profile": png_chunk(b"iCCP", b"display\0\0" + PROFILE),
    "a profile packed by nobody knows what": png_chunk(b"iCCP", b"display\0\7" + PROFILE),
    "a large text": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + TEXT),
    "a large old text": png_chunk(b"zTXt", b"workflow\0\0" + TEXT),
    "a text packed by nobody knows what": png_chunk(b"zTXt", b"workflow\0\7" + TEXT),
    "a bomb": png_chunk(b"zTXt", b"workflow\0\0" + deflated_zeros(300 << 20)),
    "a bomb where orientation may be": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + deflated_zeros(300 << 20)),
    "70 MB of text": png_chunk(b"tEXt", b"workflow\0" + b"x" * 1_000_000) * 70,
    "70 MB where orientation may be": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 1_000_000) * 70,
    "a text named as a setting of Pillow's": png_chunk(b"tEXt", b"transparency\0" + b"x"),
    "chunks too short": b"".join(png_chunk(kind, b"") for kind in (b"cHRM", b"gAMA", b"pHYs", b"sRGB", b"iCCP")),
    "a chunk of another checksum": png_chunk(b"gAMA", b"\0\0\0\1")[:-1] + b"?",
    "a block of another checksum": png_chunk(b"eXIf", b"II*\0\0\0\0\0")[:-1] + b"?",
}


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_what_is_beside_the_picture_is_passed_over(photo, beside, behind):
    data = encoded(photo, "PNG")
    at = data.index(b"IEND") - 4 if behind else 33
    image, metadata = images.decode_with_metadata(data[:at] + beside + data[at:])
    assert same_rgb(image, photo)
    assert metadata.cut_rows is None


def test_a_colour_that_is_transparent_by_a_chunk_of_another_checksum_is_not(photo):
    data = encoded(photo, "PNG")
    key = struct.pack(">3H", *photo.getpixel((0, 0)))
    assert same_rgb(images.decode(data[:33] + png_chunk(b"tRNS", key)[:-1] + b"?" + data[33:]), photo)
    assert images.decode(data[:33] + png_chunk(b"tRNS", key) + data[33:]).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_counts_once_before_the_pixels_and_of_its_length(photo):
    data = encoded(photo, "PNG")
    key = struct.pack(">3H", *photo.getpixel((0, 0)))
    first, other = png_chunk(b"tRNS", key), png_chunk(b"tRNS", struct.pack(">3H", *photo.getpixel((300, 200))))
    once = images.decode(data[:33] + first + data[33:])
    assert not same_rgb(once, photo)
    assert same_rgb(images.decode(data[:33] + first + other + data[33:]), once)
    assert same_rgb(images.decode(data[:-12] + first + data[-12:]), photo)
    assert same_rgb(images.decode(data[:33] + png_chunk(b"tRNS", key + b"xx") + data[33:]), photo)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
MAGICK = b"\nexif\n      32\n" + EXIF.hex().encode()
UPRIGHT = {
    "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "xmp packed": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "ImageMagick": png_chunk(b"tEXt", b"Raw profile type exif\0" + MAGICK),
    "ImageMagick packed": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(MAGICK)),
    "exif": png_chunk(b"eXIf", EXIF[6:]),
}


@pytest.mark.parametrize("chunk", UPRIGHT.values(), ids=UPRIGHT.keys())
def test_texts_that_say_which_way_is_up_are_read(photo, chunk):
    data = encoded(photo, "PNG")
    large = png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + TEXT)
    assert images.decode(data[:33] + large + chunk + data[33:]).size == (photo.height, photo.width)


def test_many_megabytes_are_not_copied(photo):
    """The file that Pillow reads is made of pieces of the one that was read."""
    data = encoded(photo, "PNG")
    whole = png.read(data[:33] + BESIDE["a large text"] + data[33:])
    assert all(isinstance(piece, memoryview) for piece in whole.pieces)
    with whole.open() as stream:
        assert stream.read() == data
        assert stream.seek(-8, io.SEEK_END) == len(data) - 8
        assert stream.read(100) == data[-8:]
        assert (stream.seek(30), stream.read(8)) == (30, data[30:38])


def test_an_animation_keeps_its_frames(photo):
    small = photo.resize((20, 10))
    data = encoded(small, "PNG", save_all=True, append_images=[small.rotate(90), small], default_image=True)
    assert images.frames(data) == 3
    assert same_rgb(images.decode(data), small)
    with_text = data[:33] + BESIDE["a large text"] + data[33:]
    assert (images.frames(with_text), same_rgb(images.decode(with_text), small)) == (3, True)


def test_an_animation_that_is_broken_or_cut_leaves_its_first_image(photo):
    small = photo.resize((20, 10))
    data = encoded(small, "PNG", save_all=True, append_images=[small.rotate(90), small])
    assert images.frames(data) == 3
    at = data.rindex(b"fcTL") - 4
    image, metadata = images.decode_with_metadata(data[:at])
    assert (same_rgb(image, small), metadata.cut_rows, images.frames(data[:at])) == (True, 0, 2)
    first = data.index(b"fcTL") - 4
    without = data[:first] + data[first + 38 :]
    assert (same_rgb(images.decode(without), small), images.frames(without)) == (True, 3)
    no_control = without.replace(b"fcTL", b"fcTl")
    assert (same_rgb(images.decode(no_control), small), images.frames(no_control)) == (True, 1)
    said_late = encoded(small, "PNG").replace(b"IEND", b"acTL\0\0\0\0IEND")
    assert images.frames(said_late) == 1


def test_a_chunk_of_pixels_that_has_only_its_head_is_no_loss(photo):
    data = encoded(photo, "PNG")
    image, metadata = images.decode_with_metadata(data[:-12] + b"\0\0\x76\x4eIDAT")
    assert (same_rgb(image, photo), metadata.cut_rows) == (True, 0)


def test_without_its_last_chunk_a_png_is_read_and_said_to_be_cut_off(photo):
    data = encoded(photo, "PNG")
    assert data[-12:-4] == b"\0\0\0\0IEND"
    for length in (1, 4, 8, 11, 12):
        image, metadata = images.decode_with_metadata(data[:-length])
        assert same_rgb(image, photo)
        assert metadata.cut_rows == 0
    text = png_chunk(b"tEXt", b"workflow\0" + b"x" * 1000)
    assert images.decode_with_metadata(data[:-12] + text[:500])[1].cut_rows == 0
    with pytest.raises(ItemError, match="cut off"):
        images.decode(data[:-200])


def test_pillow_would_have_refused(photo):
    """What this file holds against Pillow is still so; else `png.py` may go."""
    data = encoded(photo, "PNG")
    with pytest.raises(ValueError, match="Decompressed data too large"), Image.open(
        io.BytesIO(data[:33] + BESIDE["a large text"] + data[33:])
    ):  # fmt: skip
        pass
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20
