"""TIFF files of every layout: the right image, or a reason that says "not supported"; damaged where they are so."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from qvsplit.errors import ItemError
from qvsplit.sources import images, tiff
from qvsplit.sources.decoder import Decoder
from qvsplit.sources.source import Entry
from tests.support import tiffs

CONTENTS = tiffs.contents()
OTHERS = {name: rest for name, *rest in tiffs.others()}

# ------------------------------------------------------------------------------------------------ what must be right

WAYS = {way for way, _ in tiffs.layouts(CONTENTS["grey 8"])}
SUBSAMPLED = {way for way, _ in tiffs.layouts(CONTENTS["ycbcr 2x2"])}
EVERY = WAYS - {"big MM"}  # which Pillow takes for a classic TIFF
REVERSED = {way for way in WAYS if way.startswith("bits reversed")}
BIG_ENDIAN = {way for way in WAYS if way.endswith("MM")}
PLANES = {way for way in WAYS if way.startswith("planes")}
STRAIGHT = EVERY - REVERSED
LITTLE_ENDIAN = STRAIGHT - BIG_ENDIAN
COMPRESSED_PLANES = {"planes deflate", "planes lzw tiles MM"}
RIGHT = {
    **{f"{grey} {bits}": EVERY for grey in ("grey", "white-is-zero") for bits in (1, 2, 4, 8)},
    "grey 12": LITTLE_ENDIAN,
    "grey 16": EVERY - {"bits reversed MM"},
    "white-is-zero 16": LITTLE_ENDIAN,
    "grey 32": LITTLE_ENDIAN,
    "grey int8, none negative": STRAIGHT,
    **{f"grey int{bits}": STRAIGHT for bits in (16, 32)},
    **{f"{grey} float32{scale}": STRAIGHT for grey in ("grey", "white-is-zero") for scale in ("", " beyond one")},
    "grey 8 + unspecified": STRAIGHT - PLANES | COMPRESSED_PLANES,
    "grey 8 + two unspecified": COMPRESSED_PLANES,
    "grey 8 + alpha": STRAIGHT - PLANES,
    "grey 8 + premultiplied": STRAIGHT - PLANES,
    "grey 16 + unspecified": PLANES,
    "grey 16 + two unspecified": PLANES,
    "rgb 8": EVERY,
    "rgb 16": STRAIGHT,
    "rgb 8, fourth sample unnamed": STRAIGHT - PLANES,
    "rgb 8 + unspecified": STRAIGHT - PLANES | COMPRESSED_PLANES,
    "rgb 8 + two unspecified": STRAIGHT - PLANES | COMPRESSED_PLANES,
    "rgb 8 + alpha": STRAIGHT,
    "rgb 8 + premultiplied": STRAIGHT,
    "rgb 8 + alpha, unspecified": STRAIGHT - PLANES,
    "rgb 16 + unspecified": STRAIGHT,
    "rgb 16 + two unspecified": PLANES,
    "rgb 16 + alpha": STRAIGHT,
    "rgb 16 + premultiplied": STRAIGHT,
    "cmyk 8": STRAIGHT,
    "cmyk 8 by name": STRAIGHT,
    "cmyk 16": STRAIGHT,
    "cmyk 8 + unspecified": STRAIGHT - PLANES | COMPRESSED_PLANES,
    **{f"palette {bits}{table}": EVERY for bits in (1, 2, 4, 8) for table in ("", ", 8-bit table")},
    "palette 8 + alpha": STRAIGHT - PLANES,
    "palette 8 + unspecified": STRAIGHT - PLANES,
    **{f"ycbcr {name}": STRAIGHT for name in ("1x1", "studio range", "BT.709")},
    **{f"ycbcr {name}": STRAIGHT & SUBSAMPLED for name in ("2x1", "2x2", "4x2", "4x4")},
    "cielab 8": STRAIGHT - PLANES,
}
REFUSED_OTHERS = {
    "old jpeg rgb", "old jpeg rgb MM", "old jpeg cmyk", "old jpeg cmyk MM", "webp", "lerc", "jpeg 2000", "jpeg xl",
    "unknown compression", "bits of 5, 6 and 5", "grey and another, no extra samples", "a mask first",
    "old jpeg without tables", "jpeg of 16 bits", "12 bits and a predictor", "a smaller copy of an inner page", "a smaller copy of one that is not read",
    *(f"rle in words, photometric {photometric}, fill order {fill}" for photometric in (0, 1) for fill in (1, 2)),
}  # fmt: skip


def is_right(data: bytes, shown: np.ndarray, levels: int) -> bool:
    """Whether a file is read; then it must be what it shows. Else the reason must be that it is not supported."""
    try:
        decoded = np.asarray(images.decode(data))
    except ItemError as error:
        assert "not supported" in str(error)
        assert error.kind == ("content" if "RAW file of a camera" in str(error) else "reader-missing")
        assert len(str(error)) < 200
        return False
    assert decoded.shape == shown.shape
    assert np.abs(decoded.astype(int) - shown).max() <= levels
    return True


@pytest.mark.parametrize("name", CONTENTS)
def test_every_layout_is_right_or_not_supported(name):
    content = CONTENTS[name]
    right = {way for way, data in tiffs.layouts(content) if is_right(data, content.shown, content.levels)}
    assert right >= RIGHT.get(name, set())


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_right_or_not_supported(name):
    assert is_right(*OTHERS[name]) or name in REFUSED_OTHERS


def test_what_is_not_supported_is_said_in_words():
    def reason(name: str, way: str) -> str:
        with pytest.raises(ItemError) as raised:
            images.decode(dict(tiffs.layouts(CONTENTS[name]))[way])
        assert str(raised.value).startswith("is a TIFF file of a layout that is not supported: ")
        assert str(raised.value).endswith("; convert it, for example to PNG")
        return str(raised.value).split(": ", 1)[1].rsplit("; ", 1)[0]

    assert reason("grey 14", "strips") == "grey, 1 sample of 14 bits"
    assert reason("rgb float16", "strips") == "RGB, 3 samples of 16 bits, floating point"
    assert reason("grey complex64", "strips") == "grey, 1 sample of 64 bits, complex"
    assert reason("grey 16 + alpha", "deflate MM") == (
        "grey, 2 samples of 16 bits, predictor 2, extra samples: alpha, big-endian"
    )
    assert reason("grey 8 + alpha", "planes") == "grey, 2 samples of 8 bits, extra samples: alpha, separate planes"
    assert reason("grey int8", "strips") == "grey, 1 sample of 8 bits, signed"
    assert reason("logl 16", "strips") == "LogL, 1 sample of 16 bits, signed"
    assert reason("other inks 8", "strips") == "inks other than CMYK, 4 samples of 8 bits"
    assert reason("rgb 8", "big MM") == "RGB, 3 samples of 8 bits, big-endian BigTIFF"
    assert reason("cmyk 8", "bits reversed") == "CMYK, 4 samples of 8 bits, bits of a byte reversed"


def test_what_is_not_supported_has_no_size():
    for name in ("grey 14", "rgb float32", "other inks 8"):
        for _, data in tiffs.layouts(CONTENTS[name]):
            with pytest.raises(ItemError, match="not supported"):
                images.measure(data)


# -------------------------------------------------------------------------------------------------------------- pages


def test_pages_are_counted_but_for_smaller_copies_and_masks():
    pages = {name: images.frames(OTHERS[name][0]) for name in OTHERS}
    assert pages["several pages"] == 3
    for name in ("a smaller copy first", "a smaller copy first, then a mask", "a mask last", "a smaller copy alone"):
        assert pages[name] == 1


def test_the_size_is_that_of_the_page_that_is_read():
    assert images.measure(OTHERS["a smaller copy first, then a mask"][0]) == (tiffs.WIDTH, tiffs.HEIGHT)
    seen = []
    images.decode(OTHERS["a smaller copy first"][0], on_size=lambda width, height: seen.append((width, height)))
    assert seen == [(tiffs.WIDTH, tiffs.HEIGHT)]


# ------------------------------------------------------------------------------------------------------------- damage


def last_part_cut_off(page: tiffs.Page, **file) -> bytes:
    """A file most of whose last strip or tile lies beyond its end, as where the end is missing."""
    whole = tiffs.write(page, **file)
    with Image.open(io.BytesIO(whole)) as image:
        tag, count = (324, 325) if page.tile else (273, 279)
        offsets, counts = list(image.tag_v2[tag]), image.tag_v2[count]
    offsets[-1] = len(whole) - counts[-1] // 16  # of a tile, less than its rows within the image
    torn = tiffs.write(tiffs.Page(**vars(page) | {"tags": page.tags | {tag: (4, offsets)}}), **file)
    assert len(torn) == len(whole)
    return torn


@pytest.mark.parametrize("name", ["grey 8", "rgb 8", "white-is-zero 16", "grey float32", "ycbcr 2x2", "palette 4"])
@pytest.mark.parametrize("more", [{}, {"tile": 16}, {"compression": tiffs.LZW}, {"planes": True}], ids=str)
def test_what_is_cut_off_is_damaged(name, more):
    content = CONTENTS[name]
    if "subsampling" in content.page and "planes" in more:
        more = {"compression": tiffs.DEFLATE}
    page = tiffs.Page(content.samples, **{"rows": 8} | content.page | more)
    assert is_right(tiffs.write(page), content.shown, content.levels)
    with pytest.raises(ItemError, match="cut off or damaged|damaged") as raised:
        images.decode(last_part_cut_off(page))
    assert raised.value.kind == "content"


def test_a_directory_that_is_cut_off_is_damaged():
    content = CONTENTS["grey 14"]
    whole = tiffs.write(tiffs.Page(content.samples, **content.page))
    (start,) = struct.unpack_from("<I", whole, 4)
    for end in (6, 8, start, start + 1, start + 20):
        with pytest.raises(ItemError, match="cut off or damaged"):
            images.decode(whole[:end])


def test_a_page_without_pixels_is_damaged():
    content = CONTENTS["grey 14"]
    for missing in (256, 257, 273):
        page = tiffs.Page(content.samples, **content.page, tags={missing: None})
        with pytest.raises(ItemError, match="cut off or damaged"):
            images.decode(tiffs.write(page))


def test_a_usual_layout_that_is_not_opened_is_damaged():
    content = CONTENTS["rgb 8"]
    page = tiffs.Page(content.samples, **content.page, planes=True, tags={278: (3, [tiffs.HEIGHT])})  # of 5 rows each
    with pytest.raises(ItemError, match="cut off or damaged"):
        images.decode(tiffs.write(page))


def test_tags_that_point_beyond_the_end_are_passed_over():
    content = CONTENTS["grey 8"]
    whole = tiffs.write(tiffs.Page(content.samples, **content.page))
    layout = tiff.read_layout(whole)
    assert layout is not None
    assert (layout.width, layout.height, layout.bits) == (tiffs.WIDTH, tiffs.HEIGHT, (8,))
    assert tiff.read_layout(whole, at=len(whole) - 1) is None
    assert tiff.read_layout(whole, at=2**70) is None
    entry = struct.pack("<HHI", 339, 3, 1)
    far = struct.pack("<HHII", 339, 3, 2**32 - 1, 2**32 - 1)
    plain = tiffs.write(tiffs.Page(content.samples, **content.page, tags={339: (3, [1])}))
    at = plain.index(entry)
    torn = tiff.read_layout(plain[:at] + far + plain[at + len(far) :])
    assert torn is not None
    assert torn.formats == (1,)


# ------------------------------------------------------------------------------------------------- through a process


def test_decoder_processes_say_the_same(tmp_path):
    decoder = Decoder(item_timeout=20)
    try:
        for name, way in (
            ("rgb 16", "planes"),
            ("ycbcr 2x2", "tiles"),
            ("grey float16", "strips"),
            ("rgb 8", "big MM"),
        ):
            data = dict(tiffs.layouts(CONTENTS[name]))[way]
            path = tmp_path / "one.tif"
            path.write_bytes(data)
            status = path.stat()
            entry = Entry(str(tmp_path), path.name, status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)
            info = decoder.read(entry)
            if way in RIGHT.get(name, set()):
                decoded = decoder.decode(entry, info)
                assert np.array_equal(decoded.pixels, np.asarray(images.decode(data)))
                assert decoded.format == "TIFF"
            else:
                with pytest.raises(ItemError, match="not supported") as raised:
                    decoder.decode(entry, info)
                assert raised.value.kind == "reader-missing"
    finally:
        decoder.close()


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB"])
def test_a_page_that_does_not_say_what_0_is_is_not_supported(mode):
    stream = io.BytesIO()
    Image.new(mode, (4, 4)).save(stream, "TIFF")
    data = stream.getvalue()
    tag = struct.pack("<HHI", 262, 3, 1)
    assert data.count(tag) == 1
    with pytest.raises(ItemError, match="a layout that is not supported: of no stated colours"):
        images.decode(data.replace(tag, struct.pack("<HHI", 261, 3, 1)))


def test_in_a_fax_0_is_white_where_it_does_not_say():
    stream = io.BytesIO()
    Image.new("1", (16, 16), 1).save(stream, "TIFF", compression="group4")
    data = stream.getvalue()
    entry = data.index(struct.pack("<HHI", 262, 3, 1))
    assert images.decode(data[:entry] + struct.pack("<HHIHH", 262, 3, 1, 0, 0) + data[entry + 12 :]).getextrema()[
        0
    ] == (0, 0)
    assert images.decode(data[:entry] + struct.pack("<H", 261) + data[entry + 2 :]).getextrema()[0] == (0, 0)
