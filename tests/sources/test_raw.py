"""Camera RAW files, written by hand, are told by their content; what merely looks like one is a picture."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image, TiffImagePlugin

from qvsplit.errors import ItemError
from qvsplit.sources import images, raw, videos
from tests.support.nasty_images import encoded

SHORT, LONG, TEXT = 3, 4, 2
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, MAKE, STRIPS, SAMPLES, ROWS, BYTES, INNER, DNG = (
    256, 257, 258, 259, 262, 271, 273, 277, 278, 279, 330, 50706
)  # fmt: skip


def tiff(*inner: dict, order: str = "<", **first) -> bytes:
    """A TIFF of a sound 16 × 12 thumbnail in its first directory, with other directories within."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    make = first.pop("make", "").encode() + b"\0"
    entries = {
        WIDTH: (SHORT, 16), HEIGHT: (SHORT, 12), BITS: (SHORT, 8), COMPRESSION: (SHORT, 1), PHOTOMETRIC: (SHORT, 1),
        SAMPLES: (SHORT, 1), ROWS: (SHORT, 12), BYTES: (LONG, 192), MAKE: (TEXT, 0), STRIPS: (LONG, 0),
    }  # fmt: skip
    entries |= {int(tag): value for tag, value in first.pop("tags", {}).items()}
    if inner:
        entries[INNER] = (LONG, 0)
    at = 8 + 2 + 12 * len(entries) + 4
    makes_at, pixels_at = at, at + 64
    places, blocks, at = [], [], pixels_at + 192
    for tags in inner:
        block = struct.pack(order + "H", len(tags))
        for tag, (kind, value) in sorted(tags.items()):
            block += struct.pack(order + "HHI", tag, kind, 1) + struct.pack(
                order + ("HH" if kind == SHORT else "I"), *((value, 0) if kind == SHORT else (value,))
            )
        places.append(at)
        blocks.append(block + bytes(4))
        at += len(blocks[-1])
    table = at
    directory = struct.pack(order + "H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        count = {MAKE: len(make), INNER: len(inner)}.get(tag, 1)
        value = {MAKE: makes_at, STRIPS: pixels_at, INNER: table if len(inner) > 1 else (places or [0])[0]}.get(
            tag, value
        )
        if tag == MAKE and count <= 4:
            directory += struct.pack(order + "HHI", tag, kind, count) + make.ljust(4, b"\0")
        elif kind == SHORT:
            directory += struct.pack(order + "HHIHH", tag, kind, count, value, 0)
        else:
            directory += struct.pack(order + "HHII", tag, kind, count, value)
    body = head + directory + bytes(4) + make.ljust(64, b"\0") + bytes(range(192)) + b"".join(blocks)
    return body + b"".join(struct.pack(order + "I", place) for place in places)


SENSOR = {WIDTH: (LONG, 6000), HEIGHT: (LONG, 4000), PHOTOMETRIC: (SHORT, 32803)}
PREVIEW = {WIDTH: (LONG, 1600), HEIGHT: (LONG, 1200), PHOTOMETRIC: (SHORT, 6)}
TIFF_BASED = {
    "Nikon NEF": tiff(PREVIEW, SENSOR, order=">", make="NIKON CORPORATION"),
    "Sony ARW": tiff({**SENSOR, COMPRESSION: (SHORT, 32767)}, make="SONY"),
    "Hasselblad 3FR": tiff(PREVIEW, PREVIEW, SENSOR, make="Hasselblad"),
    "Pentax PEF": tiff(make="PENTAX Corporation", tags={COMPRESSION: (SHORT, 65535)}),
    "Samsung SRW": tiff({**SENSOR, PHOTOMETRIC: (LONG, 32803)}, make="SAMSUNG"),
    "Kodak DCR": tiff({COMPRESSION: (SHORT, 65000)}, order=">", make="EASTMAN KODAK COMPANY"),
    "DNG": tiff(tags={DNG: (LONG, 0x0401)}, make="Google"),
    "unknown maker": tiff({PHOTOMETRIC: (SHORT, 34892)}, make="A"),
}
BY_FIRST_BYTES = {
    "Canon CR2": TIFF_BASED["Nikon NEF"][:4] + struct.pack(">I", 16) + b"CR\2\0" + bytes(40),
    "Canon CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(40), "Canon CRW": b"II\x1a\0\0\0HEAPCCDR" + bytes(40),
    "Olympus ORF": b"IIRO\x08\0\0\0" + bytes(40), "Panasonic RW2": b"IIU\0\x18\0\0\0" + bytes(40),
    "Fujifilm RAF": b"FUJIFILMCCD-RAW 0201" + bytes(40), "Sigma X3F": b"FOVb\0\0\2\0" + bytes(40),
    "Minolta MRW": b"\0MRM\0\0\0\x10" + bytes(40), "Phase One IIQ": b"II*\0\0\1\0\0IIII\1waR" + bytes(40),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "data"), (TIFF_BASED | BY_FIRST_BYTES).items())
def test_a_raw_file_is_not_taken_for_its_thumbnail(kind, data):
    for read in (images.decode, images.measure):
        with pytest.raises(ItemError) as caught:
            read(data)
        assert str(caught.value) == (
            f"is a RAW file of a camera ({kind}), which is not supported; use the JPEG that the camera made with it, or "
            "develop it to JPEG, PNG or TIFF"
        )
        assert caught.value.kind == "content"
    assert videos.kind_of(data, gifs_are_videos=True) == "image"


@pytest.mark.parametrize("kind", sorted(set(TIFF_BASED) - {"Pentax PEF"}))
def test_pillow_would_read_the_thumbnail(kind):
    with Image.open(io.BytesIO(TIFF_BASED[kind])) as image:
        assert image.size == (16, 12)
        image.load()


@pytest.mark.parametrize("make", ["NIKON CORPORATION", "Canon", "SONY", "EPSON", "PENTAX"])
def test_a_tiff_of_a_camera_or_a_scanner_is_a_picture(photo, make):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[MAKE], tags[272] = make, "a model"
    data = encoded(photo, "TIFF", tiffinfo=tags)
    assert images.decode(data).size == photo.size
    assert raw.raw_kind(tiff(PREVIEW, PREVIEW, make=make)) is None
    assert images.decode(tiff(make=make)).size == (16, 12)


@pytest.mark.parametrize("length", range(0, 200, 7))
def test_what_is_cut_off_or_goes_in_circles_is_no_raw_file(length):
    data = TIFF_BASED["DNG"]
    assert raw.raw_kind(data[:length]) in (None, "DNG")
    looping = struct.pack("<4sI", b"II*\0", 8) + struct.pack("<HHHIII", 1, INNER, LONG, 1, 8, 8)
    assert raw.raw_kind(looping) is None
    far = struct.pack("<4sI", b"II*\0", 8) + struct.pack("<HHHIII", 1, INNER, LONG, 2**32 - 1, 2**32 - 1, 0)
    assert raw.raw_kind(far) is None


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"8BPS\0\1" + bytes(40), "a Photoshop file"), (b"\xff\x0a" + bytes(40), "a JPEG XL file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL file"), (b"\x76\x2f\x31\x01" + bytes(40), "an OpenEXR file"),
    ],
)  # fmt: skip
def test_other_kinds_that_nothing_here_reads_are_named(data, named):
    with pytest.raises(ItemError, match=f"is {named}, which is not supported; convert it"):
        images.decode(data)


def test_sound_in_a_riff_file_is_no_cut_off_webp():
    with pytest.raises(ItemError, match="is not an image or a video"):
        images.decode(b"RIFF\x24\0\0\0WAVEfmt " + bytes(40))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_whose_pixels_come_first_is_no_raw_file_whatever_they_are(order):
    """The marks of some RAW files lie where the pixels of such a TIFF begin."""
    entries = {
        WIDTH: 16,
        HEIGHT: 12,
        BITS: 8,
        COMPRESSION: 1,
        PHOTOMETRIC: 1,
        STRIPS: 8,
        SAMPLES: 1,
        ROWS: 12,
        BYTES: 192,
    }
    directory = struct.pack(order + "H", len(entries)) + b"".join(
        struct.pack(order + "HHIHH", tag, SHORT, 1, value, 0) for tag, value in sorted(entries.items())
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 200)
    for pixels in (*(bytes([grey]) * 192 for grey in range(256)), b"CR".ljust(192), b"CR\2\0".ljust(192)):
        image = images.decode(head + pixels + directory + bytes(4))
        assert image.getchannel(0).tobytes() == pixels
