"""Files to upright RGB: every mode, every orientation, every way a file can be bad."""

from __future__ import annotations

import importlib.util
import io
import pickle
import struct
import zlib
from importlib.machinery import PathFinder

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin
from qwen_vl_utils.vision_process import to_rgb

from qvsplit.errors import ERROR_KINDS, ItemError
from qvsplit.sources import faults, images, pixels
from tests.support.nasty_images import encoded
from tests.support.photographs import same_rgb

# ---------------------------------------------------------------------------------------------------------- modes


def test_rgb_and_grey_are_kept(photo):
    assert same_rgb(images.decode(encoded(photo)), photo)
    assert same_rgb(images.decode(encoded(photo.convert("L"))), photo.convert("L").convert("RGB"))


def test_one_bit_palette_and_cmyk(photo):
    assert same_rgb(images.decode(encoded(photo.convert("1"))), photo.convert("1").convert("RGB"))
    palette = photo.quantize(32)
    assert same_rgb(images.decode(encoded(palette)), palette.convert("RGB"))
    cmyk = images.decode(encoded(photo.convert("CMYK"), "TIFF"))
    assert same_rgb(cmyk, photo.convert("CMYK").convert("RGB"))


def test_alpha_is_over_white_as_qwen_vl_utils_does(photo):
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert same_rgb(images.decode(encoded(rgba)), to_rgb(rgba))
    corner = images.decode(encoded(rgba)).getpixel((5, 0))
    assert corner == (255, 255, 255)  # fully transparent


def test_grey_with_alpha_and_palette_with_transparency_are_over_white_too(photo):
    la = photo.convert("LA")
    la.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert same_rgb(images.decode(encoded(la)), to_rgb(la.convert("RGBA")))
    palette = photo.quantize(8)
    index = palette.getpixel((10, 10))
    decoded = images.decode(encoded(palette, transparency=index))
    assert decoded.getpixel((10, 10)) == (255, 255, 255)
    assert decoded.size == photo.size


def test_sixteen_bits_are_not_clipped_to_white(photo):
    grey = np.asarray(photo.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        decoded = images.decode(encoded(deep, kind))
        assert np.array_equal(np.asarray(decoded)[..., 0], grey)
    assert np.asarray(decoded).mean() < 200


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_thirty_two_bit_greys_are_stretched(photo, dtype):
    ramp = np.linspace(-1000, 70000, 256 * 32).reshape(32, 256).astype(dtype)
    decoded = np.asarray(images.decode(encoded(Image.fromarray(ramp), "TIFF")))[..., 0]
    assert decoded.min() == 0
    assert decoded.max() == 255
    assert (np.diff(decoded.reshape(-1).astype(int)) >= 0).all()


def test_floats_from_zero_to_one_are_read_so():
    half = np.full((8, 8), 0.5, np.float32)
    half[0, 0] = np.nan
    decoded = np.asarray(images.decode(encoded(Image.fromarray(half), "TIFF")))
    assert decoded[4, 4].tolist() == [128, 128, 128]


def test_lab_becomes_rgb():
    lab = Image.new("LAB", (4, 4), (255, 128, 128))
    assert images.decode(encoded(lab, "TIFF")).getpixel((1, 1)) == pytest.approx((255, 255, 255), abs=6)


def test_an_animation_is_its_first_frame(photo):
    second = ImageOps.invert(photo)
    animated = encoded(photo, "WEBP", save_all=True, append_images=[second], duration=100, lossless=True)
    assert same_rgb(images.decode(animated), photo)
    gif = images.decode(encoded(photo, "GIF", save_all=True, append_images=[second], duration=100))
    assert np.abs(np.asarray(gif).astype(int) - np.asarray(photo)).mean() < 20


def several(kind: str, number: int, **more) -> bytes:
    """A file of so many frames, or pages, each of another colour."""
    stack = [Image.new("RGB", (16, 16), (60 * one, 0, 0)) for one in range(number)]
    stream = io.BytesIO()
    stack[0].save(stream, kind, save_all=True, append_images=stack[1:], **more)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_frames_and_pages_are_counted(kind):
    assert images.frames(several(kind, 1)) == 1
    assert images.frames(several(kind, 3)) == 3


def test_smaller_copies_in_a_tiff_are_no_pages():
    stream = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(stream, new=True) as writer:
        for side, kind in ((64, 0), (32, 1), (16, 1), (64, 0)):
            Image.new("RGB", (side, side)).save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    with Image.open(io.BytesIO(stream.getvalue())) as image:
        assert image.n_frames == 4
    assert images.frames(stream.getvalue()) == 2


def test_what_cameras_put_beside_a_picture_is_no_page(photo):
    assert images.frames(several("MPO", 2)) == 1
    assert images.frames(encoded(photo, "JPEG")) == 1


def test_where_frames_cannot_be_counted_that_is_not_known():
    whole = several("TIFF", 2)
    with Image.open(io.BytesIO(whole)) as image:
        image.seek(1)
        second = image._frame_pos[1]
    torn = whole[:second] + b"\xff" * (len(whole) - second)
    assert images.frames(torn) != 1


def test_colour_profiles_are_left_alone(photo):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert same_rgb(images.decode(encoded(photo, icc_profile=profile)), photo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert same_rgb(images.decode(data), expected)
    assert (expected.size == photo.size) == (orientation <= 4)


@pytest.mark.parametrize("tag", [0x0101, 0x0128, 0x0111])
def test_an_odd_tag_beside_the_orientation_does_not_turn_it_off(photo, tag):
    """Text where a number belongs: Pillow's exif_transpose raises on writing such a block anew."""
    entries = sorted(
        [(0x0112, struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)), (tag, struct.pack("<HHI4s", tag, 2, 4, b"odd"))]
    )
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(e for _, e in entries) + b"\0\0\0\0"
    data = encoded(photo, "JPEG", exif=block)
    with pytest.raises((ValueError, TypeError, struct.error)):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert images.decode(data).size == (photo.height, photo.width)


def test_sixteen_bit_grey_with_a_transparent_value_is_white_there(photo):
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    deep[:5, :5] = 1234
    data = encoded(Image.fromarray(deep), transparency=1234)
    decoded = images.decode(data)
    assert decoded.getpixel((2, 2)) == (255, 255, 255)
    assert decoded.getpixel((50, 50)) == photo.convert("L").convert("RGB").getpixel((50, 50))


def test_exif_that_lies_is_no_reason_to_lose_the_image(photo):
    data = encoded(photo, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert images.decode(data).size == photo.size
    exif = Image.Exif()
    exif[0x0112] = 99
    assert same_rgb(images.decode(encoded(photo, exif=exif)), photo)


# ------------------------------------------------------------------------------------------------------ bad files


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_file_that_does_not_exist_any_more_is_an_error(tmp_path):
    with pytest.raises(ItemError, match="no longer there"):
        images.open_file(tmp_path / "deleted.png")


HEIC, AVIF = b"\0\0\0\x18ftypheic" + b"\0" * 40, b"\0\0\0\x18ftypavif" + b"\0" * 40
WEBP = b"RIFF\x20\0\0\0WEBPVP8 " + b"\0" * 20


@pytest.mark.parametrize(
    ("data", "reason", "kind"),
    [
        (b"", "is empty", "content"),
        (b"just some text", "not an image", "content"),
        (png_claiming(60000, 60000), "bomb would; `max_image_pixels` allows more", "memory"),
        (png_claiming(2**31 - 1, 2**31 - 1), "bomb would; `max_image_pixels` allows more", "memory"),
        (png_claiming(10, 10), "is a PNG file that is cut off or damaged", "content"),
        (HEIC, "needs pillow-heif", "reader-missing"),
        (b"\xff\xd8\xff\xe0", "is a JPEG file that is cut off or damaged", "content"),
        (AVIF, "is an AVIF file that is cut off or damaged", "content"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image", "content"),
    ],
)
def test_a_bad_file_has_a_reason_and_its_kind(data, reason, kind):
    with pytest.raises(ItemError, match=reason) as caught:
        images.decode(data)
    assert caught.value.kind == kind
    assert kind in ERROR_KINDS


@pytest.mark.parametrize(
    ("raised", "reason", "kind"),
    [
        (MemoryError(), "does not fit into memory", "memory"),
        (OSError("decoder jpeg2k not available"), "no decoder; install .* --upgrade pillow", "reader-missing"),
        (OSError("image file is truncated (3 bytes not processed)"), "cut off or damaged", "content"),
        (ValueError("Text chunk too large, MAX_TEXT_CHUNK"), "hides more text", "content"),
        (OSError("unknown pixel mode"), "of a variant that cannot be read; a newer reader may: pip", "reader-missing"),
        (SyntaxError("nobody knows"), "is a PNG file that is damaged", "content"),
    ],
)
def test_what_pillow_raises_has_a_reason_and_its_kind(monkeypatch, raised, reason, kind):
    def broken(*args, **kwargs):
        raise raised

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ItemError, match=reason) as caught:
        images.decode(png_claiming(10, 10))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic\0\0\0\0mif1", "HEIF"), (b"hevx\0\0\0\0", "HEIF"), (b"mif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"mif1\0\0\0\0mif1heicmiaf", "HEIF"), (b"MSNV\0\0\0\0msf1hevc", "HEIF"), (b"isom\0\0\0\0mp42", None),
    ],
)  # fmt: skip
def test_an_image_of_apples_or_aoms_is_told_by_any_of_its_brands(brands, kind):
    data = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + b"avif"  # behind the brands is no brand
    assert faults.kind_of(data) == kind


def test_readers_are_others_once_one_is_installed_upgraded_or_built_with_more(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    pillow = images.optional_readers(videos=False)
    assert len(pillow) == 1 + (importlib.util.find_spec("pillow_heif") is not None)
    assert next(name for name in images.optional_readers() if name not in pillow).startswith("av ")
    seen = {images.optional_readers()}
    for package, name, text in (
        ("PIL", "_version.py", "13.0.0"), ("PIL", "_version.py", "13.0.1"), ("PIL", "_imaging.x.so", "with AVIF"),
        ("pillow_heif", "_version.py", "1.0"), ("pillow_heif", "../_pillow_heif.x.so", "compiled"),
        ("av", "_core.x.so", "of one FFmpeg"), ("av", "_core.x.so", "of a later FFmpeg"),
    ):  # fmt: skip
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / name).write_text(text)
        importlib.invalidate_caches()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
        assert images.optional_readers() == images.optional_readers()
        seen.add(images.optional_readers())
    assert len(seen) == 8


def test_a_reader_whose_folder_may_not_be_read_is_another_build(monkeypatch):
    def refuse(folder, pattern):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("pathlib.Path.glob", refuse)
    assert images.optional_readers()[0] == "PIL unknown"


def test_a_reader_that_is_there_is_not_missing(monkeypatch):
    """A broken HEIF is the file's fault where pillow-heif is installed, an AVIF the reader's where Pillow has none."""
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ItemError, match="is a HEIF file that is cut off or damaged") as caught:
        raise faults.unidentified(HEIC, ("PNG", "HEIF"))
    assert caught.value.kind == "content"
    for data in (AVIF, WEBP):
        assert faults.unidentified(data, ("PNG", "HEIF")).kind == "reader-missing"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error_at_any_length(photo, kind):
    data = encoded(photo.resize((60, 40)), kind)
    for length in range(0, len(data) - 40, 37):
        with pytest.raises(ItemError):
            images.decode(data[:length])


def test_a_wrong_suffix_does_not_matter(photo, tmp_path):
    (tmp_path / "really_a_jpeg.png").write_bytes(encoded(photo, "JPEG"))
    assert images.open_file(tmp_path / "really_a_jpeg.png").size == photo.size


# ------------------------------------------------------------------------------------------------------- metadata


def with_times(photo: Image.Image, kind: str, inner: dict, outer: dict) -> bytes:
    exif = Image.Exif()
    for tag, value in outer.items():
        exif[tag] = value
    if inner:
        exif[0x8769] = inner
    return encoded(photo, kind, exif=exif.tobytes())


ORIGINAL, OFFSET_ORIGINAL, OFFSET, MODIFIED = 0x9003, 0x9011, 0x9010, 0x0132


@pytest.mark.parametrize(
    ("inner", "outer", "taken_at"),
    [
        ({}, {}, None),
        ({ORIGINAL: "2024:01:31 12:30:59"}, {}, "2024-01-31T12:30:59"),
        ({ORIGINAL: "2024:01:31 12:30:59", OFFSET_ORIGINAL: "+02:00"}, {}, "2024-01-31T12:30:59+02:00"),
        ({ORIGINAL: "2024:01:31 12:30:59", OFFSET_ORIGINAL: "-09:30"}, {}, "2024-01-31T12:30:59-09:30"),
        ({ORIGINAL: "2024:01:31 12:30:59", OFFSET_ORIGINAL: "noon"}, {}, "2024-01-31T12:30:59"),
        ({ORIGINAL: "2024:01:31 12:30:59"}, {MODIFIED: "2025:02:01 00:00:00"}, "2024-01-31T12:30:59"),
        ({}, {MODIFIED: "2025:02:01 00:00:00"}, "2025-02-01T00:00:00"),
        ({OFFSET_ORIGINAL: "+02:00"}, {MODIFIED: "2025:02:01 00:00:00"}, "2025-02-01T00:00:00"),
        ({OFFSET: "+01:00"}, {MODIFIED: "2025:02:01 00:00:00"}, "2025-02-01T00:00:00+01:00"),
        ({ORIGINAL: "0000:00:00 00:00:00"}, {MODIFIED: "2025:02:01 00:00:00"}, "2025-02-01T00:00:00"),
        ({ORIGINAL: "0000:00:00 00:00:00"}, {}, None),
        ({ORIGINAL: "2024:02:30 12:30:59"}, {}, None),
        ({ORIGINAL: "    :  :     :  :  "}, {}, None),
        ({ORIGINAL: "yesterday"}, {}, None),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_when_an_image_was_taken(photo, kind, inner, outer, taken_at):
    _, metadata = images.decode_with_metadata(with_times(photo.resize((20, 10)), kind, inner, outer))
    assert metadata == images.ImageMetadata(kind, taken_at)


def test_a_time_of_another_type_is_none(photo):
    """A number where the time's text belongs, in a block written by hand."""
    entry = struct.pack("<HHIHH", MODIFIED, 3, 1, 6, 0)
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + b"\0\0\0\0"
    assert images.decode_with_metadata(encoded(photo, "JPEG", exif=block))[1].taken_at is None


def test_a_broken_block_never_fails_the_image_and_says_nothing(photo):
    """Whether it is the block itself, or the inner one that it leads to; and what is sound in it is obeyed still."""
    broken = encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    image, metadata = images.decode_with_metadata(broken)
    assert (image.size, metadata.taken_at) == (photo.size, None)
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFF0)
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    image, metadata = images.decode_with_metadata(encoded(photo, "JPEG", exif=block))
    assert (image.size, metadata.taken_at) == ((photo.height, photo.width), None)


def test_what_pillow_raises_on_reading_the_time_never_fails_the_image(photo, monkeypatch):
    def broken(*args):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(Image.Exif, "get_ifd", broken)
    assert images.decode_with_metadata(encoded(photo))[1] == images.ImageMetadata("PNG", None)


def test_reading_the_time_does_not_change_the_orientation(photo, monkeypatch):
    """Pillow gives half of a block on the second try, where it failed on the first: the orientation comes first."""
    asked = []
    real = pixels._orientation
    monkeypatch.setattr(pixels, "_orientation", lambda image: asked.append("orientation") or real(image))
    monkeypatch.setattr(images, "_taken_at", lambda image: asked.append("time"))
    images.decode(encoded(photo, "JPEG"))
    assert asked == ["orientation", "time"]


def test_the_size_is_heard_before_memory_is_taken(photo):
    def refuse(width, height):
        raise InterruptedError(f"{width}x{height}")

    data = encoded(photo.resize((30, 20)))
    with pytest.raises(ItemError):  # whatever is raised inside becomes an error of the image
        images.decode(data, on_size=refuse)
    heard = []
    images.decode(data, on_size=lambda *size: heard.append(size))
    assert heard == [(30, 20)] == [images.measure(data)]


def test_a_thumbnail_of_a_jpeg_is_decoded_at_a_part_of_its_size(photo):
    data = encoded(photo, "JPEG")
    assert images.decode(data, about=100).size == (photo.width // 4, photo.height // 4)
    assert images.decode(data, about=10_000).size == photo.size


def test_the_policy_says_what_is_done():
    """A change of behaviour is a change of the policy, which is part of every extraction config."""
    assert images.IMAGE_POLICY == {
        "orientation": "exif",
        "transparency": "over white; named colours at full depth",
        "colour_profile": "ignored",
        "animation": "first frame",
        "deep_colour": "high eight bits; 32-bit greys stretched",
    }


def test_a_decoded_image_is_picklable(photo):
    pixels = np.array(photo)
    image = pickle.loads(pickle.dumps(images.DecodedImage(pixels, photo.width, photo.height, None, "PNG")))
    assert np.array_equal(image.pixels, pixels)
    assert (image.width, image.height, image.taken_at, image.format) == (photo.width, photo.height, None, "PNG")


# ------------------------------------------------------------------------------------------------- sizes, and extras


def test_the_limit_of_pixels_is_of_a_call_and_pillows_own_stays(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(photo)
    assert same_rgb(images.decode(data), photo)
    assert Image.MAX_IMAGE_PIXELS == 100
    pixels_of_it = photo.width * photo.height
    assert images.measure(data, pixels_of_it) == photo.size
    for read in (images.measure, images.decode):
        with pytest.raises(ItemError, match="over the limit of 239,999.*`max_image_pixels` allows more") as caught:
            read(data, max_pixels=pixels_of_it - 1)
        assert caught.value.kind == "memory"


def test_the_limit_holds_cameras_and_scans():
    """A telephone's 200 megapixels, a shifted sensor's 400, A4 at 2,400 dpi, a print of 10 × 15 cm at 4,800 dpi."""
    for width, height in ((16320, 12240), (23296, 17472), (19843, 28063), (18898, 28346)):
        assert width * height < images.MAX_IMAGE_PIXELS
        assert images.measure(png_claiming(width, height)) == (width, height)


LARGE = np.random.default_rng(0).bytes(1_700_000)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("JPEG", {"icc_profile": LARGE, "comment": b"x" * 65_000}), ("WEBP", {"icc_profile": LARGE, "xmp": LARGE}),
        ("TIFF", {"icc_profile": LARGE}), ("AVIF", {"icc_profile": LARGE}), ("GIF", {"comment": LARGE}),
    ],
)  # fmt: skip
def test_what_is_large_beside_the_pixels_costs_no_image(photo, kind, more):
    small = photo.resize((64, 48))
    assert len(encoded(small, kind, **more)) > 1_400_000
    assert same_rgb(images.decode(encoded(small, kind, **more)), images.decode(encoded(small, kind)))


@pytest.mark.parametrize("alpha", [0, 128])
@pytest.mark.parametrize("kind", ["TGA", "BMP"])
def test_an_alpha_that_nobody_set_hides_no_image(kind, alpha):
    """A fourth byte that is 0 throughout; any other alpha is what it says."""
    image = Image.new("RGBA", (5, 3), (30, 20, 10, alpha))
    data = encoded(image, kind)
    if kind == "BMP":  # Pillow writes no alpha mask: a header of the fifth version with one
        pixels = bytes((10, 20, 30, alpha)) * 15
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        head = struct.pack("<IiiHHIIiiII", 124, 5, 3, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
        head += bytes(124 - len(head))
        data = b"BM" + struct.pack("<IHHI", 14 + 124 + len(pixels), 0, 0, 14 + 124) + head + pixels
    shown = {0: (30, 20, 10), 128: (142, 137, 132)}[alpha]
    assert images.decode(data).getpixel((2, 1)) == pytest.approx(shown, abs=1)
