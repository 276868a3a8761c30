"""A JPEG without its last bytes: what is missing of it is told, and held against the whole one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from qvsplit.errors import ItemError
from qvsplit.sources import cut_jpeg, images
from tests.support.nasty_images import encoded

KINDS = {
    "baseline": {}, "all colours": {"subsampling": 0}, "fine": {"quality": 100}, "own tables": {"optimize": True},
    "progressive": {"progressive": True}, "restarts": {"restart_marker_rows": 1},
}  # fmt: skip


def rows_that_differ(image: Image.Image, whole: Image.Image) -> int:
    """How many, from the last one up to the first that does."""
    differs = np.nonzero((np.asarray(image) != np.asarray(whole)).any(axis=(1, 2)))[0]
    return whole.height - int(differs[0]) if len(differs) else 0


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS.keys())
def test_what_is_said_to_be_missing_is_all_that_is(photo, how):
    """However many bytes are gone: either it is refused, or all rows above those are the whole one's."""
    data = encoded(photo, "JPEG", **({"quality": 85} | how))
    whole, read, refused = images.decode(data), [], 0
    for gone in (1, 2, 3, 4, 5, 7, 11, 17, 30, 60, 150, 400, len(data) // 20, len(data) // 5, len(data) // 2):
        try:
            image, metadata = images.decode_with_metadata(data[:-gone])
        except ItemError as error:
            assert "is a JPEG file that is cut off or damaged" in str(error)
            refused += 1
            continue
        assert not refused, "what misses less is refused"
        read.append(metadata.cut_rows)
        assert rows_that_differ(image, whole) <= metadata.cut_rows <= photo.height // 16
    assert read[:2] == [0, 0]  # the mark of its end alone
    assert len(read) >= 3
    assert refused >= 2
    assert images.decode_with_metadata(data)[1].cut_rows is None


def test_zeros_up_to_the_size_that_was_meant_are_no_pixels(photo):
    """As a download leaves them that took its place on disk before it came."""
    data = encoded(photo, "JPEG")
    assert images.decode_with_metadata(data[:-2] + bytes(1000))[1].cut_rows == 0
    for share in (2, 5):
        with pytest.raises(ItemError, match="cut off"):
            images.decode(data[: -len(data) // share] + bytes(len(data) // share))


def test_a_picture_of_which_a_part_has_not_begun_is_cut_off(photo):
    """Scan by scan: cut just behind one, all that was begun is whole."""
    data = encoded(photo, "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for at in scans[1:]:
        between = data.rfind(b"\xff\xc4", 0, at)  # its table comes before it
        with pytest.raises(ItemError, match="cut off"):
            images.decode(data[: min(at, between)])
        with pytest.raises(ItemError, match="cut off"):
            images.decode(data[: at + 14])
    assert cut_jpeg.missing_rows(data, images._load) is None  # it has an end


def test_a_turned_image_is_upright_and_keeps_its_time(photo):
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2024:01:31 12:00:00"
    image, metadata = images.decode_with_metadata(encoded(photo, "JPEG", exif=exif)[:-2])
    assert image.size == (photo.height, photo.width)
    assert metadata == images.ImageMetadata("JPEG", "2024-01-31T12:00:00", 0)


def test_a_picture_of_a_camera_with_others_beside_it_may_be_cut(photo):
    """The others are not looked at; what misses the last of them is whole."""
    stream = io.BytesIO()
    photo.save(stream, "MPO", save_all=True, append_images=[photo.rotate(180)])
    data = stream.getvalue()
    assert images.decode_with_metadata(data[:-100])[1].cut_rows is None


def test_grey_and_cmyk(photo):
    for mode in ("L", "CMYK"):
        data = encoded(photo.convert(mode), "JPEG")
        assert images.decode_with_metadata(data[:-2])[1].cut_rows == 0
        image, metadata = images.decode_with_metadata(data[:-10])
        assert rows_that_differ(image, images.decode(data)) <= metadata.cut_rows


@pytest.mark.parametrize(
    "how", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 5}, {"progressive": True, "restart_marker_rows": 2}]
)
def test_what_is_cut_at_a_restart_is_not_said_to_be_whole(photo, how):
    """There a decoder looks for the next marker and skips whatever is none."""
    small = photo.resize((160, 160))
    data = encoded(small, "JPEG", quality=85, **how)
    whole = images.decode(data)
    markers = [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    assert len(markers) > 5
    for at in (*markers[:: len(markers) // 5], markers[-1]):
        for cut in (data[:at], data[: at + 1], data[: at + 2], data[:at] + bytes(4096)):
            try:
                image, metadata = images.decode_with_metadata(cut)
            except ItemError as error:
                assert "cut off" in str(error)
            else:
                assert metadata.cut_rows is not None
                assert rows_that_differ(image, whole) <= metadata.cut_rows <= small.height // 16
    assert images.decode_with_metadata(data[:-2])[1].cut_rows == 0


def test_spaces_up_to_the_size_that_was_meant_are_no_pixels(photo):
    data = encoded(photo, "JPEG")
    whole = images.decode(data)
    image, metadata = images.decode_with_metadata(data[:-2] + b" " * 5000)
    assert (rows_that_differ(image, whole), metadata.cut_rows) == (0, 0)
    with pytest.raises(ItemError, match="cut off"):
        images.decode(data[: -len(data) // 10] + b" " * (len(data) // 10))
