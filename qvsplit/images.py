"""Files to upright RGB pictures: read, hash, decode.

Invariants: a picture's bytes are read once, and the hash and the pixels are of those very bytes; what comes out is
8-bit RGB, upright, on white. Every bad file is a `PictureError` with a reason a person understands. The policy is
part of the recipe (recipe.PICTURE_POLICY). Knows nothing of models: no torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qvsplit.errors import PictureError, PictureVanished
from qvsplit.folders import Found, open_anyhow, storable, stored_name

if TYPE_CHECKING:
    from PIL import Image

# Pillow's readers that decode files of pictures and nothing else: none that starts a program (EPS) or wants a plug-in.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "MPO", "HEIF",
)  # fmt: skip
MAX_PIXELS = 178_956_970  # 0.5 GB of RGB, beyond any camera: where Pillow, too, speaks of a decompression bomb
MAX_FILE_BYTES = 1 << 30
FRESH_NS = 2_000_000_000
# A clock may be ahead of ours by as much (another machine's, on a shared disk); what is dated later still was not
# written just now, and its stat can be trusted as any other
AHEAD_NS = 24 * 3600 * 1_000_000_000

_ORIENTATION = 0x0112  # EXIF tag
_STRIP_PIXELS = 1 << 22


@dataclass(frozen=True)
class ReadFile:
    """A file's bytes and their identity. `mtime_ns` is None where the file is too fresh for its stat to be trusted."""

    data: bytes
    sha256: bytes
    size: int
    mtime_ns: int | None


# --------------------------------------------------------------------------------------------------------------- read


def read(found: Found) -> ReadFile:
    """The file's bytes and hash, and its stat as it was before reading. PictureError if it cannot be read."""
    now = time.time_ns()  # before the first byte is read: what changes from here on must not look old
    try:
        descriptor = _open(found)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and found.size >= 0:
            raise PictureVanished("is no longer there") from None
        raise PictureError(f"cannot be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("is not a regular file")
        try:
            data = _whole(stream, status.st_size)
        except OSError as error:
            raise PictureError(f"cannot be read: {error.strerror}") from None
        except MemoryError:
            raise PictureError("does not fit into memory") from None
    mtime_ns = storable(status.st_mtime_ns)
    fresh = -AHEAD_NS < now - mtime_ns <= FRESH_NS
    trusted = not fresh and len(data) == status.st_size
    return ReadFile(data, hashlib.sha256(data).digest(), len(data), mtime_ns if trusted else None)


def _open(found: Found) -> int:
    """A descriptor of the file. Devices and pipes are not opened: that alone can do something, or wait for somebody."""
    with suppress(OSError):
        if not stat.S_ISREG(os.stat(found.file).st_mode):
            raise PictureError("is not a regular file")
    return open_anyhow(found.file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)


def _whole(stream: IO[bytes], size: int) -> bytes:
    """All bytes of a file that had `size` when it was opened, a little over what is allowed at the most."""
    data = bytearray()
    while len(data) <= MAX_FILE_BYTES:
        if size > MAX_FILE_BYTES:
            break
        more = stream.read(max(1, min(size - len(data), 1 << 24)) + 1)
        if not more:
            return bytes(data)
        data += more
    raise PictureError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")


# --------------------------------------------------------------------------------------------------------- decode


def decode(
    data: bytes, *, about: int | None = None, on_size: Callable[[int, int], None] = lambda width, height: None
) -> Image.Image:
    """The picture in `data` as an upright 8-bit RGB image. PictureError with the reason if it cannot be had.

    `on_size` hears the width and height that its header claims, before memory is taken for them. With `about`, a JPEG
    may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps that many pixels:
    for thumbnails, as the pixels are not those that a model sees.
    """
    with _opened(data) as image:
        on_size(*image.size)
        if about is not None:
            image.draft(None, (about, about))
        image.load()
        return _to_rgb(_upright(image))


def measure(data: bytes) -> tuple[int, int]:
    """Width and height of the picture in `data`, by its header alone, perhaps before it is turned upright.

    PictureError if it has none.
    """
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Pillow's view of `data`; whatever goes wrong inside the block is a PictureError that says so."""
    import io

    from PIL import Image, UnidentifiedImageError

    if not data:
        raise PictureError("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check_size(*image.size)
            yield image
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(_unidentified(data)) from None
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise PictureError(_too_many(f"{int(count[0]):,}" if count else "too many")) from None
    except MemoryError:
        raise PictureError("does not fit into memory") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise PictureError(_reason(str(error), data)) from None


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads; HEIF where the optional pillow-heif is installed."""
    from PIL import Image

    Image.init()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    return tuple(name for name in FORMATS if name in Image.OPEN)


def warm_up() -> None:
    """Import what decoding needs, so that it counts as no picture's time or memory."""
    import numpy  # noqa: F401  # deep greys go through it

    _known_formats()


_MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"BM": "BMP", b"RIFF": "WebP", b"\0\0\0\x0cjP  ": "JPEG 2000",
}  # fmt: skip
_CUT_OFF = re.compile(r"truncat|not enough|only got|end of file|no more data|too short", re.IGNORECASE)
_HIDDEN = re.compile(r"MAX_TEXT|text chunk|Decompressed data too large", re.IGNORECASE)
_VARIANT = re.compile(r"unsupported|not supported|unknown (compression|mode|pixel)|cannot handle", re.IGNORECASE)


def _kind_of(data: bytes) -> str | None:
    """What a file is by its first bytes."""
    if data[4:12] in {b"ftypavif", b"ftypavis"}:
        return "AVIF"
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("A") else f"a {kind}"


def _reason(said: str, data: bytes) -> str:
    """What Pillow said of a broken file, in words for those who own it; equal causes in equal words."""
    kind = _kind_of(data)
    picture = f"{_with_article(kind)} file" if kind else "a picture"
    if _CUT_OFF.search(said):
        return f"is {picture} that is cut off or damaged"
    if _HIDDEN.search(said):
        return f"is {picture} that hides more text or profile data than is allowed"
    if _VARIANT.search(said):
        return f"is {picture} of a variant that cannot be read"
    return f"is {picture} that is damaged"


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in {b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis"}:
        return "is a HEIF picture, which needs pillow-heif: pip install 'qvsplit[heif]'"
    kind = _kind_of(data)
    if kind is not None:
        return f"is {_with_article(kind)} file that is cut off or damaged"
    return "is not a picture that can be read (by its content, whatever its name)"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError(_too_many(f"{width}×{height}"))


def _too_many(size: str) -> str:
    return f"claims {size} pixels, over the limit of {MAX_PIXELS:,}: a decompression bomb?"


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says.

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
    """The EXIF orientation, 1 to 8 if it is sound; a broken EXIF block counts as none, as every viewer has it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: alpha over white, 16 bits by their high byte, 32-bit greys stretched."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = _high_byte(image)
    elif image.mode in {"I", "F"}:
        image = _grey(_stretched(image))
    elif image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey(values: object) -> Image.Image:
    from PIL import Image

    return Image.fromarray(values)  # type: ignore[arg-type]


def _high_byte(image: Image.Image) -> Image.Image:
    """16 bits to 8 as Pillow does for colour: the high byte, so 8-bit content widened to 16 comes back unchanged.

    A PNG may name one of the 16-bit greys as transparent; what has it becomes white.
    """
    import numpy as np

    values = np.asarray(image).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return _grey(grey)


def _stretched(image: Image.Image) -> object:
    """32-bit integers and floats have no agreed white. Floats within 0…1 are read so; all else is stretched min…max.

    Integers within 16 bits are taken for 16-bit greys, which some of Pillow's readers deliver as 32. Some rows at a
    time, as such a picture may be large.
    """
    import numpy as np

    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    strips = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    low, high = np.inf, -np.inf
    for box in strips:
        values = np.asarray(image.crop(box))
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise PictureError("holds no finite values")
    deep = image.mode == "I" and low >= 0 and high <= 65535
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    grey = np.empty((height, width), np.uint8)
    for box in strips:
        values = np.asarray(image.crop(box)).astype(np.float64)
        if deep:
            grey[box[1] : box[3]] = values.astype(np.uint16) >> 8
        else:
            scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
            grey[box[1] : box[3]] = np.rint(np.clip(scaled, 0, 1) * 255)
    return grey


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # only None when asked to work in place
    return converted


def open_file(path: str | Path) -> Image.Image:
    """The picture in the file `path`, as `extract` sees it. PictureError if it is bad."""
    folder, name = os.path.split(os.path.abspath(path))
    return decode(read(Found(stored_name(folder), stored_name(name), 0, 0)).data)
