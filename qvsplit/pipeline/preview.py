"""What a run would take, without doing it: items, tokens, bytes on disk, seconds. From headers alone.

Sizes are read by decoders as in a real run, so that a hostile header is no danger here either. Seconds come from what
this store's last runs took; where it has had none, from the encoder's arithmetic and a matrix product timed now.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from os import cpu_count
from typing import Any

from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.opening import default_model, read_settings
from qvsplit.errors import ItemError, ModelError
from qvsplit.models.preparing import check_shape, load_processor
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.pipeline.summary import Preview
from qvsplit.runtime.devices import is_cuda
from qvsplit.runtime.dtypes import token_bytes
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.source import Entry
from qvsplit.store.history import last_runs
from qvsplit.store.storage import Storage
from qvsplit.store.store import Store

# Bytes in a shard over raw bytes where the store has none yet: features of photographs (docs/decisions.md)
_RATIO = {"float32": 0.87, "bfloat16": 0.70, "float16": 0.84, "int8": 0.90}
_FORWARD_SHARE = 0.8  # of the rate of a matrix product that the encoder's forward reaches on a CPU


def preview(entries: Sequence[Entry], store: Store, storage: Storage, options: ExtractOptions) -> Preview:
    """Say what it would take to encode `entries` into `store`."""
    if not entries:
        return Preview(0, 0, 0, 0, 0.0, "")
    estimate = _Estimate(store, options)
    decoders = DecoderPool(options.item_timeout)

    def tokens(entry: Entry) -> int | None:
        try:
            return estimate.tokens(*decoders.mine().measure(entry))
        except ItemError:
            return None

    with ThreadPoolExecutor(options.workers or min(8, cpu_count() or 1), "qvsplit-headers") as pool:
        try:
            counted = list(pool.map(tokens, entries))
        finally:
            decoders.close()
    sound = [count for count in counted if count is not None]
    size = None
    if estimate.width is not None:
        raw = sum(sound) * token_bytes(estimate.storage_dtype, estimate.width)
        size = round(raw * _ratio(store, estimate.storage_dtype))
    seconds, by = _seconds_by_runs(storage, sum(sound)), "earlier runs"
    if seconds is None:
        seconds, by = estimate.seconds_by_arithmetic(sound), "arithmetic"
    return Preview(
        len(counted), len(counted) - len(sound), sum(sound), size, seconds, by if seconds is not None else ""
    )


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
    """The settings that decide how many tokens an image has: the store's, else the checkpoint's."""

    def __init__(self, store: Store, options: ExtractOptions) -> None:
        self.options = options
        self._loading = threading.Lock()  # sizes are measured in several threads
        self._loaded: Any = None
        own = None if options.rebuild else store.config
        made_with = store.provenance.model if store.provenance else ""
        name = made_with if own is not None else options.model or made_with or default_model()
        self.checkpoint: Checkpoint | None = None
        with suppress(ModelError):
            self.checkpoint = read_settings(name)
        if own is not None:
            self.processor: Mapping[str, Any] = own.processor
            self.width, self.storage_dtype = store.width, own.storage_dtype
            return
        if self.checkpoint is None:
            self.checkpoint = read_settings(name)  # says why it cannot be had
        low, high = self.checkpoint.pixel_limits
        high = min(high, self.checkpoint.family.default_max_pixels or high)
        limits = {"min_pixels": options.min_pixels or low, "max_pixels": options.max_pixels or high}
        self.processor = dict(self.checkpoint.processor_settings) | limits
        self.width = self.checkpoint.width
        computed = options.dtype or ("bfloat16" if is_cuda(options.device) else "float32")
        self.storage_dtype = options.storage_dtype or computed

    def tokens(self, width: int, height: int) -> int:
        """Count those of an image of this size. ItemError where the processor refuses so slim a one."""
        if self.checkpoint is not None:
            check_shape(width, height, self.checkpoint.family)
            if self.checkpoint.family.processor_settings is None:
                return self._tokens_by_processor(self.checkpoint, width, height)
        factor = int(self.processor["patch_size"]) * int(self.processor["merge_size"])
        tall, wide = resized(
            height, width, factor, int(self.processor["min_pixels"]), int(self.processor["max_pixels"])
        )
        return tall * wide // factor**2

    def _tokens_by_processor(self, checkpoint: Checkpoint, width: int, height: int) -> int:
        """Ask the checkpoint's own processor, which for a family without listed settings is all that knows."""
        with self._loading:
            if self._loaded is None:
                low, high = self.options.min_pixels, self.options.max_pixels
                self._loaded = load_processor(checkpoint, min_pixels=low, max_pixels=high)
        counted = self._loaded._get_num_multimodal_tokens(image_sizes=[[height, width]])
        return int(counted["num_image_tokens"][0])

    def seconds_by_arithmetic(self, tokens: Sequence[int]) -> float | None:
        """Divide the encoder's multiplications by the rate of a float32 product, timed now. None where not known."""
        if self.checkpoint is None or self.checkpoint.family.vision_settings is None or is_cuda(self.options.device):
            return None
        encoder = self.checkpoint.vision_settings
        width, depth, merge = int(encoder["embed_dim"]), int(encoder["depth"]), int(encoder["spatial_merge_size"])
        block = width**2 * (4 + 2 * float(encoder["mlp_ratio"]))  # attention's four matrices, and the two behind it
        merger = (merge * width) ** 2 + merge * width * int(encoder["hidden_size"])  # for a token, of merge² patches
        linear = depth * block + merger
        work = 0.0
        for count in tokens:
            patches = count * merge**2
            work += 2.0 * patches * (linear + 2 * depth * width * patches)
        return float(work) / (_matrix_rate() * _FORWARD_SHARE)


def _ratio(store: Store, dtype: str) -> float:
    raw = sum(shard.feature_tokens for shard in store.catalogue.shards)
    if not raw or store.width is None or store.config is None or store.config.storage_dtype != dtype:
        return _RATIO[dtype]
    return store.size() / (raw * token_bytes(dtype, store.width))


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
