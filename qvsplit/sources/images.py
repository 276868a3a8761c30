"""Decode the bytes of a file to an upright RGB image.

Invariants: what comes out is 8-bit RGB, upright, on white, as `IMAGE_POLICY` says. Every bad file is an `ItemError`
with a reason a person understands and the kind of its error. Knows nothing of models: no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qvsplit.errors import ItemError
from qvsplit.runtime.names import absolute, stored_name
from qvsplit.sources import cut_ends, cut_jpeg, faults, icon, jpeg_segments, misread, pixels, png, raw, tiff
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

# How a file becomes an upright RGB image. Part of the extraction config: a change of behaviour here is a change there.
IMAGE_POLICY: Mapping[str, str] = {
    "orientation": "exif",
    "transparency": "over white; named colours at full depth",
    "colour_profile": "ignored",
    "animation": "first frame",
    "deep_colour": "high eight bits; 32-bit greys stretched",
}
# Pillow's readers that decode files of images and nothing else: none that starts a program (EPS) or wants a plug-in.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "MPO", "HEIF", "TGA",
)  # fmt: skip  # TGA last: it is told by nothing but numbers that make sense
# Beyond any camera, a sheet of A4 at 2,400 dpi or a print of 13 × 18 cm at 4,800; 3 GB of RGB
MAX_IMAGE_PIXELS = 1_000_000_000

_UNSURE_ALPHA = ("TGA", "BMP", "DIB")  # where a fourth byte that nobody set is common, and nothing tells it from alpha
_ANIMATED = ("GIF", "PNG", "WebP", "AVIF", "TIFF")  # formats that hold several frames or pages, all to be looked at

_ONE_OPENS = threading.Lock()

# TIFF and EXIF tags
_EXIF_IFD = 0x8769
_DATE_TIME, _OFFSET_TIME = 0x0132, 0x9010
_DATE_TIME_ORIGINAL, _OFFSET_TIME_ORIGINAL = 0x9003, 0x9011
_EXIF_TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)
_EXIF_OFFSET = re.compile(r"[+-](0\d|1[0-4]):[0-5]\d", re.ASCII)


@dataclass(frozen=True, slots=True)
class ImageMetadata:
    """What a file says of its image besides pixels.

    Attributes:
        format: Pillow's name of the file format, e.g. "JPEG".
        taken_at: When it was taken, by its EXIF block: "YYYY-MM-DDTHH:MM:SS", with the offset from UTC ("+02:00") where
            the block has one. None where the block has no such time, or nonsense.
        cut_rows: Where the file's last bytes are missing: of how many rows of pixels something is, from the last one
            up as they are stored. None where none are missing.
    """

    format: str
    taken_at: str | None
    cut_rows: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An upright RGB image: `pixels` uint8 [height, width, 3], and the metadata of its file (see `ImageMetadata`)."""

    pixels: npt.NDArray[np.uint8] = field(repr=False)
    width: int
    height: int
    taken_at: str | None
    format: str
    cut_rows: int | None = None


def optional_readers(*, videos: bool = True) -> tuple[str, ...]:
    """Name the libraries that read images here, and those of `videos`, each with its build, without importing them.

    What one build cannot read another may: of a newer version, or with more of the codecs that are optional.
    """
    packages = ("PIL", "pillow_heif", *(("av",) if videos else ()))
    return tuple(f"{package} {build}" for package in packages if (build := _build(package)) is not None)


def _build(package: str) -> str | None:
    """Digest a package's version and compiled modules by their sizes; None where it is not installed.

    Where its folder may not be read, as by a process that has become another user, that is a build of its own.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        compiled = {*folder.glob("*.so"), *folder.parent.glob(f"_{package}*.so")}
        parts = sorted(f"{file.name} {file.stat().st_size}" for file in compiled)
        version = folder / "_version.py"
        parts.append(version.read_text() if version.exists() else "")
    except OSError:
        return "unknown"
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def decode(
    data: bytes,
    *,
    about: int | None = None,
    on_size: Callable[[int, int], None] = lambda width, height: None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Decode `data` to an upright 8-bit RGB image; see `decode_with_metadata`."""
    return decode_with_metadata(data, about=about, on_size=on_size, max_pixels=max_pixels)[0]


def decode_with_metadata(
    data: bytes,
    *,
    about: int | None = None,
    on_size: Callable[[int, int], None] = lambda width, height: None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> tuple[Image.Image, ImageMetadata]:
    """Decode `data` to an upright 8-bit RGB image, and read what its file says of it.

    Args:
        data: The whole file.
        about: A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps
            that many pixels: for thumbnails, as the pixels are not those that a model sees.
        on_size: Called with the width and height that the header claims, before memory is taken for them.
        max_pixels: A header that claims more is an error.

    Raises:
        ItemError: It is no image that can be read; with the reason.
    """
    with _opened(data, max_pixels) as image:
        on_size(*image.size)
        if about is not None:
            image.draft(None, (about, about))
        loaded, cut_rows = (tiff.load(image, data), None) if image.format == "TIFF" else _loaded(image, data)
        if image.format in _UNSURE_ALPHA and pixels.is_wholly_transparent(loaded):
            loaded = loaded.convert(loaded.mode.removesuffix("A"))
        upright = pixels.upright(loaded)  # first: where Pillow fails on an EXIF block, a second try gives half of it
        metadata = ImageMetadata(image.format or "", _taken_at(image), cut_rows)
        for spent in (image, loaded):
            if spent is not upright:
                spent.close()  # its pixels: a large image would be in memory once more
        return pixels.to_rgb(upright), metadata


def _loaded(image: Image.Image, data: bytes) -> tuple[Image.Image, int | None]:
    """Decode an image; give it with what its last rows miss, as `ImageMetadata` has it."""
    if image.format == "PNG":
        image.load()
        chunks = png.read(data)
        png.make_transparent(image, chunks)
        return image, None if chunks.is_whole else 0
    kind = faults.kind_of(data)
    try:
        if kind == "JPEG" and cut_jpeg.is_padded(data):
            raise OSError("truncated")
        image.load()
    except OSError as error:
        completed, cut_rows = _completed(data, kind, image.size) if faults.is_cut_off(str(error)) else (None, None)
        if completed is None:
            raise
        image.close()
        return _load(completed), cut_rows
    return image, 0 if kind == "WebP" and cut_ends.whole_webp(data)[1] else None


def _completed(data: bytes, kind: str | None, size: tuple[int, int]) -> tuple[bytes | None, int | None]:
    """Give a file that is cut off with an end, and what its last rows miss; None where that is too much."""
    if kind == "BMP":
        return cut_ends.whole_bmp(data, size), 0
    cut_rows = cut_jpeg.missing_rows(data, _load) if kind == "JPEG" else None
    return (None if cut_rows is None else cut_jpeg.completed(data)), cut_rows


def _load(data: bytes) -> Image.Image:
    image = _open(data)
    image.load()
    return image


def measure(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Read width and height from the header alone, perhaps before turning upright. ItemError if there is none."""
    with _opened(data, max_pixels) as image:
        return image.size


def open_file(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode the file `path` as `extract` does. ItemError if it is bad."""
    return decode(read_file(path), max_pixels=max_pixels)


def read_file(path: str | Path) -> bytes:
    """Give the bytes of the file `path`. ItemError where it cannot be read."""
    folder, name = os.path.split(absolute(path))
    return read(Entry(stored_name(folder), stored_name(name), 0, None, None)).data


def frames(data: bytes) -> int | None:
    """Count the frames of an animated image, or the pages of a TIFF but for smaller copies; 1 for any other image.

    None where that cannot be told. Decodes none of them. The other images in a JPEG or HEIF file are not counted:
    they are what cameras put there beside the one that is meant.
    """
    if not may_have_frames(data):
        return 1
    try:
        with _opened(data, MAX_IMAGE_PIXELS) as image:
            if image.format == "PNG":
                return png.read(data).frames
            return tiff.count_pages(image) if image.format == "TIFF" else int(getattr(image, "n_frames", 1))
    except ItemError:
        return None


def may_have_frames(data: bytes) -> bool:
    """Say by its first bytes whether an image is of a format whose frames are counted."""
    return faults.kind_of(data) in _ANIMATED


def warm_up() -> None:
    """Import what decoding needs, so that it counts as no image's time or memory. For a process of decoding alone."""
    import numpy  # noqa: F401  # deep greys go through it
    from PIL import Image

    _known_formats()
    Image.MAX_IMAGE_PIXELS = None  # some of Pillow's readers look at it once more after the header


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Give Pillow's view of `data`; turn whatever goes wrong inside the block into an ItemError that says so."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ItemError("is empty (0 bytes)")
    try:
        if (kind := raw.raw_kind(data)) is not None:
            raise faults.camera_raw(kind)
        misread.check(data)
        if is_tiff := faults.kind_of(data) == "TIFF":
            tiff.check(data)
        with _open(data) as image:
            if is_tiff:
                tiff.select_page(image, data)
            width, height = image.size
            if width * height > max_pixels:
                raise faults.too_many_pixels(f"{width}×{height}", max_pixels)
            yield image
    except ItemError:
        raise
    except UnidentifiedImageError:
        raise (tiff.unidentified(data) if is_tiff else faults.unidentified(data, _known_formats())) from None
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise faults.too_many_pixels(f"{int(count[0]):,}" if count else "too many", max_pixels) from None
    except MemoryError:
        raise ItemError("does not fit into memory", "memory") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise faults.bad_file(str(error), data) from None


def _open(data: bytes) -> Image.Image:
    """Have Pillow read the header, of those bytes that make the image: without metadata that is broken."""
    import io

    from PIL import UnidentifiedImageError

    if data.startswith(png.MAGIC):
        return _identified(png.read(data).open())
    if data.startswith(icon.MAGIC):
        data = icon.largest(data)
    elif faults.kind_of(data) == "WebP":
        data, _ = cut_ends.whole_webp(data)
    try:
        return _identified(io.BytesIO(data))
    except UnidentifiedImageError:
        if not data.startswith(jpeg_segments.MAGIC):
            raise
        return _identified(io.BytesIO(jpeg_segments.without_metadata(data)))


def _identified(stream: IO[bytes]) -> Image.Image:
    """Have Pillow read the header, whatever it claims: Pillow's limit is one for the process, ours is of a call."""
    from PIL import Image

    with _ONE_OPENS:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=_known_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Give those of FORMATS that this Pillow reads; HEIF where the optional pillow-heif is installed."""
    from PIL import Image

    Image.init()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    return tuple(name for name in FORMATS if name in Image.OPEN)


# ------------------------------------------------------------------------------------------------------------- EXIF


def _taken_at(image: Image.Image) -> str | None:
    """Read when the image was taken; a broken EXIF block counts as none."""
    try:
        exif = image.getexif()
        inner = exif.get_ifd(_EXIF_IFD)
        times = (
            (inner.get(_DATE_TIME_ORIGINAL), inner.get(_OFFSET_TIME_ORIGINAL)),
            (exif.get(_DATE_TIME), inner.get(_OFFSET_TIME)),
        )
        return next((when for time, offset in times if (when := _iso_time(time, offset))), None)
    except MemoryError:
        raise
    except Exception:
        return None


def _iso_time(time: object, offset: object) -> str | None:
    """Turn EXIF's "2024:01:31 12:00:00" and "+02:00" into ISO 8601; None for a time that is none."""
    found = _EXIF_TIME.fullmatch(time.strip("\0 ")) if isinstance(time, str) else None
    if found is None:
        return None
    try:
        when = datetime(*(int(part) for part in found.groups())).isoformat()  # type: ignore[arg-type]
    except ValueError:
        return None
    zone = offset.strip("\0 ") if isinstance(offset, str) else ""
    return when + zone if _EXIF_OFFSET.fullmatch(zone) else when
