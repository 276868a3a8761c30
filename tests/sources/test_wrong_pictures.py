"""What Pillow decodes to a wrong picture is refused, and what it decodes rightly is not."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from qvsplit.errors import ItemError
from qvsplit.sources import images, wrong_pictures
from tests.support.nasty_images import encoded

NEEDS_JPEG2000 = pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000")


def codestream(photo: Image.Image, **changes: int) -> bytes:
    """A sound JPEG 2000, with bytes of its header changed: `depth`, `across`, `down` of each component."""
    data = bytearray(encoded(photo, "JPEG2000", no_jp2=True))
    count = int.from_bytes(data[40:42], "big")
    for number in range(count):
        for place, name in enumerate(("depth", "across", "down")):
            if name in changes and (number or name == "depth"):
                data[42 + 3 * number + place] = changes[name]
    return bytes(data)


@NEEDS_JPEG2000
@pytest.mark.parametrize(
    ("size", "mode", "changes", "reason"),
    [
        ((32, 32), "RGB", {}, None), ((33, 31), "RGB", {}, None), ((32, 32), "L", {}, None),
        ((32, 32), "RGB", {"depth": 11}, "whose colours have 12 bits"), ((32, 32), "L", {"depth": 8}, None),
        ((32, 32), "RGB", {"across": 2}, None), ((33, 32), "RGB", {"across": 2}, "have fewer pixels than it"),
        ((32, 33), "RGB", {"down": 2}, "have fewer pixels than it"),
        ((32, 32), "RGBA", {"across": 2}, "have fewer pixels than it"),
    ],
)  # fmt: skip
def test_jpeg_2000_whose_colours_would_be_wrong(photo, size, mode, changes, reason):
    data = codestream(photo.resize(size).convert(mode), **changes)
    if reason is None:
        wrong_pictures.check(data)
        return
    with pytest.raises(ItemError, match=f"is a JPEG 2000 file .*{reason}.*, which is not supported; convert it"):
        images.decode(data)


@NEEDS_JPEG2000
def test_deep_greys_of_jpeg_2000_are_right():
    deep = np.array([[0, 65535, 32768, 255]] * 4, np.uint16).repeat(4, 1).repeat(4, 0)
    decoded = np.asarray(images.decode(encoded(Image.fromarray(deep), "JPEG2000")))
    assert np.array_equal(decoded[..., 0], deep >> 8)


@NEEDS_JPEG2000
def test_colours_in_another_order_are_refused(photo):
    data = encoded(photo.resize((32, 32)), "JPEG2000")
    box = data.index(b"jp2h")
    length = int.from_bytes(data[box - 4 : box], "big")

    def defined(*meant: int) -> bytes:
        body = struct.pack(">H", 3) + b"".join(struct.pack(">HHH", n, 0, one) for n, one in enumerate(meant))
        extra = struct.pack(">I", 8 + len(body)) + b"cdef" + body
        end = box - 4 + length
        return data[: box - 4] + struct.pack(">I", length + len(extra)) + data[box:end] + extra + data[end:]

    assert images.decode(defined(1, 2, 3)).size == (32, 32)
    with pytest.raises(ItemError, match="whose colours are stored in another order"):
        images.decode(defined(1, 3, 2))


def test_bmp_of_4_bits_by_runs_is_refused(photo):
    data = bytearray(encoded(photo.quantize(16), "BMP"))
    assert images.decode(bytes(data)).size == photo.size
    data[30] = 2
    with pytest.raises(ItemError, match="is a BMP file of 4 bits packed by runs, which is not supported"):
        images.decode(bytes(data))


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [(1, 0xC3, "a lossless JPEG file"), (4, 12, "a JPEG file of 12 bits a sample"), (1, 0xC5, "a differential JPEG")],
)
def test_sound_jpegs_that_nothing_here_reads_are_not_called_damaged(photo, at, value, reason):
    data = bytearray(encoded(photo, "JPEG"))
    data[data.index(b"\xff\xc0") + at] = value
    with pytest.raises(ItemError, match=f"is {reason}.*, which is not supported"):
        images.decode(bytes(data))


def test_an_icon_is_no_tga(photo):
    """A TGA is told by numbers that make sense, and those of some icons do."""
    assert images.FORMATS[-1] == "TGA"
    stream = io.BytesIO()
    photo.resize((256, 256)).save(stream, "ICO", sizes=[(256, 256), (48, 48)])
    assert images.decode_with_metadata(stream.getvalue())[1].format == "ICO"
