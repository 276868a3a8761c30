"""Check a store: checksums and structure; and, with the full checkpoint, features and answers against the full model.

The reference is the full model of transformers on what `AutoProcessor` makes, in one call, of an upright RGB image or
of the sampled frames of a clip, with the extraction config's limits: its own features and its own greedy tokens, one
item at a time, in the dtype of the store. Answers are compared as `ask` makes them, by the language model alone, with
the kernels that are asked for. `describe` says what a store holds.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.opening import choose_checkpoint
from qvsplit.errors import (
    ConfigError,
    ItemError,
    OutOfMemory,
    QvsplitError,
    ShardDamaged,
    StoreDamaged,
    UsageError,
    some_of,
)
from qvsplit.models.clips import MAX_WHOLE_BYTES, load_clip_preparer, other_reader
from qvsplit.models.processor_proof import SampledClip, kind_of, processor_call
from qvsplit.models.sampling import Clip, metadata_of
from qvsplit.output.names import count_rows, shown_name
from qvsplit.pipeline.options import ExtractOptions, video_options, with_videos_of
from qvsplit.runtime import arguments
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.runtime.loading import LIBRARIES, PROCESSOR, READY, OnLoad, nobody
from qvsplit.sources import images
from qvsplit.sources.decoder import Decoder, DecoderPool
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry
from qvsplit.sources.videos import VIDEO_RULE, VideoInfo, reader_versions
from qvsplit.store import layout
from qvsplit.store.config import KERNELS, PREPARED_ON
from qvsplit.store.history import last_runs
from qvsplit.store.repair import mark_damage
from qvsplit.store.row import KINDS, Row
from qvsplit.store.shard_reader import open_shard
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store import Store

if TYPE_CHECKING:
    import torch

    from qvsplit.models.language import LanguageModel
    from qvsplit.models.processor_proof import Item

QUESTION = "Describe the {}."
NEW_TOKENS = 16
LAST_RUNS = 5
_CHANGED = "has changed since it was encoded"
_NO_MEMORY = "does not fit into memory"
_STATUSES = {"ok": 0, "failed": 0, "deleted": 0}
# Whatever the checkpoint's generation_config.json says of sampling (the hub's says: sample)
GREEDY: dict[str, Any] = {
    "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "return_dict_in_generate": True,
    "output_scores": True,
}  # fmt: skip
# Largest |difference| over largest |value| that another batch, machine or library version may make, by the coarser
# of compute and storage dtype: some tens of units in the last place, as the encoder's layers add up; of int8 what it
# rounds away, half of a 127th.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2, "int8": 6e-3}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # of 1, the unit in the last place
# How many of these a token's score may lie below the best one for rounding to have decided between the two: as far as
# answers were measured to part (docs/decisions.md). Sums kept in float32 drift by more of its small units.
TIE_UNITS = {"float32": 64, "float16": 4, "bfloat16": 4}
BEST = 100  # of a step's tokens, whose scores are kept: no tie is among more


@dataclass(frozen=True)
class ShardCheck:
    """One shard, read from end to end. `error` is None if it is not damaged."""

    shard: str
    rows: int
    tokens: int
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ItemCheck:
    """One image, one video or one part of a video, compared with the full model.

    Attributes:
        path: Its name; of a part of a video, with its number and seconds.
        skipped: Why it could not be compared; None where it was.
        same_bits: Whether the stored features are the full model's, bit for bit.
        max_difference: Largest |difference| over largest |value|; None where the shapes differ.
        same_tokens: Whether the answer has the full model's tokens.
        within_tolerance: Whether `max_difference` is what another batch, machine or library version may make.
        other_reader: The libraries that read the store's videos, where those installed here are others; else None.
        dtype: In which both were computed.
        feature_kernels: How the store's features were computed, "fused" or "reference".
        answer_kernels: How the answer was.
        gap: Where the answers part, how far below its best score the full model's score of the other token lies, over
            the best; None where they do not part, and where that token is none of its hundred best.
        error: What is damaged in the store, so that nothing could be compared; None where nothing is.
    """

    path: str
    skipped: str | None = None
    same_bits: bool = False
    max_difference: float | None = None
    same_tokens: bool = False
    within_tolerance: bool = False
    other_reader: str | None = None
    dtype: str = "float32"
    feature_kernels: str = "fused"
    answer_kernels: str = "fused"
    gap: float | None = None
    error: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against the store."""
        if self.error is not None:
            return False
        return self.skipped is not None or ((self.same_tokens or self.is_tie) and self.within_tolerance)

    @property
    def is_tie(self) -> bool:
        """Whether the answers part where the full model has both tokens as good as equally likely: rounding decides.

        Where features have the same bits and the kernels are "reference" all scores have the same, and nothing may.
        """
        rounds = not (self.same_bits and self.answer_kernels == "reference")
        return rounds and self._units is not None and self._units <= TIE_UNITS[self.dtype]

    @property
    def _units(self) -> float | None:
        """The gap, in units in the last place."""
        return None if self.gap is None else self.gap / EPSILON[self.dtype]

    @property
    def explanation(self) -> str:
        """What the comparison found, in a few words."""
        if self.error:
            return self.error
        if self.skipped:
            return f"not compared: {self.skipped}"
        reader = f"; the store's frames were read by {self.other_reader}" if self.other_reader else ""
        if self.max_difference is None:
            return f"another number of tokens{reader}"
        bits = "same bits" if self.same_bits else f"differs by {self.max_difference:.1e} of the largest value"
        return f"{bits}, {self._tokens}{reader}"

    @property
    def _tokens(self) -> str:
        if self.same_tokens:
            return "same tokens"
        where = f" ({self._units:.1f} units in the last place below the best score)" if self._units is not None else ""
        return f"other tokens from a tie on{where}" if self.is_tie else f"OTHER tokens{where}"

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------------ checksums


def check_shards(paths: Sequence[Path]) -> Iterator[ShardCheck]:
    """Read every byte of every shard: page checksums, structure, lengths, finite values.

        for check in qvsplit.check_shards(sorted(Path("embeds").glob("*.parquet"))):
            print(check.shard, check.error)

    A damaged one is marked, so that the next `extract` quarantines it and encodes its items again.

    Raises:
        ConfigError: A newer version wrote a shard: that is no damage, and cannot be checked here.
    """
    for path in paths:
        rows = tokens = 0
        try:
            for _, _, features in open_shard(path):
                rows += 1
                tokens += features.n_tokens if features is not None else 0
        except ConfigError:
            raise
        except QvsplitError as error:
            yield ShardCheck(str(path), rows, tokens, _marked(path, error))
        else:
            yield ShardCheck(str(path), rows, tokens, None)


def _marked(path: Path, error: QvsplitError) -> str:
    """Give what is wrong with a shard, after marking it, if it is damaged."""
    marked = not isinstance(error, ShardDamaged) or mark_damage(LocalStorage(path.parent), path.name, error.what)
    if marked or not path.exists():
        return str(error)
    return f"{error} (delete it before the next extract: no mark of the damage could be written)"


def check_store(store: Store) -> list[str]:
    """Say what is wrong between shards, in one line or none: items whose features are in none of them."""
    rows = list(store.catalogue.rows_without_features())
    if not rows:
        return []
    return [
        f"the features of {count_rows(rows)} are in no shard given ({some_of((row.name for row in rows), 3)}); run "
        "`qvsplit extract` again to encode them"
    ]


# --------------------------------------------------------------------------------------------- the full model


def sample(store: Store, number: int) -> list[Row]:
    """Choose `number` rows, evenly spread over the store: the same ones every time.

    Where there are images and videos, both are among them, each according to its number.
    """
    rows = list(store)
    images, videos = ([row for row in rows if row.kind == kind] for kind in KINDS)
    few, many = sorted((images, videos), key=len)
    share = round(number * len(few) / max(len(rows), 1))
    share = min(len(few), max(share, 1 if number > 1 else 0))
    return sorted([*_spread(many, number - share), *_spread(few, share)], key=lambda row: (row.key, row.part))


def _spread(rows: Sequence[Row], number: int) -> list[Row]:
    step = max(1.0, len(rows) / max(number, 1))
    return [rows[int(i * step)] for i in range(min(number, len(rows)))]


def check_items(
    store: Store,
    rows: Sequence[Row],
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    kernels: str = KERNELS[0],
    on_load: OnLoad = nobody,
    on_item: Callable[[], None] = lambda: None,
) -> Iterator[ItemCheck]:
    """Encode `rows` again with the full model, and compare features and tokens.

        for check in qvsplit.check_items(store, [store["coffee.png"]]):
            print(check.path, check.agrees)

    First the full model sees all items; then, in its place in memory, the language model alone answers about each, and
    checks are given as it does. A damaged row has that as its `error`, and the others are compared all the same.

    Args:
        store: Whose features and answers are compared.
        rows: Of which items.
        model: A checkpoint's folder or hub name; by default the store's own.
        adapter: A PEFT adapter's folder or hub name; by default, with the store's own model, the store's own.
        device: `cpu`, `cuda` or `cuda:N`.
        kernels: How answers are computed: "fused", as `ask` has it by default, or "reference".
        on_load: Hears how the full model is loaded, and then how the language model is.
        on_item: Called when the full model is done with an item.

    Raises:
        UsageError: There are no such kernels.
        ConfigError: The store is of another encoder.
        ModelError: The full model cannot be loaded.
    """
    arguments.check_one_of("kernels", kernels, KERNELS)
    reference = _Reference(store, model, adapter, device, kernels, on_load)
    compared: list[tuple[Row, ItemCheck, _Answered | None]] = []
    # whatever is stored as a video was read as one
    with closing(DecoderPool(gifs_are_videos=True)) as pool:
        for row in rows:
            try:
                item = _unchanged_clip(row, pool.mine()) if row.kind == "video" else _unchanged_image(row)
                compared.append((row, *reference.check(row, item)))
            except ItemError as error:
                compared.append((row, replace(reference.nothing_of(row), skipped=f"its file {error}"), None))
            except StoreDamaged as error:
                compared.append((row, replace(reference.nothing_of(row), error=str(error)), None))
            on_item()
    asks = any(answered is not None for _, _, answered in compared)
    language = reference.replaced_by_language_model(on_load) if asks else None
    for row, check, answered in compared:
        yield check if answered is None or language is None else _with_answer(check, row, answered, store, language)


@dataclass(frozen=True)
class _Answered:
    """What the full model said about an item, and at each token how near to that others were.

    `gaps` has for the tokens of the best scores how far each lies below the best, over the best: by the scores that
    the token was chosen by, those of the checkpoint's penalties included.
    """

    tokens: list[int]
    gaps: list[dict[int, float]]

    def gap(self, place: int, token: int | None) -> float | None:
        """Give that of another token in this place; None for one that is far from it, or where either had ended."""
        return self.gaps[place].get(token) if token is not None and place < len(self.gaps) else None


def _with_answer(check: ItemCheck, row: Row, expected: _Answered, store: Store, language: LanguageModel) -> ItemCheck:
    """Compare the answer from the stored features."""
    from qvsplit.models.asking import PrefixedQuestion
    from qvsplit.models.decoding import Decoding
    from qvsplit.models.prompt import Placeholder

    prompt = language.prompter.ask(QUESTION.format(row.kind), [Placeholder.from_row(row)])
    try:
        question = PrefixedQuestion.of(prompt, language.prefill(prompt, [store.features(row)]))
        (completion,) = language.generate([question], Decoding(max_new_tokens=NEW_TOKENS))
    except OutOfMemory:
        return replace(check, skipped=f"its file {_NO_MEMORY}")
    except StoreDamaged as error:
        return replace(check, error=str(error))
    if completion.tokens == expected.tokens:
        return replace(check, same_tokens=True)
    pairs = itertools.zip_longest(completion.tokens, expected.tokens)
    place, mine = next((number, mine) for number, (mine, theirs) in enumerate(pairs) if mine != theirs)
    return replace(check, gap=expected.gap(place, mine))


def compared_as(store: Store, kernels: str) -> str:
    """Say in one line what `check_items` compares: dtype, kernels, and that it is one by one."""
    assert store.config is not None
    return (
        f"against the full model in {store.config.compute_dtype}, one by one: features by the {store.config.kernels} "
        f"kernels, answers by the {kernels} kernels"
    )


def require_comparison(checks: Sequence[ItemCheck]) -> None:
    """Raise UsageError if none of the items could be compared: that shows nothing."""
    if all(check.skipped is not None for check in checks):
        reasons = some_of({str(check.skipped) for check in checks}) or "the store holds no item to compare"
        raise UsageError(f"nothing could be compared: {reasons}")


def _unchanged_image(row: Row) -> Item:
    """Decode the image of a row. ItemError if its file has changed."""
    file = read(_entry(row))
    if file.sha256 != row.sha256:
        raise ItemError(_CHANGED)
    # it was read, under whatever limit
    return images.decode(file.data, max_pixels=max(images.MAX_IMAGE_PIXELS, (row.width or 0) * (row.height or 0)))


def _unchanged_clip(row: Row, decoder: Decoder) -> Item:
    """Decode the frames that a row names. ItemError if its file has changed, or the frames are too many at once."""
    import torch

    file = decoder.read(_entry(row))
    if file.sha256 != row.sha256:
        raise ItemError(_CHANGED)
    info = decoder.scan(_entry(row), file)
    clip = _clip_of(row, info)
    shape = len(clip.indices), 3, info.height, info.width
    if (size := math.prod(shape)) > MAX_WHOLE_BYTES:
        raise ItemError(
            f"takes {size >> 20:,} MiB as frames, and clips are compared whole: up to {MAX_WHOLE_BYTES >> 20:,} MiB"
        )
    frames = torch.empty(shape, dtype=torch.uint8)
    with closing(decoder.frames(_entry(row), file, clip.indices)) as decoded:
        for place, frame in enumerate(decoded):
            frames[place] = torch.from_numpy(frame).permute(2, 0, 1)
    return SampledClip(frames, metadata_of(clip, info))


def _entry(row: Row) -> Entry:
    return Entry(row.root, row.path, row.size, None, None)


def _clip_of(row: Row, info: VideoInfo) -> Clip:
    """Give what a row says of its clip. StoreDamaged for frames that its video does not have."""
    try:
        indices = json.loads(row.media or "{}")["frames_indices"]
        sound = all(type(index) is int and 0 <= index < info.n_frames for index in indices)
        sound = sound and bool(indices) and all(one <= other for one, other in itertools.pairwise(indices))
    except (ValueError, TypeError, LookupError, RecursionError):
        sound = False
    if not sound:
        raise StoreDamaged(
            f"the row of {row.name} names no frames, or such as its video of {info.n_frames:,} frames does not have; "
            "run `qvsplit extract` again"
        )
    n_frames = info.n_frames
    if row.start is not None and row.end is not None:
        n_frames = round((row.end - row.start) * info.fps)
    return Clip(row.part, row.start, row.end, n_frames, info.fps, tuple(indices))


class _Reference:
    """The full model with its processor, with the limits of a store's extraction config in force."""

    def __init__(
        self,
        store: Store,
        model: str | None,
        adapter: str | None,
        device: str | None,
        kernels: str,
        on_load: OnLoad,
    ) -> None:
        on_load(LIBRARIES, 0, 0)
        import torch

        from qvsplit.answering.evidence import check_encoder
        from qvsplit.models.prompt import Prompter
        from qvsplit.runtime.devices import choose_device
        from qvsplit.weights import load_full_model

        assert store.config is not None
        assert store.provenance is not None
        origin = store.provenance
        checkpoint = choose_checkpoint(
            model, "both", own=origin.model, revision=origin.revision, adapter=adapter, own_adapter=origin.adapter
        )
        check_encoder(store, checkpoint)
        dtype = getattr(torch, store.config.compute_dtype)
        self.store = store
        self.config = store.config
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.device = choose_device(device)
        self.model = load_full_model(checkpoint, dtype=dtype, device=self.device, on_load=on_load)
        on_load(PROCESSOR, 0, 0)
        self.prompter = Prompter(checkpoint)
        self.processor = self.prompter.processor
        limits = store.config.processor
        if "max_pixels" in limits:
            self.processor.image_processor.size = {
                "shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]
            }  # fmt: skip
        on_load(READY, 0, 0)

    def replaced_by_language_model(self, on_load: OnLoad) -> LanguageModel:
        """Give the language model alone, loaded as `ask` loads it, in the place of the full model."""
        from qvsplit.models import language

        dtype = self.model.dtype  # the store's, also of what a quantised one leaves plain: else answers were others
        del self.model
        gc.collect()
        loaded = language.load(
            self.checkpoint, device=self.device, dtype=dtype, kernels=self.kernels, on_load=on_load
        )  # fmt: skip
        on_load(READY, 0, 0)
        return loaded

    def nothing_of(self, row: Row) -> ItemCheck:
        """Give a check of which nothing has been compared yet."""
        return ItemCheck(
            shown_name(row), dtype=self.config.compute_dtype, feature_kernels=self.config.kernels,
            answer_kernels=self.kernels,
        )  # fmt: skip

    def check(self, row: Row, item: Item) -> tuple[ItemCheck, _Answered | None]:
        """Compare the stored features of `row` with the full model's on the pixels, and give the latter's answer.

        Raises:
            ItemError: It does not fit into memory.
        """
        try:
            return self._compared(row, item)
        except Exception as error:
            if is_out_of_memory(error):
                raise ItemError(_NO_MEMORY, "memory") from None
            raise

    def _compared(self, row: Row, item: Item) -> tuple[ItemCheck, _Answered | None]:
        stored = self.store.features(row).flat_torch()  # each [n_tokens, width]
        if row.kind == "image" and self.config.prepared_on != PREPARED_ON[0]:
            item = self._resized_there(item, row)
        theirs, expected = self._features_and_answer(item)
        reference = {name: theirs[name].to(one.dtype).cpu() for name, one in stored.items() if name in theirs}
        check = replace(self.nothing_of(row), other_reader=self.other_reader if row.kind == "video" else None)
        if {name: one.shape for name, one in reference.items()} != {name: one.shape for name, one in stored.items()}:
            return check, None
        difference = max(_difference(one, reference[name]) for name, one in stored.items())
        tolerance = max(TOLERANCE[self.config.compute_dtype], TOLERANCE[self.config.storage_dtype])
        check = replace(
            check,
            same_bits=all(_same_bits(one, reference[name]) for name, one in stored.items()),
            max_difference=difference,
            within_tolerance=difference <= tolerance,
        )
        return check, expected

    @cached_property
    def other_reader(self) -> str | None:
        """The libraries that read the store's videos, where those installed here are others."""
        mine = {"rule": VIDEO_RULE, **reader_versions()}
        return other_reader(mine, {name: self._videos.get(name) for name in mine})

    @property
    def _videos(self) -> Mapping[str, Any]:
        assert self.config.videos is not None
        return self.config.videos

    @cached_property
    def _clip_processor(self) -> Any:
        """The processor with the store's limits of videos in force, whatever the checkpoint's own file says of them."""
        from qvsplit.models.preparing import load_preparer

        preparer = load_preparer(self.checkpoint, self.model.config, min_pixels=None, max_pixels=None)
        options = video_options(with_videos_of(self.config, ExtractOptions()))
        clips = load_clip_preparer(self.checkpoint, preparer, options)
        own = clips.settings["settings"]
        for name, value in self._videos.get("settings", {}).items():
            if own.get(name) != value:
                setattr(clips.video_processor, name, value)
        return clips.processor

    @cached_property
    def _image_processor(self) -> Any:
        """The processor for images; one that does not resize where `_resized_there` has done so."""
        if self.config.prepared_on == PREPARED_ON[0]:
            return self.processor
        processor = copy.deepcopy(self.processor)
        processor.image_processor.do_resize = False
        return processor

    def _features_and_answer(self, item: Item) -> tuple[dict[str, torch.Tensor], _Answered]:
        """Give the full model's features, each [n_tokens, width], and its answer."""
        import torch

        from qvsplit.checkpoints.model_class import features_of, wanted_arguments
        from qvsplit.models.encoder_output import output_tensors

        kind = kind_of(item)
        processor = self._clip_processor if kind == "video" else self._image_processor
        inputs = dict(processor_call(processor, [item], QUESTION.format(kind), where=self.model.name_or_path))
        encode = features_of(self.model, kind)
        pixels = wanted_arguments(encode, inputs)  # what the language model reads, seconds say, stays as it is
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                is_rounded = name in pixels and value.is_floating_point()
                inputs[name] = value.to(self.model.device, self.model.dtype if is_rounded else None)
        with torch.inference_mode():
            output = output_tensors(encode(**wanted_arguments(encode, inputs), return_dict=True))
            answer = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **GREEDY)
        gaps = [_gaps(scores[0]) for scores in answer.scores]
        tokens = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return {one.key: one.rows for one in output}, _Answered(tokens, gaps)

    def _resized_there(self, image: Item, row: Row) -> Item:
        """Resize an image on the model's device, as the store's were, in place of the processor."""
        import numpy as np
        import torch
        from PIL import Image

        from qvsplit.models.device_preparing import resized, size_of

        assert row.grid_thw is not None
        own = self.processor.image_processor
        pixels = torch.from_numpy(np.array(image)).to(self.model.device)
        return Image.fromarray(resized(pixels, size_of(row.grid_thw, own), own.resample).cpu().numpy())


def _difference(stored: torch.Tensor, reference: torch.Tensor) -> float:
    """Measure the largest |difference| over the reference's largest |value|."""
    largest = reference.float().abs().max().clamp_min(1e-30)
    return float((stored.float() - reference.float()).abs().max() / largest)


def _gaps(scores: torch.Tensor) -> dict[int, float]:
    """Give for the tokens of the best scores, [vocabulary], how far below the best of all each lies, over that."""
    best, tokens = scores.float().topk(min(BEST, scores.numel()))
    gaps = (best[0] - best) / best[0].abs().clamp_min(1e-30)
    return {token: gap for token, gap in zip(tokens.tolist(), gaps.tolist(), strict=True) if math.isfinite(gap)}


def _same_bits(stored: torch.Tensor, reference: torch.Tensor) -> bool:
    import torch

    return bool(torch.equal(stored.view(torch.uint8), reference.contiguous().view(torch.uint8)))


# ----------------------------------------------------------------------------------------------------- describing


def describe(store: Store) -> dict[str, Any]:
    """Describe a store: items by kind and status, tokens, sizes, extraction config, provenance, last runs.

        print(qvsplit.describe(qvsplit.open_store("embeds"))["tokens"])

    `images` and `videos` can be asked about, and so can the `clips` of videos: the parts they were cut into, or all of
    it. `copies` share the features of another item: the same bytes under another name. `without_features` are items
    whose features are in none of the shards given.
    """
    assert store.config is not None
    assert store.provenance is not None
    storage = store.storage
    return {
        **_item_counts(store),
        **_sizes(store),
        "roots": {root: _STATUSES | counts for root, counts in store.catalogue.counts().items()},
        "quarantined": [file.name for file in storage.list(layout.QUARANTINE)] if storage is not None else [],
        "rebuilding": storage is not None and bool(storage.list(layout.REBUILD)),
        "width": store.width,
        "tensors": [spec.key for spec in store.tensors or ()],
        "model": store.provenance.model,
        "revision": store.provenance.revision,
        "adapter": store.provenance.adapter,
        "device": store.provenance.device,
        "versions": dict(store.provenance.versions),
        "kernels": store.config.kernels,
        "prepared_on": store.config.prepared_on,
        "config": store.config.to_json(),
        "failures": [
            {"root": row.root, "path": row.path, "error": row.error}
            for row in store.catalogue.rows_with_status("failed")
        ],
        "warnings": _warning_counts(store),
        "runs": last_runs(storage, LAST_RUNS) if storage is not None else [],
    }


def _warning_counts(store: Store) -> dict[str, int]:
    """Count the rows that carry each kind of warning, the most frequent first: texts, whatever numbers are in them."""
    kinds: Counter[str] = Counter()
    for text, rows in store.catalogue.warnings().items():
        for kind in {re.sub(r"\d[\d,.]*", "N", one) for one in text.split("; ")}:
            kinds[kind] += rows
    return dict(sorted(kinds.items(), key=lambda one: (-one[1], one[0])))


def _item_counts(store: Store) -> dict[str, int | float]:
    catalogue = store.catalogue
    counts = catalogue.item_counts()
    (images, _), (videos, clips) = (counts.get(("ok", kind), (0, 0)) for kind in KINDS)
    failed, deleted = (sum(counts.get((status, kind), (0, 0))[0] for kind in KINDS) for status in ("failed", "deleted"))
    return {
        "images": images,
        "videos": videos,
        "clips": clips,
        "video_seconds": catalogue.video_seconds(),
        "copies": catalogue.copies(),
        "without_features": len({row.key for row in catalogue.rows_without_features()}),
        "failed": failed,
        "deleted": deleted,
        "superseded": sum(shard.rows for shard in catalogue.shards) - sum(rows for _, rows in counts.values()),
    }


def _sizes(store: Store) -> dict[str, int]:
    """Give tokens of the current items, shards, their bytes on disk, and the bytes of their features uncompressed."""
    assert store.token_bytes is not None
    stored_tokens = sum(shard.feature_tokens for shard in store.catalogue.shards)
    return {
        "tokens": store.catalogue.tokens(),
        "shards": len(store.catalogue.shards),
        "bytes": store.size(),
        "raw_bytes": stored_tokens * store.token_bytes,
    }
