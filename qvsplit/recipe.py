"""The recipe: everything that decides an embedding's bytes, and where a row came from.

Two rows may be asked together, and an album may be continued, only under one `Recipe`. What a row's maker was
called, on which device and with which library versions is kept beside it, as `Made`: told, not compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qvsplit.errors import AlbumDamaged, RecipeError

FORMAT_VERSION = 1
KERNELS = ("fused", "reference")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# int8: each token as whole numbers from -127 to 127, times a float32 of its own
STORED_DTYPES = (*DTYPE_BYTES, "int8")
SCALE_BYTES = 4

# How a file becomes an upright RGB picture; see images.py. A change of behaviour there is a change here.
PICTURE_POLICY: Mapping[str, str] = {
    "orientation": "exif",
    "transparency": "over white",
    "colour_profile": "ignored",
    "animation": "first frame",
    "deep_colour": "high byte; 32-bit greys stretched",
}

VERSIONED = ("qvsplit", "torch", "torchvision", "transformers", "pillow")


def token_bytes(stored_dtype: str, hidden_size: int) -> int:
    """What one token takes before compression."""
    return hidden_size + SCALE_BYTES if stored_dtype == "int8" else hidden_size * DTYPE_BYTES[stored_dtype]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of `embeds`.

    `processor` holds the image processor's settings with the pixel limits in force (`min_pixels`, `max_pixels`)
    and the resampling backend; `tower` is the fingerprint of weights.py.
    """

    family: str
    tower: str
    processor: Mapping[str, Any]
    compute_dtype: str
    stored_dtype: str
    pictures: Mapping[str, str]
    format: int = FORMAT_VERSION
    kernels: str = "reference"  # the forward pass: transformers' own, or "fused" (tower.py)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a shard's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, where: str) -> Recipe:
        """From a shard's metadata. AlbumDamaged if it is not a recipe, RecipeError if of a newer format."""
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT_VERSION:
            raise RecipeError(
                f"{where} is of format {content['format']}, and this qvsplit reads up to {FORMAT_VERSION}; upgrade it"
            )
        try:
            recipe = cls(**content)
            sound = (
                recipe.format == FORMAT_VERSION
                and all(isinstance(text, str) for text in (recipe.family, recipe.tower))
                and isinstance(recipe.processor, dict)
                and isinstance(recipe.pictures, dict)
                and recipe.kernels in KERNELS
                and recipe.compute_dtype in DTYPE_BYTES
                and recipe.stored_dtype in STORED_DTYPES
                and all(
                    isinstance(recipe.processor.get(name), int) for name in ("merge_size", "min_pixels", "max_pixels")
                )
                and 1 <= recipe.processor["merge_size"] <= 64
            )
        except TypeError:
            sound = False
        if not sound:
            raise AlbumDamaged(
                f"{where} has no usable recipe in its metadata; it was not written by qvsplit, or damaged"
            )
        return recipe

    @property
    def merge_size(self) -> int:
        """Patches along each side of the square that becomes one token."""
        return int(self.processor["merge_size"])

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which `other` differs, each as `name: mine, not theirs`."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return [
            f"{name}: {_short(mine.get(name))}, not {_short(theirs.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class Made:
    """Where rows came from: the model as it was named, the device, the libraries."""

    model: str
    revision: str | None
    device: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a shard's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Made:
        """From a shard's metadata; what is missing or of the wrong type is left blank, as nothing depends on it."""
        told = content if isinstance(content, dict) else {}
        versions = told.get("versions")
        revision = told.get("revision")
        return cls(
            model=str(told.get("model", "")),
            revision=revision if isinstance(revision, str) else None,
            device=str(told.get("device", "")),
            versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        )


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Versions of Python and of the libraries that touch pixels or numbers, without importing them."""
    import platform
    from importlib import metadata

    return {"python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONED}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
