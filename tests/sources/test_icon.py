"""ICO: the largest image counts, and of equally large ones the one of most bits a pixel."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from qvsplit.sources import icon, images, png
from tests.support.nasty_images import encoded, png_chunk
from tests.support.photographs import same_rgb

SIZE = (64, 64)


def made(*contents: tuple[int, bytes], bits: int = 0) -> bytes:
    """An icon of images, each with the size that its directory names."""
    at, head, body = 6 + 16 * len(contents), struct.pack("<4sH", icon.MAGIC, len(contents)), b""
    for size, content in contents:
        head += struct.pack("<BBBBHHII", size, size, 0, 0, 1, bits, len(content), at + len(body))
        body += content
    return head + body


def bitmap(image: Image.Image) -> bytes:
    """A bitmap as in an icon: its height twice, for a mask that hides nothing."""
    stream = io.BytesIO()
    image.save(stream, "DIB")
    data = bytearray(stream.getvalue())
    data[8:12] = struct.pack("<I", 2 * image.height)
    return bytes(data) + bytes(image.height * -(-image.width // 32) * 4)


@pytest.mark.parametrize("bits", [0, 24])
def test_of_equally_large_images_the_deepest_counts(photo, bits):
    deep, few = photo.resize(SIZE), photo.resize(SIZE).quantize(16)
    small = photo.resize((32, 32))
    contents = [(64, bitmap(few)), (64, bitmap(deep)), (32, bitmap(small))]
    for order in (contents, contents[::-1]):
        assert same_rgb(images.decode(made(*order, bits=bits)), deep)
    assert same_rgb(images.decode(made((32, bitmap(small)), (64, bitmap(few)))), few.convert("RGB"))


def test_the_texts_of_a_png_are_passed_over(photo):
    whole = photo.resize(SIZE)
    data = encoded(whole, "PNG")
    text = png_chunk(b"tEXt", b"workflow\0" + b"x" * 1_000_000) * 70
    with_text = data[:33] + text + data[33:]
    assert with_text.startswith(png.MAGIC)
    decoded, metadata = images.decode_with_metadata(made((64, bitmap(whole.quantize(4))), (64, with_text)))
    assert same_rgb(decoded, whole)
    assert metadata.format == "ICO"


def test_of_several_png_the_deepest_counts(photo):
    whole = photo.resize(SIZE)
    pngs = [
        (64, encoded(image, "PNG")) for image in (whole.quantize(16), whole, whole.convert("L"), whole.quantize(200))
    ]
    for order in (pngs, pngs[::-1]):
        assert same_rgb(images.decode(made(*order)), whole)


def test_of_png_that_are_all_as_deep_the_directory_says_which_had_fewer_colours(photo):
    whole = photo.resize(SIZE)
    data = bytearray(made((64, encoded(whole.quantize(16).convert("RGB"), "PNG")), (64, encoded(whole, "PNG"))))
    for bits in ((4, 32), (32, 4)):
        data[12:14], data[28:30] = struct.pack("<H", bits[0]), struct.pack("<H", bits[1])
        assert same_rgb(images.decode(bytes(data)), whole) == (bits == (4, 32))


def test_what_is_cut_within_its_directory_is_left_to_pillow(photo):
    data = made((64, bitmap(photo.resize(SIZE))))
    for length in (4, 5, 6, 10, 21):
        assert icon.largest(data[:length]) == data[:length]
    assert icon.largest(made()) == made()
