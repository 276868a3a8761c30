"""WebP and BMP whose pixels are whole and whose end is not as their header says."""

from __future__ import annotations

import struct

import pytest
from PIL import Image, features

from qvsplit.errors import ItemError
from qvsplit.sources import cut_ends, images
from tests.support.nasty_images import encoded
from tests.support.photographs import same_rgb

NEEDS_WEBP = pytest.mark.skipif(not features.check("webp"), reason="this Pillow reads no WebP")


def with_size(data: bytes, more: int) -> bytes:
    return data[:4] + struct.pack("<I", int.from_bytes(data[4:8], "little") + more) + data[8:]


@NEEDS_WEBP
@pytest.mark.parametrize(("more", "cut_rows"), [(10, 0), (1000, 0), (-2, None), (-20, None), (0, None)])
def test_a_webp_of_another_size_than_it_says(photo, more, cut_rows):
    data = encoded(photo, "WEBP", lossless=True)
    image, metadata = images.decode_with_metadata(with_size(data, more))
    assert same_rgb(image, photo)
    assert metadata.cut_rows == cut_rows


@NEEDS_WEBP
def test_a_webp_that_lacks_metadata_behind_its_pixels_is_read_and_said_to_be_cut(photo):
    exif = Image.Exif()
    exif[0x0132] = "2024:01:31 12:00:00"
    data = encoded(photo, "WEBP", lossless=True, exif=exif)
    at = data.index(b"EXIF")
    assert images.decode_with_metadata(data)[1].taken_at is not None
    for length in (at, at + 3, at + 10, len(data) - 2):
        image, metadata = images.decode_with_metadata(data[:length])
        assert same_rgb(image, photo)
        assert (metadata.cut_rows, metadata.taken_at) == (0, None)
    with pytest.raises(ItemError, match="damaged"):
        images.decode(data[: at - 10])


@NEEDS_WEBP
def test_a_sound_webp_is_not_copied(photo):
    data = encoded(photo, "WEBP", lossless=True)
    assert cut_ends.whole_webp(data)[0] is data
    more = data + b"something else"
    assert cut_ends.whole_webp(more) == (more, False)
    assert cut_ends.whole_webp(more)[0] is more
    assert cut_ends.whole_webp(data[:12])[0] == data[:12]


@pytest.mark.parametrize(("mode", "width"), [("RGB", 33), ("RGB", 34), ("RGB", 35), ("L", 33), ("1", 33)])
def test_a_bmp_that_lacks_what_fills_up_its_last_row(photo, mode, width):
    whole = photo.resize((width, 20)).convert(mode)
    data = encoded(whole, "BMP")
    filling = {"RGB": -3 * width % 4, "L": -width % 4, "1": 3}[mode]
    image, metadata = images.decode_with_metadata(data[:-filling])
    assert same_rgb(image, whole.convert("RGB"))
    assert metadata.cut_rows in (0, None)  # of the last byte Pillow does not say that it is missing
    with pytest.raises(ItemError, match="cut off"):
        images.decode(data[: -filling - 1])
    assert images.decode_with_metadata(data)[1].cut_rows is None


def test_a_bmp_of_32_bits_has_no_such_bytes(photo):
    data = encoded(photo.resize((32, 20)).convert("RGBA"), "BMP")
    for length in (1, 4):
        with pytest.raises(ItemError, match="cut off"):
            images.decode(data[:-length])


@NEEDS_WEBP
def test_an_animation_that_is_cut_is_not_said_to_be_whole(photo):
    small = photo.resize((40, 30))
    frames = [small.rotate(90), small.rotate(180)]
    data = encoded(small, "WEBP", save_all=True, append_images=frames, lossless=True)
    assert images.frames(data) == 3
    for length in range(len(data) // 2, len(data) - 2, len(data) // 9):
        with pytest.raises(ItemError, match="damaged"):
            images.decode(data[:length])
