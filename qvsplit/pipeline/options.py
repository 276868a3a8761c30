"""Options of an extraction, and whether they can be, for any store or for this one."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

from qvsplit.errors import ConfigError, UsageError, some_of
from qvsplit.models.sampling import FPS, MAX_FRAMES, Sampling, VideoOptions
from qvsplit.runtime import arguments
from qvsplit.runtime.dtypes import DTYPE_BYTES, STORAGE_DTYPES
from qvsplit.sources.decoder import ITEM_SECONDS
from qvsplit.sources.images import IMAGE_POLICY, MAX_IMAGE_PIXELS
from qvsplit.store.config import KERNELS, PREPARED_ON, ExtractionConfig, Provenance

SHORTEST_ITEM_SECONDS = 0.1
MAX_SAMPLED = 8_000  # frames of one clip: their numbers go into its row
GIFS = ("image", "video")
LOCAL_RAY, ANY_RAY = "local", "auto"  # clusters that need no address
# options of videos → their names in the extraction config's `videos`
VIDEO_OPTIONS = {
    "fps": "fps", "max_frames": "max_frames", "num_frames": "num_frames", "video_max_pixels": "max_pixels",
    "video_max_tokens": "max_tokens", "clip_seconds": "clip_seconds", "gif": "gif",
}  # fmt: skip
_TEXTS = (
    "model", "adapter", "device", "dtype", "storage_dtype", "kernels", "prepare_on", "gif", "ray", "ray_encoders",
)  # fmt: skip
_FLAGS = ("videos", "prune", "retry_failed", "checksum", "rebuild", "wait", "dry_run")


@dataclass(frozen=True)
class ExtractOptions:
    """Options of an extraction. None is the store's own where there is one, else the default.

        options = qvsplit.ExtractOptions(model="Qwen/Qwen2-VL-2B-Instruct", storage_dtype="bfloat16")
        qvsplit.extract_files("photos", out="embeds", options=options)

    Attributes:
        model: A checkpoint's folder or hub name, with a revision behind an `@`.
        adapter: A PEFT adapter's folder or hub name, likewise: merged into the encoder.
        device: cpu, cuda or cuda:N, or several with commas between them.
        dtype: In which to compute.
        storage_dtype: In which to store: a dtype, or int8.
        min_pixels: Smaller images are scaled up to this many pixels.
        max_pixels: Larger images are scaled down to this many pixels.
        workers: Threads that read, each with a decoder process of its own.
        patch_budget: Patches in one forward pass.
        kernels: The forward pass: "reference" or "fused".
        prepare_on: Where images are resized: on the "cpu", or the encoder's "device", in float32, where some pixels
            become others.
        videos: Take videos as well; else a walk leaves them out.
        exclude: Leave out what these patterns match: a text, or several, each as in a .gitignore, relative to every
            folder that is given.
        fps: Frames of a video that are looked at, a second.
        max_frames: At most so many of one clip.
        num_frames: So many of every clip, whatever its length, in place of `fps`.
        video_max_pixels: Larger frames are scaled down to this many pixels.
        video_max_tokens: Frames are scaled down until a clip makes at most this many tokens.
        clip_seconds: Cut videos into clips of so many seconds, each with a row of its own; 0 leaves them whole.
        gif: Whether a GIF is an "image", its first frame, or a "video".
        prune: Mark items deleted whose file no longer exists.
        retry_failed: Try again what failed before.
        checksum: Read every file again, whatever its size and version say.
        rebuild: Make the store again, under another extraction config if need be.
        wait: Wait for another run to end.
        limit: Items that are read in this run.
        max_runtime: Seconds after which no further item is begun.
        item_timeout: Seconds for each step of an item: to be read, to be decoded.
        max_image_pixels: An image of more pixels is not decoded, and fails.
        dry_run: Change nothing; say what it would take.
        ray: Run on a Ray cluster: "local" starts one on this machine, "auto" joins the one that it belongs to,
            HOST:PORT that of a head.
        ray_encoders: How many encoders there are on it at a time, as N or MIN:MAX.
    """

    model: str | None = None
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    storage_dtype: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    workers: int | None = None
    patch_budget: int | None = None
    kernels: str | None = None
    prepare_on: str | None = None
    videos: bool = True
    exclude: str | Sequence[str] = ()
    fps: float | None = None
    max_frames: int | None = None
    num_frames: int | None = None
    video_max_pixels: int | None = None
    video_max_tokens: int | None = None
    clip_seconds: float | None = None
    gif: str | None = None
    prune: bool = False
    retry_failed: bool = False
    checksum: bool = False
    rebuild: bool = False
    wait: bool = False
    limit: int | None = None
    max_runtime: float | None = None
    item_timeout: float = ITEM_SECONDS
    max_image_pixels: int = MAX_IMAGE_PIXELS
    dry_run: bool = False
    ray: str | None = None
    ray_encoders: str | None = None

    def __post_init__(self) -> None:
        """Take a path as a model's name or an adapter's, too, and one pattern for several."""
        for name in ("model", "adapter"):
            place: Any = getattr(self, name)
            if isinstance(place, PathLike):
                object.__setattr__(self, name, fspath(place))
        exclude: Any = self.exclude
        if isinstance(exclude, str | list):
            object.__setattr__(self, "exclude", (exclude,) if isinstance(exclude, str) else tuple(exclude))


def check_options(options: ExtractOptions) -> None:
    """Refuse, before anything is loaded, what no store can be made with. Raises UsageError."""
    arguments.instance_of("options", options, ExtractOptions, "ExtractOptions")
    arguments.check_texts("a text", {name: getattr(options, name) for name in _TEXTS})
    arguments.check_flags({name: getattr(options, name) for name in _FLAGS})
    if not isinstance(options.exclude, Sequence) or not all(isinstance(one, str) for one in options.exclude):
        raise arguments.wrong("exclude", options.exclude, "a pattern, or several")
    choices = {
        "dtype": tuple(DTYPE_BYTES), "storage_dtype": STORAGE_DTYPES, "kernels": KERNELS, "prepare_on": PREPARED_ON,
    }  # fmt: skip
    for name, known in choices.items():
        if getattr(options, name) is not None:
            arguments.check_one_of(name, getattr(options, name), known)
    for name in ("workers", "patch_budget", "limit", "min_pixels", "max_pixels", "max_image_pixels"):
        if getattr(options, name) is not None:
            arguments.check_number(name, getattr(options, name), least=1)
    _check_videos(options)
    if options.max_runtime is not None:
        arguments.check_number("max_runtime", options.max_runtime, least=0, whole=False)
    arguments.check_number("item_timeout", options.item_timeout, least=SHORTEST_ITEM_SECONDS, whole=False)
    _check_ray(options)
    if options.checksum and (options.limit is not None or options.max_runtime is not None):
        raise UsageError("`checksum` reads everything again: `limit` or `max_runtime` would end it at the same place")


def _check_ray(options: ExtractOptions) -> None:
    address = options.ray
    if encoders_of(options) is not None and address is None:
        raise UsageError("`ray_encoders` is of a Ray cluster: give `ray` as well")
    if address is None:
        return
    if address.startswith("ray://"):
        raise UsageError(
            f"`ray` {address}: a Ray client is not on a node of the cluster, and cannot commit shards there; run "
            "qvsplit on a node, by `ray job submit` for instance, with `ray=auto`"
        )
    if address not in {LOCAL_RAY, ANY_RAY} and not re.fullmatch(r".+:[0-9]{1,5}", address):
        raise UsageError(f"`ray` {address}: give local, auto, or HOST:PORT of a cluster's head")
    if importlib.util.find_spec("ray") is None:
        raise UsageError("`ray` needs Ray; install it with `pip install 'qvsplit[ray]'`")


def encoders_of(options: ExtractOptions) -> tuple[int, int] | None:
    """Give the least and the most encoders on a cluster; None where that is left open. UsageError if it cannot be."""
    text = options.ray_encoders
    if text is None:
        return None
    least, colon, most = text.partition(":")
    try:
        numbers = int(least), int(most if colon else least)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise UsageError(f"`ray_encoders` {text}: give a number, or MIN:MAX, from 1 on")
    return numbers


def _check_videos(options: ExtractOptions) -> None:
    for name in ("max_frames", "num_frames"):
        if (number := getattr(options, name)) is not None:
            arguments.check_number(name, number, least=1)
            if number > MAX_SAMPLED:
                raise UsageError(
                    f"`{name}` must be at most {MAX_SAMPLED}; `clip_seconds` cuts a video into several clips"
                )
    for name in ("video_max_pixels", "video_max_tokens"):
        if getattr(options, name) is not None:
            arguments.check_number(name, getattr(options, name), least=1)
    for name, least in (("fps", 0.001), ("clip_seconds", 0)):
        if getattr(options, name) is not None:
            arguments.check_number(name, getattr(options, name), least=least, whole=False)
    if options.gif is not None:
        arguments.check_one_of("gif", options.gif, GIFS)
    if options.fps is not None and options.num_frames is not None:
        raise UsageError("`fps` and `num_frames` say the same in two ways: give one of them")


def check_against(options: ExtractOptions, config: ExtractionConfig, store: str) -> None:
    """Refuse, before anything is loaded, what this store cannot be continued with. Raises ConfigError."""
    asked = {
        "`dtype`": (options.dtype, config.compute_dtype),
        "`storage_dtype`": (options.storage_dtype, config.storage_dtype),
        "`kernels`": (options.kernels, config.kernels),
        "`prepare_on`": (options.prepare_on, config.prepared_on),
        "`min_pixels`": (options.min_pixels, config.processor.get("min_pixels")),
        "`max_pixels`": (options.max_pixels, config.processor.get("max_pixels")),
    }
    if config.videos is not None:
        for name, own_name in VIDEO_OPTIONS.items():
            asked[f"`{name}`"] = (getattr(options, name), config.videos.get(own_name) or _nothing(name))
    rules = config.images
    if other := [name for name in sorted({*rules, *IMAGE_POLICY}) if rules.get(name) != IMAGE_POLICY.get(name)]:
        raise ConfigError(
            f"{store} was made when image files became pixels by other rules ({some_of(other)}); make it again with "
            "`rebuild=True`, or choose another store"
        )
    wrong = [f"{name} {wanted} instead of {own}" for name, (wanted, own) in asked.items() if wanted not in {None, own}]
    if wrong:
        raise ConfigError(
            f"{store} was made under another extraction config ({some_of(wrong)}); leave that out, choose another "
            "store, or make this one again with `rebuild=True`"
        )


def _nothing(name: str) -> int | None:
    """Give how a caller asks for none: of clips, 0 seconds."""
    return 0 if name == "clip_seconds" else None


def with_videos_of(config: ExtractionConfig | None, options: ExtractOptions) -> ExtractOptions:
    """Give `options`, and where they leave open how videos are looked at, what the store says of that."""
    if config is None or config.videos is None:
        return options
    own: dict[str, Any] = {name: config.videos.get(own_name) for name, own_name in VIDEO_OPTIONS.items()}
    if options.fps is not None or options.num_frames is not None:
        own["fps"] = own["num_frames"] = None
    return replace(options, **{name: value for name, value in own.items() if getattr(options, name) is None})


def video_options(options: ExtractOptions) -> VideoOptions:
    """Give what the encoder has to know of videos."""
    sampling = Sampling(
        options.fps or FPS, options.max_frames or MAX_FRAMES, options.num_frames, options.clip_seconds or None
    )
    return VideoOptions(sampling, options.video_max_pixels, options.video_max_tokens, options.gif or GIFS[0])


def like(config: ExtractionConfig, provenance: Provenance, options: ExtractOptions) -> ExtractOptions:
    """Give `options`, and where they leave it open what the store was made with."""
    model = provenance.model if provenance.revision is None else f"{provenance.model}@{provenance.revision}"
    storage = None if config.storage_dtype == config.compute_dtype else config.storage_dtype
    return replace(
        with_videos_of(config, options),
        model=options.model or model,
        adapter=options.adapter or (provenance.adapter if options.model is None else None),
        dtype=options.dtype or config.compute_dtype,
        storage_dtype=options.storage_dtype or storage,
        kernels=options.kernels or config.kernels,
        prepare_on=options.prepare_on or config.processor.get("prepared_on"),
        min_pixels=options.min_pixels or config.processor.get("min_pixels"),
        max_pixels=options.max_pixels or config.processor.get("max_pixels"),
    )
