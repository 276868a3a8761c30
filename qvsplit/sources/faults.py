"""What a file is by its first bytes, and in which words it is said what is wrong with it.

Invariants: equal causes have equal words; a sound file that nothing here reads is "not supported", never "damaged".
Standard library only, but for one question to Pillow about its own build.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from qvsplit.errors import ItemError

_MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"II+\0": "TIFF", b"MM\0+": "TIFF", b"MM*\0": "TIFF", b"II\0*": "TIFF",
    b"BM": "BMP", b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000",
}  # fmt: skip
_NOT_SUPPORTED = {
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "Photoshop", b"%PDF-": "PDF", b"gimp xcf": "GIMP",
    b"\x76\x2f\x31\x01": "OpenEXR", b"II\xbc\x01": "JPEG XR", b"#?RADIANCE": "Radiance HDR",
}  # fmt: skip
AVIF_BRANDS = {b"avif", b"avis"}  # of ISO files, which hold images or videos
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"}
_CUT_OFF = re.compile(r"truncat|not enough|only got|end of file|no more data|too short", re.IGNORECASE)
_HIDDEN = re.compile(r"MAX_TEXT|text chunk|Decompressed data too large", re.IGNORECASE)
_NO_CODEC = re.compile(r"(decoder|codec) \S+ not available|support not installed", re.IGNORECASE)
_VARIANT = re.compile(r"unsupported|not supported|unknown (compression|mode|pixel)|cannot handle", re.IGNORECASE)


def iso_kind(data: bytes) -> str | None:
    """Tell what a file is that begins as ISO files do: `AVIF`, `HEIF`, `CR3`, or any other, `MP4`; else None."""
    if data[4:8] != b"ftyp":  # then brands, of which any may be the one that says it
        return None
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, length, 4))}
    if b"crx " in brands:
        return "CR3"
    return "AVIF" if brands & AVIF_BRANDS else "HEIF" if brands & HEIF_BRANDS else "MP4"


def kind_of(data: bytes) -> str | None:
    """Tell what kind of image a file is by its first bytes; None where it is no image, or none that is known here."""
    if (kind := iso_kind(data)) in ("AVIF", "HEIF"):
        return kind
    if data[:4] == b"RIFF" and data[8:12] in b"WEBP":
        return "WebP"
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)


def _a_file(kind: str | None) -> str:
    if kind is None:
        return "an image"
    return f"{'an' if kind[0] in 'AO' else 'a'} {kind} file"


def is_cut_off(reason: str) -> bool:
    """Say whether Pillow's `reason` is that the file ends too early."""
    return _CUT_OFF.search(reason) is not None


def bad_file(reason: str, data: bytes) -> ItemError:
    """Say in words for those who own the file what Pillow said of it; equal causes in equal words."""
    image = _a_file(kind_of(data))
    if _NO_CODEC.search(reason):
        return _no_decoder(image)
    if is_cut_off(reason):
        return ItemError(f"is {image} that is cut off or damaged")
    if _HIDDEN.search(reason):
        return ItemError(f"is {image} that hides more text or profile data than is allowed")
    if _VARIANT.search(reason):
        reader = "pillow-heif" if kind_of(data) == "HEIF" else "pillow"
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


def unidentified(data: bytes, readers: Collection[str]) -> ItemError:
    """Say what is wrong with a file that none of `readers`, by Pillow's names, takes for its own."""
    from PIL import features

    kind = kind_of(data)
    if kind == "HEIF" and "HEIF" not in readers:
        return ItemError("is a HEIF image, which needs pillow-heif: pip install 'qvsplit[heif]'", "reader-missing")
    if kind in {"AVIF", "WebP"} and not features.check(kind.lower()):
        return _no_decoder(_a_file(kind))
    if kind is not None:
        return ItemError(f"is {_a_file(kind)} that is cut off or damaged")
    for magic, name in _NOT_SUPPORTED.items():
        if data.startswith(magic):
            return not_supported(_a_file(name))
    return ItemError("is not an image or a video that can be read (by its content, whatever its name)")


def not_supported(what: str) -> ItemError:
    """Say that nothing here reads a file that may well be sound; `what` it is, with its article."""
    return ItemError(f"is {what}, which is not supported; convert it to JPEG, PNG or TIFF")


def too_many_pixels(size: str, limit: int) -> ItemError:
    """Say that a header claims more pixels than `limit`; `size` are its words for how many."""
    return ItemError(
        f"claims {size} pixels, over the limit of {limit:,}, as a decompression bomb would; `max_image_pixels` allows "
        "more",
        "memory",
    )


def camera_raw(kind: str) -> ItemError:
    """Say that a file is a camera's RAW file of this kind."""
    return ItemError(
        f"is a RAW file of a camera ({kind}), which is not supported; use the JPEG that the camera made with it, or "
        "develop it to JPEG, PNG or TIFF"
    )
