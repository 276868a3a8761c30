"""A second decoder for `bench.decoders`: libraries that have no code of Pillow's, and what qvsplit promises by them.

libvips is asked first; where it has no reader or refuses, tifffile, imagecodecs and SDL_image are, in turn. Everything
runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
MEMORY_BYTES = 4 << 30
_PACKAGES = {"pyvips": "pyvips[binary]", "tifffile": "tifffile", "imagecodecs": "imagecodecs", "pygame": "pygame-ce"}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = range(4)  # TIFF's photometric interpretations
_PREMULTIPLIED = 1


@dataclass(frozen=True)
class Seen:
    """What a decoder gave: pixels uint8 [height, width, 3], or None and why; and a word on who or what it was."""

    pixels: Pixels | None
    word: str


def missing() -> list[str]:
    """Name the packages that are to be installed."""
    return [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]


class SecondDecoder:
    """The second decoder's process, started when it is needed and again when it died."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: multiprocessing.process.BaseProcess | None = None

    def decode(self, path: Path) -> Seen:
        """Decode a file there."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, far = context.Pipe()
            self._process = context.Process(target=_serve, args=(far,), daemon=True)
            self._process.start()
            far.close()
        self._connection.send(path)
        try:
            if self._connection.poll(self._seconds):
                seen: Seen = self._connection.recv()
                return seen
            why = f"took longer than {self._seconds:g} s"
        except EOFError:
            why = "crashed"
        self.close()
        return Seen(None, why)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection: Connection) -> None:
    """Decode the files that are named on `connection`, until it is closed."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # the libraries' remarks, on themselves and on odd files
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        try:
            path: Path = connection.recv()
        except EOFError:
            return
        connection.send(decode(path.read_bytes(), path.suffix))


def decode(data: bytes, suffix: str) -> Seen:
    """Decode a file by the first library that can, and say which; or what each said."""
    decoders: dict[str, Callable[[bytes, str], Pixels]] = {
        "libvips": _by_vips, "tifffile": _by_tifffile, "imagecodecs": _by_imagecodecs, "SDL_image": _by_sdl,
    }  # fmt: skip
    reasons = []
    for name, by in decoders.items():
        try:
            return Seen(by(data, suffix), name)
        except Exception as error:  # they raise whatever a file makes them stumble over
            reasons.append(f"{name}: {' '.join(str(error).split())[:80]}")
    return Seen(None, "; ".join(reasons))


def _by_vips(data: bytes, suffix: str) -> Pixels:
    """Read by libvips. CMYK becomes RGB without a profile, as inks on paper would."""
    import pyvips

    image = pyvips.Image.new_from_buffer(data, "", fail_on="error").autorot()
    if image.interpretation in ("lab", "labs", "labq"):
        image = image.colourspace("srgb")
    if image.interpretation == "cmyk":
        inks = _eight_bits(image[:4].numpy()).astype(np.uint16)
        rgb: Pixels = ((255 - inks[..., :3]) * (255 - inks[..., 3:]) // 255).astype(np.uint8)
        return rgb
    return _over_white(image.numpy())


def _by_tifffile(data: bytes, suffix: str) -> Pixels:
    """Read the first page of a TIFF that is grey, RGB or has a palette."""
    import tifffile

    page = tifffile.TiffFile(io.BytesIO(data)).pages.first
    photometric, bits, values = page.photometric, page.bitspersample, page.asarray()
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE):
        raise ValueError("other colours")
    if photometric == _PALETTE:
        colours: Pixels = np.moveaxis(np.asarray(page.colormap) >> 8, 0, -1).astype(np.uint8)[values]
        return colours
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if bits < 8:
        values = values.astype(np.uint8) * (255 // (2**bits - 1))
    elif 8 < bits < 16 and values.dtype == np.uint16:
        values <<= 16 - bits
    if photometric == _WHITE_IS_ZERO:
        values = np.iinfo(values.dtype).max - values
    return _over_white(values, premultiplied=_PREMULTIPLIED in page.extrasamples)


def _by_imagecodecs(data: bytes, suffix: str) -> Pixels:
    """Read by whichever of imagecodecs' readers takes it; of a TIFF they would not say what the samples mean."""
    import imagecodecs

    if data[:2] in (b"II", b"MM"):
        raise ValueError("a TIFF")
    values = imagecodecs.imread(io.BytesIO(data))
    if data[4:8] == b"ftyp" and values.dtype != np.uint8:
        raise ValueError("an AVIF or HEIF of a depth that is not told")
    size = data.find(b"\xff\x4f\xff\x51")  # of JPEG 2000: the depth of its samples is beyond the size
    if size >= 0:
        depth, is_signed = data[size + 42] % 128 + 1, data[size + 42] >= 128
        values = values.astype(np.int32) + (2 ** (depth - 1) if is_signed else 0)
        values = (values << 16 - depth).astype(np.uint16)
    return _over_white(values[0] if values.ndim == 4 else values)  # of an animation the first


def _by_sdl(data: bytes, suffix: str) -> Pixels:
    """Read by SDL_image, which tells some formats by the file's name alone."""
    import pygame

    surface = pygame.image.load(io.BytesIO(data), suffix)
    text = pygame.image.tobytes(surface, "RGBA")
    return _over_white(np.frombuffer(text, np.uint8).reshape(surface.get_height(), surface.get_width(), 4))


def _over_white(values: npt.NDArray[Any], *, premultiplied: bool = False) -> Pixels:
    """Bring [height, width] or [height, width, bands] of any type to RGB; the 2nd or 4th band is how opaque it is."""
    if not values.size:
        raise ValueError("no pixels")
    bands = _eight_bits(np.atleast_3d(values))
    if bands.shape[2] < 3:
        bands = np.concatenate([bands[..., :1]] * 3 + [bands[..., 1:]], axis=2)
    if bands.shape[2] == 3:
        return bands
    alpha = bands[..., 3:4].astype(np.uint16)
    colours = bands[..., :3] if premultiplied else (bands[..., :3] * alpha + 127) // 255
    whitened: Pixels = np.minimum(colours + (255 - alpha), 255).astype(np.uint8)
    return whitened


def _eight_bits(values: npt.NDArray[Any]) -> Pixels:
    """Bring values to 8 bits as qvsplit says: 16 bits by their high byte, all else from the least to the largest."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = finite.min(), finite.max()
    if values.dtype == np.uint16 or (values.dtype.kind in "ui" and low >= 0 and high <= 65535):
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
    stretched: Pixels = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return stretched
