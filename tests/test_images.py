"""Files to upright RGB: every mode, every orientation, every way a file can be bad."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from qwen_vl_utils.vision_process import to_rgb

from qvsplit import folders, images
from qvsplit.errors import PictureError, UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    with Image.open(photos / "coffee.png") as image:
        return image.convert("RGB")


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and a.size == b.size and bool(np.array_equal(np.asarray(a), np.asarray(b)))


# ---------------------------------------------------------------------------------------------------------- modes


def test_rgb_and_grey_are_kept(photo):
    assert same(images.decode(encoded(photo)), photo)
    assert same(images.decode(encoded(photo.convert("L"))), photo.convert("L").convert("RGB"))


def test_one_bit_palette_and_cmyk(photo):
    assert same(images.decode(encoded(photo.convert("1"))), photo.convert("1").convert("RGB"))
    palette = photo.quantize(32)
    assert same(images.decode(encoded(palette)), palette.convert("RGB"))
    cmyk = images.decode(encoded(photo.convert("CMYK"), "TIFF"))
    assert same(cmyk, photo.convert("CMYK").convert("RGB"))


def test_alpha_is_over_white_as_qwen_vl_utils_does(photo):
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert same(images.decode(encoded(rgba)), to_rgb(rgba))
    corner = images.decode(encoded(rgba)).getpixel((5, 0))
    assert corner == (255, 255, 255)  # fully transparent


def test_grey_with_alpha_and_palette_with_transparency_are_over_white_too(photo):
    la = photo.convert("LA")
    la.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert same(images.decode(encoded(la)), to_rgb(la.convert("RGBA")))
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
    assert same(images.decode(animated), photo)
    gif = images.decode(encoded(photo, "GIF", save_all=True, append_images=[second], duration=100))
    assert np.abs(np.asarray(gif).astype(int) - np.asarray(photo)).mean() < 20


def test_colour_profiles_are_left_alone(photo):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert same(images.decode(encoded(photo, icc_profile=profile)), photo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert same(images.decode(data), expected)
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


def test_exif_that_lies_is_no_reason_to_lose_the_picture(photo):
    data = encoded(photo, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert images.decode(data).size == photo.size
    exif = Image.Exif()
    exif[0x0112] = 99
    assert same(images.decode(encoded(photo, exif=exif)), photo)


# ------------------------------------------------------------------------------------------------------ bad files


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "is empty"), (b"just some text", "not a picture"), (png_claiming(60000, 60000), "bomb"),
     (b"\0\0\0\x18ftypheic" + b"\0" * 40, "pillow-heif"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture")],
)  # fmt: skip
def test_a_bad_file_has_a_reason(data, reason):
    with pytest.raises(PictureError, match=reason):
        images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error_at_any_length(photo, kind):
    data = encoded(photo.resize((60, 40)), kind)
    for length in range(0, len(data) - 40, 37):
        with pytest.raises(PictureError):
            images.decode(data[:length])


def test_a_wrong_suffix_does_not_matter(photo, tmp_path):
    (tmp_path / "really_a_jpeg.png").write_bytes(encoded(photo, "JPEG"))
    assert images.open_file(tmp_path / "really_a_jpeg.png").size == photo.size


def found(folder, name, size=0):
    return folders.Found(str(folder), name, size, 0)


def test_a_fifo_a_folder_and_a_missing_file_neither_hang_nor_crash(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("pipe.png", "not a regular file"),
        ("folder.png", "not a regular file"),
        ("gone.png", "no longer there"),
    ):
        with pytest.raises(PictureError, match=reason):
            images.read(found(tmp_path, name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "secret.png").write_bytes(png_claiming(1, 1))
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(PictureError, match="Permission denied"):
        images.read(found(tmp_path, "secret.png"))


def test_a_fresh_files_stat_is_not_trusted(tmp_path):
    (tmp_path / "a.png").write_bytes(png_claiming(1, 1))
    assert images.read(found(tmp_path, "a.png")).mtime_ns is None
    os.utime(tmp_path / "a.png", (1_600_000_000, 1_600_000_000))
    assert images.read(found(tmp_path, "a.png")).mtime_ns == 1_600_000_000 * 10**9


# ----------------------------------------------------------------------------------------------------------- walk


def pictures(paths, *words, **more):
    return [one for listing in folders.walk(paths, *words, **more).listings for one in listing.found()]


def test_the_walk_is_sorted_and_leaves_out_what_is_not_ours(tmp_path):
    for name in ("b.jpg", "a.JPEG", "c.txt", ".hidden.png", "deep/z.png", "deep/.thumbs/x.png", "album/shard-000001.parquet",
                 "album/stray.png", "deep/no_suffix"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [one.path for one in pictures([tmp_path])] == ["a.JPEG", "b.jpg", "deep/z.png"]
    assert {one.root for one in pictures([tmp_path])} == {str(tmp_path)}


def test_a_file_named_by_the_user_is_tried_whatever_its_name(tmp_path):
    (tmp_path / "no_suffix").write_bytes(b"x")
    (one,) = pictures([tmp_path / "no_suffix"])
    assert (one.root, one.path) == (str(tmp_path), "no_suffix")


def test_the_same_file_twice_is_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    assert len(list(pictures([tmp_path, tmp_path / "a.png", str(tmp_path) + "/"]))) == 1


def test_a_link_to_itself_and_folders_nested_beyond_python_s_recursion(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    deep = tmp_path
    for _ in range(1200):
        deep = deep / "d"
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.png").write_bytes(b"x")
    finally:
        os.chdir(here)
    found = [one.path for one in pictures([tmp_path])]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own clean-up recurses
    assert found == ["loop.png", "d/" * 1200 + "deep.png"]


def test_folders_that_link_to_one_another_are_each_walked_once(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.png").write_bytes(b"x")
    for i in range(7):
        for j in range(7):
            (tmp_path / f"{i}" / f"to{j}").symlink_to(tmp_path / f"{j}")
    assert len(list(pictures([tmp_path]))) == 7
    assert len(list(pictures([tmp_path, tmp_path / "3"]))) == 7


def test_a_folder_that_cannot_be_read_and_an_album_are_told(tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "shard-000001.parquet").touch()
    notes = []
    assert list(pictures([tmp_path], notes.append)) == []
    assert notes == [f"{tmp_path / 'album'} is an album: it is left out"]
    assert list(pictures([tmp_path], notes.append, out=str(tmp_path / "album"))) == []
    assert len(notes) == 1


def test_loops_of_links_end_and_other_links_are_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").write_bytes(b"x")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "dangling.png").symlink_to(tmp_path / "nothing")
    assert [one.path for one in pictures([tmp_path / "photos"])] == ["a.png", "dangling.png", "linked/b.png"]


def test_no_such_path(tmp_path):
    with pytest.raises(UsageError, match="no file or folder at"):
        list(pictures([tmp_path / "nowhere"]))


@pytest.mark.parametrize(
    "name",
    [
        b"plain.png",
        b"caf\xe9.png",
        "café.png".encode(),
        b"new\nline.png",
        b"\xff\xfe.png",
        b"a//xff.png",
        "猫.png".encode(),
    ],
)
def test_any_name_comes_back(name):
    text = os.fsdecode(name)
    stored = folders.stored_name(os.path.normpath(text))
    stored.encode("utf-8")
    assert folders.name_on_disk(stored) == os.path.normpath(text)


def test_a_name_that_is_not_utf8_is_read(tmp_path, photo):
    os.mkdir(os.fsencode(tmp_path) + b"/d\xe9")
    with open(os.fsencode(tmp_path) + b"/d\xe9/caf\xe9.png", "wb") as stream:
        stream.write(encoded(photo))
    (one,) = pictures([tmp_path])
    assert one.path == "d//xe9/caf//xe9.png"
    assert same(images.decode(images.read(one).data), photo)
