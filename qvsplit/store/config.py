"""The extraction config: everything that decides the bytes of features; and the provenance of rows.

Rows may be used together, and a store may be continued, only under one `ExtractionConfig`. The model as it was named,
the device and the library versions are kept beside it as `Provenance`, which is shown and never compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.runtime.dtypes import DTYPE_BYTES, STORAGE_DTYPES
from qvsplit.runtime.versions import UNKNOWN, installed_version

_VIDEO_NUMBERS = ("fps", "max_frames", "num_frames", "max_pixels", "max_tokens", "clip_seconds")  # of `videos`
KERNELS = ("fused", "reference")
PREPARED_ON = ("cpu", "device")  # the first is not written down
VERSIONED = ("qvsplit", "torch", "torchvision", "transformers", "pillow")


def made_by_newer(where: str, what: str) -> ConfigError:
    """Give the error for a value that this version does not know: it is no damage."""
    return ConfigError(f"{where} was made by a newer qvsplit ({what}); upgrade this one")


@dataclass(frozen=True)
class ExtractionConfig:
    """Everything that decides the bytes of features.

    Attributes:
        family: The checkpoint's `model_type`.
        encoder: The encoder's fingerprint, 64 hex digits.
        processor: The image processor's settings with the limits in force (`min_pixels`, `max_pixels`) and the
            backend that resamples.
        compute_dtype: float32, bfloat16 or float16.
        storage_dtype: One of these, or int8.
        images: How a file becomes an upright RGB image (sources/images.py, sources/pixels.py).
        kernels: The forward pass: "reference", transformers' own, or "fused" (kernels/).
        videos: How a file becomes sampled frames, and what the video processor makes of them (docs/format.md); None
            where no video was encoded. That goes with any other: see `fits`.
    """

    family: str
    encoder: str
    processor: Mapping[str, Any]
    compute_dtype: str
    storage_dtype: str
    images: Mapping[str, str]
    kernels: str
    videos: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give it as it stands in a shard's metadata. Without videos it is what it was before there were any."""
        content = asdict(self)
        if self.videos is None:
            del content["videos"]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str) -> ExtractionConfig:
        """Read it from a shard's metadata.

        Raises:
            StoreDamaged: It is no extraction config.
            ConfigError: It has a field or a value that this version does not know.
        """
        if not isinstance(content, dict):
            raise _no_config(where)
        known = {field.name for field in fields(cls)}
        if unknown := content.keys() - known:
            raise made_by_newer(where, f"its extraction config has the unknown field {min(unknown)}")
        texts = ("family", "encoder", "compute_dtype", "storage_dtype", "kernels")
        if known - content.keys() - {"videos"} or any(not isinstance(content[name], str) for name in texts):
            raise _no_config(where)
        if not isinstance(content["processor"], dict) or not isinstance(content["images"], dict):
            raise _no_config(where)
        choices = {"compute_dtype": DTYPE_BYTES, "storage_dtype": STORAGE_DTYPES, "kernels": KERNELS}
        for name, allowed in choices.items():
            if content[name] not in allowed:
                raise made_by_newer(where, f"the unknown {name} {content[name]!r}")
        if (place := content["processor"].get("prepared_on", PREPARED_ON[1])) not in PREPARED_ON[1:]:
            raise made_by_newer(where, f"the unknown prepared_on {place!r}")
        if not _usable_processor(content["processor"]) or not _usable_videos(content.get("videos", {})):
            raise _no_config(where)
        return cls(**content)

    @property
    def prepared_on(self) -> str:
        """Where images were resized: on the "cpu", or on the encoder's "device"."""
        return str(self.processor.get("prepared_on", PREPARED_ON[0]))

    @property
    def merge_size(self) -> int:
        """Patches along each side of the square that becomes one token; 1 for a family that has none."""
        return int(self.processor.get("merge_size", 1))

    def patches_a_token(self, kind: str) -> int:
        """Give how many patches become one token of an item of this kind: some encoders merge frames as well."""
        own = (self.videos or {}).get("patches_a_token") if kind == "video" else None
        return int(own) if own is not None else self.merge_size_of(kind) ** 2

    def merge_size_of(self, kind: str) -> int:
        """Give `merge_size` for items of this kind: a video processor may have its own."""
        settings = (self.videos or {}).get("settings", {}) if kind == "video" else {}
        return int(settings.get("merge_size", self.merge_size))

    @property
    def has_pixel_limits(self) -> bool:
        """Whether the processor resizes between two numbers of pixels and merges patches: every image has a grid."""
        return {"merge_size", "min_pixels", "max_pixels"} <= self.processor.keys()

    def fits(self, other: ExtractionConfig) -> bool:
        """Say whether rows of the two may be used together: they are equal, or differ in that one knows no videos."""
        return not self.differences(other)

    def merged(self, other: ExtractionConfig) -> ExtractionConfig:
        """Give this config, with what `other`, which fits, knows of videos where this one knows nothing of them."""
        return self if self.videos is not None or other.videos is None else replace(self, videos=other.videos)

    def for_kinds(self, kinds: Iterable[str]) -> ExtractionConfig:
        """Give what decides the features of items of these kinds: what is said of videos decides those of no image."""
        return self if "video" in kinds else replace(self, videos=None)

    def differences(self, other: ExtractionConfig) -> list[str]:
        """List the fields in which `other` differs, each as `name: mine, not theirs`.

        What one says of videos is no difference where the other says nothing of them.
        """
        kinds = ("video",) if self.videos is not None and other.videos is not None else ()
        mine, theirs = (_flat(config.for_kinds(kinds).to_json()) for config in (self, other))
        return [
            f"{name}: {_short(mine.get(name))}, not {_short(theirs.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class Provenance:
    """Where rows came from.

    Attributes:
        model: As it was named.
        revision: Its commit on the hub.
        device: What computed: `cpu`, `cuda:0`, or several.
        versions: Of the libraries.
        adapter: What names the adapter that was merged into the encoder; None where none was.
        adapter_digest: What names all that it did to the encoder.
    """

    model: str
    revision: str | None
    device: str
    versions: Mapping[str, str]
    adapter: str | None = None
    adapter_digest: str | None = None

    @property
    def device_types(self) -> frozenset[str]:
        """The kinds of device that computed: `cuda` for any of several."""
        return frozenset(kind for one in self.device.split(",") if (kind := one.strip().partition(":")[0]))

    @property
    def id(self) -> str:
        """16 hex digits that name this content: shards of several runs keep one entry for each."""
        content = [self.model, self.revision, self.device, sorted(self.versions.items())]
        content += [self.adapter, self.adapter_digest] if self.adapter is not None else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Give it as it stands in a shard's metadata. Without an adapter it is what it was before there were any."""
        content = asdict(self)
        if self.adapter is None:
            del content["adapter"], content["adapter_digest"]
        return {"id": self.id, **content}

    @classmethod
    def from_json(cls, content: Any) -> Provenance:
        """Read it from a shard's metadata; what is missing or of the wrong type stays empty: nothing depends on it."""
        given = content if isinstance(content, dict) else {}
        versions = given.get("versions")
        known = {name: given.get(name) for name in ("revision", "adapter", "adapter_digest")}
        return cls(
            model=str(given.get("model", "")),
            device=str(given.get("device", "")),
            versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
            **{name: value if isinstance(value, str) else None for name, value in known.items()},
        )


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Give the versions of Python and of the libraries that touch pixels or numbers, without importing them."""
    import platform

    return {"python": platform.python_version()} | {name: installed_version(name) or UNKNOWN for name in VERSIONED}


def _no_config(where: str) -> StoreDamaged:
    return StoreDamaged(
        f"{where} has no usable extraction config in its metadata; it was not written by qvsplit, or is damaged"
    )


def _usable_processor(settings: Mapping[str, Any]) -> bool:
    """Say whether what is read of a processor's settings can be: how patches merge, and pixel limits, both or none."""
    if "merge_size" not in settings:
        return True
    limits = [settings[name] for name in ("min_pixels", "max_pixels") if name in settings]
    return len(limits) != 1 and all(type(one) is int for one in limits) and _is_merge_size(settings["merge_size"])


def _usable_videos(videos: Any) -> bool:
    """Say whether what is read of videos can be: how patches merge, and what holds tensors."""
    if videos is None:
        return True
    if not isinstance(videos, dict):
        return False
    settings, containers = videos.get("settings", {}), videos.get("containers", {})
    if not isinstance(settings, dict) or not isinstance(containers, dict):
        return False
    numbers = [videos[name] for name in _VIDEO_NUMBERS if videos.get(name) is not None]
    if not all(type(one) in (int, float) and 0 < one < 1 << 40 for one in numbers):
        return False
    merged = videos.get("patches_a_token", 1)
    sound = ("merge_size" not in settings or _is_merge_size(settings["merge_size"])) and type(merged) is int
    return sound and 1 <= merged <= 64**3 and all(isinstance(one, str) for one in containers.values())


def _is_merge_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 64


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
