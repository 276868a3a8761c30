"""Decode the bytes of a file to an upright RGB image.

Invariants: what comes out is 8-bit RGB, upright, on white, as `IMAGE_POLICY` says. Every bad file is an `ItemError`
with a reason a person understands and the kind of its error. Knows nothing of models: no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import ItemError
from qvsplit.runtime.names import absolute, stored_name
from qvsplit.sources import pixels
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

# How a file becomes an upright RGB image. Part of the extraction config: a change of behaviour here is a change there.
IMAGE_POLICY: Mapping[str, str] = {
    "orientation": "exif",
    "transparency": "over white",
    "colour_profile": "ignored",
    "animation": "first frame",
    "deep_colour": "high byte; 32-bit greys stretched",
}
# Pillow's readers that decode files of images and nothing else: none that starts a program (EPS) or wants a plug-in.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "MPO", "HEIF",
)  # fmt: skip
MAX_PIXELS = 178_956_970  # 0.5 GB of RGB, beyond any camera: where Pillow, too, speaks of a decompression bomb

_ANIMATED = ("GIF", "PNG", "WebP", "AVIF", "TIFF")  # formats that hold several frames or pages, all to be looked at

# TIFF and EXIF tags
_SUBFILE_TYPE, _IS_REDUCED = 0x00FE, 1
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
    """

    format: str
    taken_at: str | None


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An upright RGB image: `pixels` uint8 [height, width, 3], and the metadata of its file (see `ImageMetadata`)."""

    pixels: npt.NDArray[np.uint8] = field(repr=False)
    width: int
    height: int
    taken_at: str | None
    format: str


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
    data: bytes, *, about: int | None = None, on_size: Callable[[int, int], None] = lambda width, height: None
) -> Image.Image:
    """Decode `data` to an upright 8-bit RGB image; see `decode_with_metadata`."""
    return decode_with_metadata(data, about=about, on_size=on_size)[0]


def decode_with_metadata(
    data: bytes, *, about: int | None = None, on_size: Callable[[int, int], None] = lambda width, height: None
) -> tuple[Image.Image, ImageMetadata]:
    """Decode `data` to an upright 8-bit RGB image, and read what its file says of it.

    Args:
        data: The whole file.
        about: A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps
            that many pixels: for thumbnails, as the pixels are not those that a model sees.
        on_size: Called with the width and height that the header claims, before memory is taken for them.

    Raises:
        ItemError: It is no image that can be read; with the reason.
    """
    with _opened(data) as image:
        on_size(*image.size)
        if about is not None:
            image.draft(None, (about, about))
        image.load()
        upright = pixels.upright(image)  # first: where Pillow fails on an EXIF block, a second try gives half of it
        metadata = ImageMetadata(image.format or "", _taken_at(image))
        return pixels.to_rgb(upright), metadata


def measure(data: bytes) -> tuple[int, int]:
    """Read width and height from the header alone, perhaps before turning upright. ItemError if there is none."""
    with _opened(data) as image:
        return image.size


def open_file(path: str | Path) -> Image.Image:
    """Decode the file `path` as `extract` does. ItemError if it is bad."""
    folder, name = os.path.split(absolute(path))
    return decode(read(Entry(stored_name(folder), stored_name(name), 0, None, None)).data)


def frames(data: bytes) -> int | None:
    """Count the frames of an animated image, or the pages of a TIFF but for smaller copies; 1 for any other image.

    None where that cannot be told. Decodes none of them. The other pictures of a JPEG or HEIF file are not counted:
    they are what cameras put there beside the one that is meant.
    """
    if not may_have_frames(data):
        return 1
    try:
        with _opened(data) as image:
            return _pages(image) if image.format == "TIFF" else int(getattr(image, "n_frames", 1))
    except ItemError:
        return None


def may_have_frames(data: bytes) -> bool:
    """Say by its first bytes whether an image is of a format whose frames are counted."""
    return _kind_of(data) in _ANIMATED


def _pages(image: Image.Image) -> int:
    pages = 1
    with suppress(EOFError):
        for number in itertools.count(1):
            image.seek(number)
            pages += not image.tag_v2.get(_SUBFILE_TYPE, 0) & _IS_REDUCED  # type: ignore[attr-defined]
    return pages


def warm_up() -> None:
    """Import what decoding needs, so that it counts as no image's time or memory."""
    import numpy  # noqa: F401  # deep greys go through it

    _known_formats()


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Give Pillow's view of `data`; turn whatever goes wrong inside the block into an ItemError that says so."""
    import io

    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ItemError("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check_size(*image.size)
            yield image
    except ItemError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise ItemError(_too_many(f"{int(count[0]):,}" if count else "too many")) from None
    except MemoryError:
        raise ItemError("does not fit into memory", "memory") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise _bad_file(str(error), data) from None


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


# ----------------------------------------------------------------------------------------- what is wrong with a file

_MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"BM": "BMP", b"RIFF": "WebP", b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000",
}  # fmt: skip
_AVIF_BRANDS = {b"avif", b"avis"}  # of ISO files, which hold images or videos
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"}
_CUT_OFF = re.compile(r"truncat|not enough|only got|end of file|no more data|too short", re.IGNORECASE)
_HIDDEN = re.compile(r"MAX_TEXT|text chunk|Decompressed data too large", re.IGNORECASE)
_NO_CODEC = re.compile(r"(decoder|codec) \S+ not available|support not installed", re.IGNORECASE)
_VARIANT = re.compile(r"unsupported|not supported|unknown (compression|mode|pixel)|cannot handle", re.IGNORECASE)


def iso_kind(data: bytes) -> str | None:
    """Tell what a file is that begins as ISO files do: `AVIF`, `HEIF`, or any other, `MP4`. None if it is none."""
    if data[4:8] != b"ftyp":  # then brands, of which any may be the one that says it
        return None
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, length, 4))}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else "MP4"


def _kind_of(data: bytes) -> str | None:
    """Tell what kind of image a file is by its first bytes."""
    if (kind := iso_kind(data)) in ("AVIF", "HEIF"):
        return kind
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def _a_file(kind: str | None) -> str:
    if kind is None:
        return "an image"
    return f"an {kind} file" if kind.startswith("A") else f"a {kind} file"


def _bad_file(reason: str, data: bytes) -> ItemError:
    """Say in words for those who own the file what Pillow said of it; equal causes in equal words."""
    image = _a_file(_kind_of(data))
    if _NO_CODEC.search(reason):
        return _no_decoder(image)
    if _CUT_OFF.search(reason):
        return ItemError(f"is {image} that is cut off or damaged")
    if _HIDDEN.search(reason):
        return ItemError(f"is {image} that hides more text or profile data than is allowed")
    if _VARIANT.search(reason):
        reader = "pillow-heif" if _kind_of(data) == "HEIF" else "pillow"
        return ItemError(
            f"is {image} of a variant that cannot be read; a newer reader may: pip install --upgrade {reader}",
            "reader-missing",
        )
    return ItemError(f"is {image} that is damaged")


def _no_decoder(image: str) -> ItemError:
    return ItemError(
        f"is {image}, for which this Pillow has no decoder; install one that has: pip install --upgrade pillow",
        "reader-missing",
    )


def _unidentified(data: bytes) -> ItemError:
    from PIL import features

    kind = _kind_of(data)
    if kind == "HEIF" and "HEIF" not in _known_formats():
        return ItemError("is a HEIF image, which needs pillow-heif: pip install 'qvsplit[heif]'", "reader-missing")
    if kind in {"AVIF", "WebP"} and not features.check(kind.lower()):
        return _no_decoder(_a_file(kind))
    if kind is not None:
        return ItemError(f"is {_a_file(kind)} that is cut off or damaged")
    return ItemError("is not an image or a video that can be read (by its content, whatever its name)")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ItemError(_too_many(f"{width}×{height}"))


def _too_many(size: str) -> str:
    return f"claims {size} pixels, over the limit of {MAX_PIXELS:,}: a decompression bomb?"


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
