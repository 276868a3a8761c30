"""Any image of Pillow's to an upright 8-bit RGB one: what that means is part of every extraction config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvsplit.errors import ItemError

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 22


def upright_rgb(image: Image.Image) -> Image.Image:
    """Give an image upright and in RGB, as one that is decoded from a file. ItemError where it has no finite value."""
    return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says.

    Pillow's own exif_transpose also writes the rest of the block anew, and one odd tag in it would then decide.
    """
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    """Read the EXIF orientation, 1 to 8 if it is sound; a broken EXIF block counts as none, as in every viewer."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1


def is_wholly_transparent(image: Image.Image) -> bool:
    """Say whether an image has an alpha channel by which nothing of it would be seen."""
    return image.mode in {"LA", "RGBA"} and image.getchannel("A").getextrema()[1] == 0


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: alpha over white, 16 bits by their high byte, 32-bit greys stretched.

    An image that is RGB already is given back itself.
    """
    if image.mode == "LAB":
        return _from_lab(image)
    image = eight_bits(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Lay an image of any mode over white, some rows at a time, as it may be large."""
    from PIL import Image

    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    white = Image.new("RGB", image.size, (255, 255, 255))
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        rgba = image.crop(box).convert("RGBA")
        white.paste(rgba, box, mask=rgba.getchannel("A"))
    return white


def eight_bits(image: Image.Image) -> Image.Image:
    """Give greys of 16 bits by their high byte, those of 32 bits stretched, and any other image as it is."""
    if image.mode.startswith("I;16"):
        return _high_byte(image)
    return stretched(image) if image.mode in {"I", "F"} else image


def _grey(values: object) -> Image.Image:
    from PIL import Image

    return Image.fromarray(values)  # type: ignore[arg-type]


def _high_byte(image: Image.Image) -> Image.Image:
    """Take the high byte, as Pillow does for colour: 8-bit content widened to 16 comes back unchanged.

    A PNG may name one of the 16-bit greys as transparent; what has it becomes white.
    """
    import numpy as np

    values = np.asarray(image).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return _grey(grey)


def twelve_bits(image: Image.Image) -> Image.Image:
    """Take the high eight of greys of 12 bits."""
    import numpy as np

    return _grey((np.asarray(image).astype(np.uint16) >> 4).astype(np.uint8))


def stretched(image: Image.Image, dtype: str | None = None) -> Image.Image:
    """Map 32-bit greys, which have no agreed white, to 8 bits: floats within 0…1 as they are, all else min…max.

    Integers within 16 bits are taken for 16-bit greys, which some of Pillow's readers deliver as 32. Some rows at a
    time, as such an image may be large.

    Args:
        image: Of mode "I" or "F".
        dtype: NumPy's name of what these numbers are, where the mode takes them for others of their size.
    """
    import numpy as np

    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    strips = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]

    def numbers(box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        values = np.asarray(image.crop(box))
        return values if dtype is None else values.view(dtype)

    low, high = np.inf, -np.inf
    for box in strips:
        values = numbers(box)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise ItemError("holds no finite values")
    deep = image.mode == "I" and low >= 0 and high <= 65535
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    grey = np.empty((height, width), np.uint8)
    for box in strips:
        values = numbers(box).astype(np.float64)
        if deep:
            grey[box[1] : box[3]] = values.astype(np.uint16) >> 8
        else:
            scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
            grey[box[1] : box[3]] = np.rint(np.clip(scaled, 0, 1) * 255)
    return _grey(grey)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # only None when asked to work in place
    return converted
