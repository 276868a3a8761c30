"""JPEG whose segments beside the pixels are broken."""

from __future__ import annotations

import io

import pytest
from PIL import Image, UnidentifiedImageError

from qvsplit.sources import images, jpeg_segments
from tests.support.nasty_images import encoded
from tests.support.photographs import same_rgb


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize("body", [b"", b"JFIF\0", b"Exif\0\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0\x38BIM", b"Adobe"])
def test_what_is_beside_the_pixels_may_be_broken(photo, marker, body):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo, "JPEG", exif=exif)
    broken = bytes((0xFF, marker)) + (2 + len(body)).to_bytes(2, "big") + body
    upright = images.decode(data)
    assert upright.size == (photo.height, photo.width)
    for beside in (broken, broken * 2):
        decoded, metadata = images.decode_with_metadata(data[:-2].replace(b"\xff\xdb", beside + b"\xff\xdb", 1))
        assert same_rgb(decoded, upright)
        assert metadata.cut_rows == 0


def test_pillow_would_have_refused(photo):
    """What this holds against Pillow is still so; else the second try may go."""
    data = encoded(photo, "JPEG")
    broken = data[:2] + b"\xff\xe0\0\7JFIF\0" + data[20:]
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(broken))
    assert same_rgb(images.decode(broken), images.decode(data))


def test_the_rest_is_as_it_was(photo):
    data = encoded(photo, "JPEG", progressive=True, comment=b"something")
    kept = jpeg_segments.without_metadata(data)
    assert len(kept) < len(data)
    assert b"something" not in kept
    assert same_rgb(images.decode(kept), images.decode(data))
    assert jpeg_segments.without_metadata(kept) == kept
