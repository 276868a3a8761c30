"""What Pillow decodes to other pixels than are meant is refused, and what it decodes rightly is not."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from qvsplit.errors import ItemError
from qvsplit.sources import images, misread
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
        ((32, 32), "RGB", {"across": 2}, None), ((33, 32), "RGB", {"across": 2}, "have fewer pixels than others"),
        ((32, 33), "RGB", {"down": 2}, "have fewer pixels than others"),
        ((32, 32), "RGBA", {"across": 2}, "have fewer pixels than others"),
    ],
)  # fmt: skip
def test_jpeg_2000_whose_colours_would_be_wrong(photo, size, mode, changes, reason):
    data = codestream(photo.resize(size).convert(mode), **changes)
    if reason is None:
        misread.check(data)
        return
    with pytest.raises(ItemError, match=f"is a JPEG 2000 file .*{reason}.*, which is not supported; convert it"):
        images.decode(data)


@NEEDS_JPEG2000
@pytest.mark.parametrize(("tile", "at", "is_read"), [(16, 0, True), (15, 0, False), (16, 1, False)])
def test_tiles_of_jpeg_2000_that_part_a_smaller_plane(photo, tile, at, is_read):
    data = bytearray(encoded(photo.resize((32, 32)), "JPEG2000", no_jp2=True))
    data[45:51:3] = data[46:51:3] = b"\2\2"
    data[24:40] = struct.pack(">4I", tile, tile, at, at)
    if is_read:
        misread.check(bytes(data))
    else:
        with pytest.raises(ItemError, match="have fewer pixels than others"):
            misread.check(bytes(data))


@NEEDS_JPEG2000
def test_planes_of_jpeg_2000_that_are_all_as_small_are_left_to_pillow(photo):
    data = bytearray(encoded(photo.resize((33, 31)), "JPEG2000", no_jp2=True))
    for at in (43, 46, 49):
        data[at : at + 2] = b"\2\2"
    misread.check(bytes(data))


@NEEDS_JPEG2000
def test_greys_of_9_bits_are_right_but_for_those_within_boxes(photo):
    for no_jp2 in (True, False):
        data = bytearray(encoded(photo.resize((32, 32)).convert("L"), "JPEG2000", no_jp2=no_jp2))
        data[data.index(b"\xff\x4f\xff\x51") + 42] = 8
        if no_jp2:
            misread.check(bytes(data))
        else:
            with pytest.raises(ItemError, match="whose colours have 9 bits"):
                misread.check(bytes(data))


@NEEDS_JPEG2000
@pytest.mark.parametrize("count", [5, 257])
def test_jpeg_2000_of_many_channels_is_not_called_damaged(photo, count):
    data = encoded(photo.resize((32, 32)), "JPEG2000", no_jp2=True)
    head = struct.pack(">H", 38 + 3 * count) + data[6:40] + struct.pack(">H", count) + data[42:45] * count
    with pytest.raises(ItemError, match=f"is a JPEG 2000 file of {count} channels, which is not supported"):
        images.decode(data[:4] + head + data[51:])


@NEEDS_JPEG2000
@pytest.mark.parametrize(
    ("way", "space", "reason"),
    [
        (1, 14, r"in CIE L\*a\*b\*"), (1, 24, "in e-sYCC"), (1, 99, "in the colour space 99"), (1, 18, None),
        (1, 17, None), (1, 16, None), (1, 12, None), (2, 14, None),
    ],
)  # fmt: skip
def test_jpeg_2000_in_a_colour_space_that_pillow_takes_for_rgb(photo, way, space, reason):
    data = bytearray(encoded(photo.resize((32, 32)), "JPEG2000"))
    at = data.index(b"colr") + 4
    data[at], data[at + 3 : at + 7] = way, struct.pack(">I", space)
    if reason is None:
        misread.check(bytes(data))
        return
    with pytest.raises(ItemError, match=f"is a JPEG 2000 file {reason}, which is not supported"):
        images.decode(bytes(data))


@NEEDS_JPEG2000
@pytest.mark.parametrize("no_jp2", [False, True])
def test_jpeg_2000_that_is_cut_within_its_head_is_damaged(photo, no_jp2):
    data = encoded(photo.resize((32, 32)), "JPEG2000", no_jp2=no_jp2)
    for length in range(12, data.index(b"\xff\x4f\xff\x51") + 51, 7):
        with pytest.raises(ItemError, match="damaged"):
            images.decode(data[:length])


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


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_that_is_to_be_cut_is_refused(photo):
    """Pillow shows all of it; what only has these letters in its pixels is read."""
    data = encoded(photo.resize((64, 64)), "AVIF")
    assert images.decode(data + b"clap").size == (64, 64)
    box = struct.pack(">I4s8I", 40, b"clap", 20, 1, 10, 1, 0, 1, 0, 1)
    at = data.index(b"ipco")
    length = int.from_bytes(data[at - 4 : at], "big")
    with_box = bytearray(data[: at - 4 + length] + box + data[at - 4 + length :])
    with_box[at - 4 : at] = struct.pack(">I", length + len(box))
    with pytest.raises(ItemError, match="is an AVIF file of whose pixels some are to be cut off"):
        images.decode(bytes(with_box))


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
