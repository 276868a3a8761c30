"""What a run would take, without doing it: items, tokens, bytes on disk, seconds. From headers and packets alone.

Sizes are read by decoders as in a real run, so that a hostile header is no danger here either. Seconds come from what
this store's last runs took; where it has had none, from the encoder's arithmetic and a matrix product timed now.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from qvsplit.checkpoints import hf
from qvsplit.checkpoints.adapter import open_adapter
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.families import FAMILIES
from qvsplit.checkpoints.opening import default_model, read_settings
from qvsplit.errors import ItemError, ModelError
from qvsplit.models.clips import ClipPreparer, load_clip_preparer
from qvsplit.models.device_preparing import on_device
from qvsplit.models.encoder_shape import shape_of
from qvsplit.models.preparing import (
    Prepared,
    check_kernels,
    check_shape,
    has_pixel_limits,
    load_preparer,
    pixel_limits,
)
from qvsplit.pipeline.devices import note_adapter_for_questions
from qvsplit.pipeline.options import ExtractOptions, video_options, with_videos_of
from qvsplit.pipeline.summary import Preview
from qvsplit.runtime.cpus import default_workers
from qvsplit.runtime.devices import is_cuda
from qvsplit.runtime.dtypes import STORED_SHARE, token_bytes
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.source import Entry
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.config import PREPARED_ON
from qvsplit.store.history import last_runs
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store

_FORWARD_SHARE = 0.8  # of the rate of a matrix product that the encoder's forward reaches on a CPU
_NO_CLIPS = object()  # the model takes no videos
_TRIED_SIZES = ((120, 160), (400, 900), (333, 111))  # height and width, on which a processor's own count is tried


def preview(
    entries: Sequence[Entry],
    store: Store,
    storage: Storage,
    options: ExtractOptions,
    on_note: Callable[[str], None],
) -> Preview:
    """Say what it would take to encode `entries` into `store`.

    ModelError where an adapter is named that cannot be opened; `on_note` hears of one that changes nothing.
    """
    if not entries:
        return Preview(0, 0, 0, 0, 0.0, "")
    estimate = _Estimate(store, options)
    if options.adapter is not None:
        adapter = open_adapter(options.adapter)
        if estimate.checkpoint is not None and not adapter.names_of(estimate.checkpoint.family, "encoder"):
            note_adapter_for_questions(options.adapter, on_note)
    gifs_are_videos = with_videos_of(store.config, options).gif == "video"
    decoders = DecoderPool(
        options.item_timeout, gifs_are_videos=gifs_are_videos, max_image_pixels=options.max_image_pixels
    )

    def tokens(entry: Entry) -> list[int] | None:
        """Count an item's tokens: of an image, or of each temporal step of a video. None if it is bad."""
        try:
            info = decoders.mine().read(entry)
            if info.kind == "video":
                return estimate.video_tokens(decoders.mine().scan(entry, info))
            return [estimate.tokens(*decoders.mine().measure(entry, info))]
        except ItemError:
            return None

    with ThreadPoolExecutor(options.workers or default_workers(), "qvsplit-headers") as pool:
        try:
            counted = list(pool.map(tokens, entries))
        finally:
            decoders.close()
    sound = [count for item in counted if item is not None for count in item]
    bad = counted.count(None)
    if not estimate.counts_tokens:
        return Preview(len(counted), bad, None, None, None, "")
    size = None
    if estimate.token_bytes is not None:
        size = round(sum(sound) * estimate.token_bytes * _ratio(store, estimate.storage_dtype))
    seconds, by = _seconds_by_runs(storage, sum(sound)), "earlier runs"
    if seconds is None:
        seconds, by = estimate.seconds_by_arithmetic(sound), "arithmetic"
    return Preview(len(counted), bad, sum(sound), size, seconds, by if seconds is not None else "")


def resized(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Give height and width after the processor's resizing: multiples of `factor`, within the limits, about as slim.

    The rule is Qwen2-VL's (smart_resize in transformers' image_processing_qwen2_vl), against which tests hold it.
    """
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


class _Estimate:
    """What decides how many tokens an image has, and their bytes: the store's settings, else the checkpoint's.

    Attributes:
        token_bytes: Bytes of one token before compression, of all its tensors; None where nothing says.
    """

    def __init__(self, store: Store, options: ExtractOptions) -> None:
        self.options = options
        self._counting = threading.Lock()  # sizes are measured in several threads
        self._counter: TokenCounter | None = None
        self._clips: ClipPreparer | object | None = None
        self._config = None if options.rebuild else store.config
        own = None if options.rebuild else store.config
        self._own: Mapping[str, Any] = own.processor if own is not None else {}
        made_with = store.provenance.model if store.provenance else ""
        name = made_with if own is not None else options.model or made_with or default_model()
        self.checkpoint: Checkpoint | None = None
        with suppress(ModelError):
            self.checkpoint = read_settings(name)
        if own is not None:
            self.family, self.processor = own.family, own.processor
            self.token_bytes, self.storage_dtype = store.token_bytes, own.storage_dtype
            return
        if self.checkpoint is None:
            self.checkpoint = read_settings(name)  # says why it cannot be had
        check_kernels(options.kernels, self.checkpoint.family)
        if options.prepare_on == PREPARED_ON[1]:
            on_device(load_preparer(self.checkpoint, hf.load_config(self.checkpoint), min_pixels=None, max_pixels=None))
        self.family = self.checkpoint.family.model_type
        limits = _limits(self.checkpoint, options) if self._settings_suffice else {}
        self.processor = dict(self.checkpoint.processor_settings) | limits
        computed = options.dtype or ("bfloat16" if is_cuda(options.device) else "float32")
        self.storage_dtype = options.storage_dtype or computed
        width, tensors = self.checkpoint.width, self.checkpoint.tensors_a_token
        self.token_bytes = None if width is None else tensors * token_bytes(self.storage_dtype, width)

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens can be counted: by settings that are listed for the family, else by the model's processor."""
        return self._settings_suffice or self.checkpoint is not None

    @property
    def _settings_suffice(self) -> bool:
        family = FAMILIES.get(self.family)
        return family is not None and family.processor_settings is not None

    def tokens(self, width: int, height: int) -> int:
        """Count those of an image of this size; 0 where nothing counts them.

        ItemError where the processor refuses such a shape.
        """
        if self.checkpoint is not None:
            check_shape(width, height, self.checkpoint.family)
        if not self._settings_suffice:
            return 0 if self.checkpoint is None else self._tokens_by_processor(self.checkpoint, width, height)
        factor = int(self.processor["patch_size"]) * int(self.processor["merge_size"])
        tall, wide = resized(
            height, width, factor, int(self.processor["min_pixels"]), int(self.processor["max_pixels"])
        )
        return tall * wide // factor**2

    def _tokens_by_processor(self, checkpoint: Checkpoint, width: int, height: int) -> int:
        """Ask the checkpoint's own processor, which for a family without listed settings is all that knows."""
        with self._counting:
            if self._counter is None:
                asked = {"min_pixels": self.options.min_pixels, "max_pixels": self.options.max_pixels}
                limits = {name: self._own.get(name) if limit is None else limit for name, limit in asked.items()}
                self._counter = TokenCounter(checkpoint, **limits)
            return self._counter.tokens(width, height)

    def video_tokens(self, video: VideoInfo) -> list[int]:
        """Count those of each temporal step of a video. ItemError where the model takes no such video, or none."""
        if not self.options.videos:
            raise ItemError("is a video, and videos are left out")
        if self.checkpoint is None:
            return []
        with self._counting:
            if self._clips is None:
                self._clips = self._loaded_clips(self.checkpoint)
        if self._clips is _NO_CLIPS:
            raise ItemError("is a video, and the model takes none")
        assert isinstance(self._clips, ClipPreparer)
        return [tokens for clip in self._clips.clips(video) for tokens in self._steps(self._clips.outline(clip, video))]

    def _loaded_clips(self, checkpoint: Checkpoint) -> ClipPreparer | object:
        preparer = load_preparer(checkpoint, hf.load_config(checkpoint), min_pixels=None, max_pixels=None)
        try:
            return load_clip_preparer(checkpoint, preparer, video_options(with_videos_of(self._config, self.options)))
        except ModelError:
            return _NO_CLIPS

    @staticmethod
    def _steps(outline: Prepared) -> list[int]:
        steps = outline.grid_thw[0] if outline.grid_thw is not None else 1
        return [outline.n_tokens // steps] * steps

    def seconds_by_arithmetic(self, tokens: Sequence[int]) -> float | None:
        """Divide the encoder's multiplications by the rate of a float32 product, timed now. None where not known."""
        if self.checkpoint is None or not self.checkpoint.family.fused_kernels or is_cuda(self.options.device):
            return None  # the layers of other families are others
        shape = shape_of(self.checkpoint.vision_settings, self.checkpoint.folder)
        work = sum(shape.flops(count * shape.merge**2) for count in tokens)
        return work / (_matrix_rate() * _FORWARD_SHARE)


def _limits(checkpoint: Checkpoint, options: ExtractOptions) -> dict[str, int]:
    """Give the pixel limits that a run would have, by the checkpoint's files. UsageError as the run would raise it."""
    settings, (low, high) = checkpoint.processor_settings, checkpoint.pixel_limits
    processor = SimpleNamespace(
        size={"shortest_edge": low, "longest_edge": high},
        patch_size=settings["patch_size"],
        merge_size=settings["merge_size"],
    )
    limits = pixel_limits(processor, checkpoint.family, options.min_pixels, options.max_pixels)
    assert limits is not None, "a processor with these sizes has limits"
    return {"min_pixels": limits[0], "max_pixels": limits[1]}


class TokenCounter:
    """Counts the tokens of images by their sizes, as a checkpoint's own processor would make them.

    Args:
        checkpoint: Its config and its processor's files must be on this disk.
        min_pixels: None: as `extract` has it where nobody says.
        max_pixels: None: likewise.

    Raises:
        ModelError: There is no processor, or it cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        self._preparer = load_preparer(
            checkpoint, hf.load_config(checkpoint), min_pixels=min_pixels, max_pixels=max_pixels
        )
        self._known: dict[tuple[int, int], int] = {}
        # some count marks as well, and some have no such method
        self._is_fast = all(self._by_method(*size) == self._by_preparing(*size) for size in _TRIED_SIZES)

    @property
    def pixel_limits(self) -> tuple[int, int] | None:
        """The fewest and the most pixels that images are resized to; None where the processor has no such limits."""
        own = self._preparer.processor.image_processor
        return (int(own.size["shortest_edge"]), int(own.size["longest_edge"])) if has_pixel_limits(own) else None

    def tokens(self, width: int, height: int) -> int:
        """Count those of an image of this size. ItemError where the processor refuses it."""
        size = height, width
        if size not in self._known:
            counted = self._by_method(*size) if self._is_fast else None
            self._known[size] = self._by_preparing(*size) if counted is None else counted
        return self._known[size]

    def _by_method(self, height: int, width: int) -> int | None:
        """Ask the method that transformers has for this; None where it does not answer."""
        try:
            counted = self._preparer.processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
            return int(counted["num_image_tokens"][0])
        except Exception:  # a method that nothing else depends on: then an image is prepared, which says what is wrong
            return None

    def _by_preparing(self, height: int, width: int) -> int:
        """Prepare a grey image of this size."""
        import numpy as np

        return self._preparer.prepare(np.full((height, width, 3), 128, np.uint8)).n_tokens


def _ratio(store: Store, dtype: str) -> float:
    raw = sum(shard.feature_tokens for shard in store.catalogue.shards)
    if not raw or store.token_bytes is None or store.config is None or store.config.storage_dtype != dtype:
        return STORED_SHARE[dtype]
    return store.size() / (raw * store.token_bytes)


def _seconds_by_runs(storage: Storage, tokens: int) -> float | None:
    """Go by the latest run that encoded enough to tell: its time for loading, and its tokens a second beyond that."""
    for run in reversed(last_runs(storage)):
        stages = run.get("stages") or {}
        done, loading = run.get("tokens", 0), float(stages.get("load", 0))
        working = float(run.get("seconds", 0)) - loading - float(stages.get("scan", 0))
        if done and working > 0 and run.get("encoded", 0) >= 8:
            return round(loading + float(tokens * working / done), 1)
    return None


def _matrix_rate() -> float:
    """Time multiply-adds, each counted twice, a second, of a float32 product of 1,024 × 1,024: the best of a few."""
    import numpy as np

    one = np.ones((1024, 1024), np.float32)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - began)
    return float(2 * 1024**3 / best)
