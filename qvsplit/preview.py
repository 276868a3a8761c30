"""What a run would take, without doing it: pictures, tokens, bytes on disk, seconds. From headers alone.

Sizes are read by decoders as in a real run, so that a hostile header is no danger here either. Seconds come from what
this album's last runs took; where it has had none, from the tower's arithmetic and a matrix product timed now.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.album import Album
from qvsplit.checkpoint import Checkpoint, default_model, read_settings
from qvsplit.decoder import Decoders
from qvsplit.devices import is_cuda
from qvsplit.errors import ModelError, PictureError
from qvsplit.families import settings_of
from qvsplit.folders import Found
from qvsplit.recipe import token_bytes
from qvsplit.runs import last_runs

if TYPE_CHECKING:
    from qvsplit.extract import Settings

# Bytes in a shard over raw bytes where the album has none yet: embeddings of photographs (docs/decisions.md)
_RATIO = {"float32": 0.87, "bfloat16": 0.70, "float16": 0.84, "int8": 0.90}
_FORWARD_SHARE = 0.8  # of the rate of a matrix product that the tower's forward reaches on a CPU


@dataclass(frozen=True)
class Preview:
    """What it would take to encode the pictures that are new. Copies and moves, not told from new ones here, cost less.

    `bytes` and `seconds` are None where there is nothing to go by.
    """

    pictures: int
    bad: int  # of them: those without a sound header
    tokens: int
    bytes: int | None
    seconds: float | None
    seconds_by: str  # "earlier runs" or "arithmetic"


def preview(candidates: Sequence[Found], album: Album, folder: Path, settings: Settings) -> Preview:
    """What it would take to encode `candidates` into `album`."""
    if not candidates:
        return Preview(0, 0, 0, 0, 0.0, "")
    made = _Maker(album, settings)
    decoders = Decoders(settings.picture_seconds)

    def tokens(found: Found) -> int | None:
        try:
            return made.tokens(*decoders.mine().measure(found))
        except PictureError:
            return None

    with ThreadPoolExecutor(settings.workers or min(8, cpu_count() or 1), "qvsplit-headers") as pool:
        try:
            counted = list(pool.map(tokens, candidates))
        finally:
            decoders.close()
    sound = [count for count in counted if count is not None]
    size = None
    if made.hidden_size is not None:
        raw = sum(sound) * token_bytes(made.stored_dtype, made.hidden_size)
        size = round(raw * _ratio(album, made.stored_dtype))
    seconds, by = _seconds_by_runs(folder, sum(sound)), "earlier runs"
    if seconds is None:
        seconds, by = made.seconds_by_arithmetic(sound), "arithmetic"
    return Preview(
        len(counted), len(counted) - len(sound), sum(sound), size, seconds, by if seconds is not None else ""
    )


def resized(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width after the processor's resizing: multiples of `factor`, within the limits, about as slim.

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


class _Maker:
    """The settings that decide how many tokens a picture has: the album's, else the checkpoint's."""

    def __init__(self, album: Album, settings: Settings) -> None:
        self.settings = settings
        self.checkpoint: Checkpoint | None = None
        if album.recipe is not None and not settings.rebuild:
            recipe = album.recipe
            self.processor: Mapping[str, Any] = recipe.processor
            self.hidden_size, self.stored_dtype = album.hidden_size, recipe.stored_dtype
            name = album.made.model if album.made else ""
        else:
            name = settings.model or (album.made.model if album.made else "") or default_model()
        with suppress(ModelError):
            self.checkpoint = read_settings(name)
        if album.recipe is None or settings.rebuild:
            if self.checkpoint is None:
                self.checkpoint = read_settings(name)  # says why it cannot be had
            family = self.checkpoint.family
            self.processor = settings_of(self.checkpoint.processor_config, family.processor_settings)
            low, high = self.checkpoint.pixel_limits
            self.processor = dict(self.processor) | {
                "min_pixels": settings.min_pixels or low,
                "max_pixels": settings.max_pixels or min(high, family.default_max_pixels),
            }
            self.hidden_size = int(self._tower()["hidden_size"])
            computed = settings.dtype or ("bfloat16" if is_cuda(settings.device) else "float32")
            self.stored_dtype = settings.store or computed

    def tokens(self, width: int, height: int) -> int:
        """Of a picture of this size. PictureError where the processor refuses so slim a one."""
        long, short = max(width, height), min(width, height)
        if self.checkpoint is not None and long > self.checkpoint.family.max_aspect_ratio * short:
            raise PictureError(f"is {width}×{height}, too slim")
        factor = int(self.processor["patch_size"]) * int(self.processor["merge_size"])
        tall, wide = resized(
            height, width, factor, int(self.processor["min_pixels"]), int(self.processor["max_pixels"])
        )
        return tall * wide // factor**2

    def seconds_by_arithmetic(self, tokens: Sequence[int]) -> float | None:
        """The tower's multiplications over the rate of a matrix product in float32, timed now. None on a GPU."""
        if self.checkpoint is None or is_cuda(self.settings.device):
            return None
        tower = self._tower()
        width, depth, merge = int(tower["embed_dim"]), int(tower["depth"]), int(tower["spatial_merge_size"])
        block = width**2 * (4 + 2 * float(tower["mlp_ratio"]))  # attention's four matrices, and the two behind it
        merger = (merge * width) ** 2 + merge * width * int(tower["hidden_size"])  # for a token, of merge² patches
        linear = depth * block + merger
        work = 0.0
        for count in tokens:
            patches = count * merge**2
            work += 2.0 * patches * (linear + 2 * depth * width * patches)
        return float(work) / (_matrix_rate() * _FORWARD_SHARE)

    def _tower(self) -> Mapping[str, Any]:
        assert self.checkpoint is not None
        return settings_of(self.checkpoint.vision_config, self.checkpoint.family.vision_settings)


def _ratio(album: Album, dtype: str) -> float:
    raw = sum(row.n_tokens or 0 for shard in album.shards for row in shard.rows if row.has_embeds)
    if not raw or album.hidden_size is None or album.recipe is None or album.recipe.stored_dtype != dtype:
        return _RATIO[dtype]
    return sum(shard.path.stat().st_size for shard in album.shards) / (raw * token_bytes(dtype, album.hidden_size))


def _seconds_by_runs(folder: Path, tokens: int) -> float | None:
    """By the latest run that encoded enough to tell: its time for loading, and its tokens a second beyond that."""
    for run in reversed(last_runs(folder)):
        stages = run.get("stages") or {}
        done, loading = run.get("tokens", 0), float(stages.get("load", 0))
        working = float(run.get("seconds", 0)) - loading - float(stages.get("scan", 0))
        if done and working > 0 and run.get("encoded", 0) >= 8:
            return round(loading + float(tokens * working / done), 1)
    return None


def _matrix_rate() -> float:
    """Multiply-adds, each counted twice, a second, of a float32 product of 1,024 × 1,024: the best of a few."""
    import numpy as np

    one = np.ones((1024, 1024), np.float32)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - began)
    return float(2 * 1024**3 / best)
