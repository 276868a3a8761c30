"""A fake of the Encoder door: features that are a function of the pixels, without a model. And what loads it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from qvsplit.errors import ItemError
from qvsplit.models.encoder import Cancelled, Clips, Encoded
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import Clip, VideoOptions
from qvsplit.pipeline.devices import Loaded, StoreDeclares
from qvsplit.pipeline.encoding import Devices, DeviceWorker
from qvsplit.pipeline.options import ExtractOptions, video_options, with_videos_of
from qvsplit.pipeline.stages import Encode, Prepare, Quantize
from qvsplit.pipeline.summary import Summary
from qvsplit.runtime.loading import OnLoad, nobody
from qvsplit.sources.images import IMAGE_POLICY
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.config import ExtractionConfig, Provenance
from qvsplit.store.features import POOLER_OUTPUT, TensorSpec
from qvsplit.store.schema import ShardSchema

NAME = "fake"  # as the model of an extraction
WIDTH = 12  # values a token: the three colours of its four patches
TOKEN_PIXELS = 56  # along each side
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


def fake_config(storage_dtype: str = "float32", kernels: str = "fused", **processor: int) -> ExtractionConfig:
    """The extraction config of a FakeEncoder."""
    limits = {"merge_size": 2, "patch_size": 14, "min_pixels": 3136, "max_pixels": 1003520}
    return ExtractionConfig(
        family="qwen2_vl", encoder="f" * 64, processor=limits | processor, compute_dtype="float32",
        storage_dtype=storage_dtype, images=dict(IMAGE_POLICY), kernels=kernels,
    )  # fmt: skip


@dataclass(frozen=True)
class FakePreparer:
    """Takes one pixel a patch."""

    def prepare(self, image: np.ndarray) -> Prepared:
        """Take uint8 [height, width, 3]; give patches in the order in which four of them are a token."""
        height, width = image.shape[:2]
        if max(height, width) > 200 * min(height, width):
            raise ItemError(f"is {width}×{height}, too slim")
        h, w = (2 * max(1, round(side / TOKEN_PIXELS)) for side in (height, width))
        rows, columns = ((np.arange(n) * side + side // 2) // n for n, side in ((h, height), (w, width)))
        pixels = torch.from_numpy(image[rows][:, columns].copy())  # [h, w, 3]
        patches = pixels.view(h // 2, 2, w // 2, 2, 3).permute(0, 2, 1, 3, 4).reshape(h * w, 3)
        return Prepared({"pixels": patches}, h * w // 4, h * w, ((IMAGE_TOKEN, h * w // 4),), (1, h, w))


@dataclass(frozen=True)
class FakeClipPreparer:
    """Takes every frame of a video, each as a slice of its own."""

    clip_seconds: float | None
    in_slices: bool = True

    def clips(self, info: VideoInfo) -> list[Clip]:
        """Cut it into clips of so many seconds."""
        if self.clip_seconds is None:
            return [Clip(0, None, None, info.n_frames, info.fps, tuple(range(info.n_frames)))]
        each = round(self.clip_seconds * info.fps)
        starts = range(0, info.n_frames, each)
        return [
            Clip(part, start / info.fps, min(start + each, info.n_frames) / info.fps, each, info.fps,
                 tuple(range(start, min(start + each, info.n_frames))))
            for part, start in enumerate(starts)
        ]  # fmt: skip

    def outline(self, clip: Clip, info: VideoInfo) -> Prepared:
        """Say how many tokens it will have."""
        frame = FakePreparer().prepare(np.zeros((info.height, info.width, 3), np.uint8))
        return replace(frame, n_tokens=frame.n_tokens * len(clip.indices), kind="video")

    def prepare(self, clip: Clip, info: VideoInfo, frames: Iterator[np.ndarray], patch_budget: int):
        """Give one slice a frame."""
        n_tokens = self.outline(clip, info).n_tokens
        for number, frame in enumerate(islice(frames, len(clip.indices))):
            placeholder = ((VIDEO_TOKEN, n_tokens),) if number == 0 else ()
            yield replace(FakePreparer().prepare(frame), placeholder=placeholder, kind="video")


@dataclass
class FakeEncoder:
    """An Encoder whose features are the pixels themselves: the same bits in whatever batch."""

    config: ExtractionConfig = field(default_factory=fake_config)
    on_encode: Callable[[Sequence[Prepared]], None] = lambda batch: None
    preparer: FakePreparer = FakePreparer()
    videos: VideoOptions = field(default_factory=VideoOptions)

    def __post_init__(self):
        self._cancelled = threading.Event()

    @property
    def tensors(self):
        return (TensorSpec(POOLER_OUTPUT, self.config.storage_dtype, WIDTH),)

    def encode(self, batch):
        self.on_encode(batch)
        if self._cancelled.is_set():
            raise Cancelled
        return [
            Encoded(
                {POOLER_OUTPUT: one.values["pixels"].float().view(-1, WIDTH) / 255}, one.grid_thw, one.placeholder,
                kind=one.kind,
            )
            for one in batch
        ]  # fmt: skip

    def load_clips(self):
        how = self.videos.sampling
        videos = {"containers": {}, "fps": how.fps, "clip_seconds": how.clip_seconds, "gif": self.videos.gif}
        return Clips(FakeClipPreparer(how.clip_seconds), replace(self.config, videos=videos))

    def cancel(self):
        self._cancelled.set()


def fake_devices(encoder: FakeEncoder, *, workers: int = 1, patch_budget: int = 500) -> Devices:
    """Devices that all work with `encoder`."""
    quantize = Quantize(encoder.config, encoder.tensors)
    lanes = [DeviceWorker(Encode(functools.partial(FakeEncoder), encoder), quantize) for _ in range(workers)]
    return Devices(encoder, Prepare(encoder.preparer), lanes, patch_budget, encoder.tensors)


class FakeModel:
    """Stands in for `load_devices`.

    Attributes:
        on_encode: Called with each batch, in the device worker's thread, before it is encoded.
        batches: The patches of each item of each batch, in the order in which they were encoded.
        loads: How many times it was loaded.
    """

    def __init__(self, seconds: float = 0.0):
        self.on_encode: Callable[[Sequence[Prepared]], None] = lambda batch: None
        self.seconds = seconds  # that each batch takes
        self.batches: list[list[int]] = []
        self.loads = 0

    def load_devices(
        self,
        options: ExtractOptions,
        own: StoreDeclares,
        summary: Summary,
        on_note: Callable[[str], None],
        on_load: OnLoad = nobody,
    ) -> Loaded:
        """Make an encoder by the options, else by the store, else by default."""
        self.loads += 1
        limits = {name: getattr(options, name) for name in ("min_pixels", "max_pixels") if getattr(options, name)}
        config = own.config or fake_config(options.storage_dtype or "float32", options.kernels or "fused", **limits)
        config = replace(config, videos=None)
        encoder = FakeEncoder(config, self._encoding, videos=video_options(with_videos_of(own.config, options)))
        summary.model, summary.patch_budget = NAME, options.patch_budget or 500
        workers = len((options.device or "cpu").split(","))
        provenance = Provenance(NAME, None, options.device or "cpu", {})
        return Loaded(
            fake_devices(encoder, workers=workers, patch_budget=summary.patch_budget),
            ShardSchema(config, encoder.tensors, (provenance,)),
        )

    def _encoding(self, batch: Sequence[Prepared]) -> None:
        self.batches.append([one.patches for one in batch])
        time.sleep(self.seconds)
        self.on_encode(batch)


def install(seconds: float = 0.0) -> FakeModel:
    """Have every extraction of this process use the fake encoder, and decode in its own threads, from now on."""
    from qvsplit.pipeline import execution, runner
    from tests.support.fake_source import InThreadDecoders

    model = FakeModel(seconds)
    execution.load_devices = model.load_devices
    runner.DecoderPool = InThreadDecoders
    return model
