"""Files to upright RGB pictures: walk, read, hash, decode.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvsplit.errors import PictureError, UsageError

if TYPE_CHECKING:
    from PIL import Image

# What a walk takes for a picture, by the end of its name. A file named on the command line is tried whatever its name.
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".mpo",
})  # fmt: skip
# Pillow's readers that decode files of pictures and nothing else: none that starts a program (EPS) or wants a plug-in.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "MPO", "HEIF",
)  # fmt: skip
MAX_PIXELS = 178_956_970  # 0.5 GB of RGB, beyond any camera: where Pillow, too, speaks of a decompression bomb
MAX_FILE_BYTES = 1 << 30
FRESH_NS = 2_000_000_000
SHARD_NAME = re.compile(r"shard-(\d{6,})\.parquet")  # what marks a folder as an album

_ORIENTATION = 0x0112  # EXIF tag
_BYTES_BEYOND_UTF8 = re.compile(r"[\udc80-\udcff]")
_ESCAPED_BYTE = re.compile(r"//x([0-9a-f]{2})")


@dataclass(frozen=True)
class Found:
    """One file of a walk. `root` and `path` as stored: see `stored_name`."""

    root: str
    path: str  # relative to root, POSIX separators
    size: int
    mtime_ns: int

    @property
    def file(self) -> str:
        """The path to open, as the file system has it."""
        return os.path.join(name_on_disk(self.root), name_on_disk(self.path))


@dataclass(frozen=True)
class ReadFile:
    """A file's bytes and their identity. `mtime_ns` is None where the file is too fresh for its stat to be trusted."""

    data: bytes
    sha256: bytes
    size: int
    mtime_ns: int | None


# ---------------------------------------------------------------------------------------------------------- names


def stored_name(name: str) -> str:
    """`name` as it goes into a row: bytes that are not UTF-8 (surrogates, in Python) become `//x` and two hex digits.

    Reversible, as no normalised path holds two slashes in a row.
    """
    return _BYTES_BEYOND_UTF8.sub(lambda m: f"//x{ord(m[0]) - 0xDC00:02x}", name)


def name_on_disk(stored: str) -> str:
    """The inverse of `stored_name`."""
    return _ESCAPED_BYTE.sub(lambda m: chr(0xDC00 + int(m[1], 16)), stored)


# ----------------------------------------------------------------------------------------------------------- walk


def walk(
    paths: Sequence[str | os.PathLike[str]], on_note: Callable[[str], None] = lambda line: None, *, out: str = ""
) -> Iterator[Found]:
    """Every picture under `paths`, each file and each folder once, sorted within each folder.

    Hidden files and folders and qvsplit's own albums are left out; links are followed, and a folder that was met
    before, by whatever name, is not entered again. A folder's pictures have that folder as `root`, a single file its
    parent. UsageError for a path that is not there. `on_note` hears of folders that cannot be read, and of albums
    other than `out` that are left out.
    """
    files: set[str] = set()
    folders: set[tuple[int, int]] = set()
    for path, root in zip(paths, roots_of(paths), strict=True):
        text = os.fspath(path)
        found = (
            _walk_folder(root, folders, on_note, out) if os.path.isdir(text) else [_found(root, os.path.basename(text))]
        )
        for one in found:
            if one.file not in files:
                files.add(one.file)
                yield one


def roots_of(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The root under which each path's pictures are stored, as the file system has it. UsageError for a missing one."""
    roots = []
    for path in [os.fspath(path) for path in paths]:
        if not os.path.exists(path):
            raise UsageError(f"no file or folder at {path}")
        roots.append(os.path.realpath(path if os.path.isdir(path) else os.path.dirname(path) or "."))
    return roots


def _walk_folder(root: str, met: set[tuple[int, int]], on_note: Callable[[str], None], out: str) -> Iterator[Found]:
    """Depth first with a stack of our own: folders may be nested deeper than Python recurses."""
    stack: list[str | Found] = [root]
    while stack:
        top = stack.pop()
        if isinstance(top, Found):
            yield top
            continue
        try:
            own = os.stat(top)
            if (own.st_dev, own.st_ino) in met:
                continue
            met.add((own.st_dev, own.st_ino))
            with os.scandir(top) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            on_note(f"{top} cannot be read ({error.strerror}): its pictures are left as they are")
            continue
        if any(SHARD_NAME.fullmatch(entry.name) for entry in entries):
            if top != out:
                on_note(f"{top} is an album: it is left out")
            continue
        stack += [e for e in map(functools.partial(_entry, root), reversed(entries)) if e is not None]


def _entry(root: str, entry: os.DirEntry[str]) -> str | Found | None:
    """A folder to enter, a picture, or neither. A link that leads nowhere, or to itself, counts by its name."""
    try:
        if entry.is_dir():
            return entry.path
    except OSError:
        pass
    if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
        return _found(root, os.path.relpath(entry.path, root))
    return None


def _found(root: str, path: str) -> Found:
    try:
        status = os.stat(os.path.join(root, path))
        size, mtime_ns = status.st_size, status.st_mtime_ns
    except OSError:
        size, mtime_ns = -1, -1  # a dangling link, or gone since: reading it will say what is wrong
    return Found(stored_name(root), stored_name(path.replace(os.sep, "/")), size, mtime_ns)


# ----------------------------------------------------------------------------------------------------------- read


def read(found: Found) -> ReadFile:
    """The file's bytes and hash, and its stat as it was before reading. PictureError if it cannot be read."""
    now = time.time_ns()  # before the first byte is read: what changes from here on must not look old
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        descriptor = os.open(found.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PictureError("is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size > MAX_FILE_BYTES:
            raise PictureError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        try:
            data = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise PictureError(f"cannot be read: {error.strerror}") from None
        except MemoryError:
            raise PictureError("does not fit into memory") from None
    trusted = now - status.st_mtime_ns > FRESH_NS and len(data) == status.st_size
    return ReadFile(data, hashlib.sha256(data).digest(), len(data), status.st_mtime_ns if trusted else None)


# --------------------------------------------------------------------------------------------------------- decode


def decode(data: bytes, *, about: int | None = None) -> Image.Image:
    """The picture in `data` as an upright 8-bit RGB image. PictureError with the reason if it cannot be had.

    With `about`, a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps
    that many pixels: for thumbnails, as the pixels are not those that a model sees.
    """
    import io

    from PIL import Image, UnidentifiedImageError

    if not data:
        raise PictureError("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check_size(*image.size)
            if about is not None:
                image.draft(None, (about, about))
            image.load()
            return _to_rgb(_upright(image))
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
        raise PictureError(f"is broken: {error or type(error).__name__}") from None


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


def _unidentified(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in {b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis"}:
        return "is a HEIF picture, which needs pillow-heif"
    return "is not a picture that can be read (by its content, whatever its name)"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError(_too_many(f"{width}×{height}"))


def _too_many(size: str) -> str:
    return f"claims {size} pixels, over the limit of {MAX_PIXELS:,}: a decompression bomb?"


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; a broken EXIF block counts as none, as every viewer has it.

    Pillow's own exif_transpose also writes the rest of the block anew, and one odd tag in it would then decide.
    """
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        orientation = 1
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


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

    Integers within 16 bits are taken for 16-bit greys, which some of Pillow's readers deliver as 32.
    """
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise PictureError("holds no finite values")
    low, high = float(finite.min()), float(finite.max())
    if image.mode == "I" and low >= 0 and high <= 65535:
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
    return np.rint(scaled * 255).astype(np.uint8)


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
