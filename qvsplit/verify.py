"""Check a store: checksums and structure; and, with the full checkpoint, features and answers against the full model.

The reference is the full model of transformers on `AutoProcessor(upright RGB image)` with the extraction config's pixel
limits: its own features and its own greedy tokens, one image at a time. `describe` says what a store holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.checkpoints.opening import choose_checkpoint
from qvsplit.errors import ConfigError, ItemError, QvsplitError, ShardDamaged, UsageError, some_of
from qvsplit.sources import images
from qvsplit.sources.files import read
from qvsplit.sources.source import Entry
from qvsplit.store import layout
from qvsplit.store.history import last_runs
from qvsplit.store.repair import mark_damage
from qvsplit.store.row import Row
from qvsplit.store.shard_reader import open_shard
from qvsplit.store.storage import LocalStorage
from qvsplit.store.store import Store

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from qvsplit.store.features import Features

QUESTION = "Describe the image."
NEW_TOKENS = 16
LAST_RUNS = 5
_STATUSES = {"ok": 0, "failed": 0, "deleted": 0}
# Whatever the checkpoint's generation_config.json says of sampling (the hub's says: sample)
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
# Largest |difference| over largest |value| that another batch, machine or library version may make, by the coarser
# of compute and storage dtype: some tens of units in the last place, as the encoder's layers add up; of int8 what it
# rounds away, half of a 127th.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2, "int8": 6e-3}


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
    """One image, compared with the full model.

    Attributes:
        path: The image.
        skipped: Why it could not be compared; None where it was.
        same_bits: Whether the stored features are the full model's, bit for bit.
        max_difference: Largest |difference| over largest |value|; None where the shapes differ.
        same_tokens: Whether the answer has the full model's tokens.
        within_tolerance: Whether `max_difference` is what another batch, machine or library version may make.
    """

    path: str
    skipped: str | None = None
    same_bits: bool = False
    max_difference: float | None = None
    same_tokens: bool = False
    within_tolerance: bool = False

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against the store."""
        return self.skipped is not None or (self.same_tokens and self.within_tolerance)

    @property
    def explanation(self) -> str:
        """What the comparison found, in a few words."""
        if self.skipped:
            return f"not compared: {self.skipped}"
        if self.max_difference is None:
            return "another number of tokens"
        bits = "same bits" if self.same_bits else f"differs by {self.max_difference:.1e} of the largest value"
        return f"{bits}, {'same' if self.same_tokens else 'OTHER'} tokens"

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------------ checksums


def check_shards(paths: Sequence[Path]) -> Iterator[ShardCheck]:
    """Read every byte of every shard: page checksums, structure, lengths, finite values.

        for check in qvsplit.check_shards(sorted(Path("embeds").glob("*.parquet"))):
            print(check.shard, check.error)

    A damaged one is marked, so that the next `extract` quarantines it and encodes its images again.

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
    """Say what is wrong between shards, in one line or none: images whose features are in none of them."""
    paths = sorted(row.path for row in store.catalogue.rows_without_features())
    if not paths:
        return []
    return [
        f"the features of {len(paths):,} images are in no shard given ({some_of(paths, 3)}); run `qvsplit extract` "
        "again to encode them"
    ]


# --------------------------------------------------------------------------------------------- the full model


def sample(store: Store, number: int) -> list[Row]:
    """Choose `number` images, evenly spread over the store: the same ones every time."""
    rows = list(store)
    step = max(1.0, len(rows) / max(number, 1))
    return [rows[int(i * step)] for i in range(min(number, len(rows)))]


def check_items(
    store: Store, rows: Sequence[Row], *, model: str | None = None, device: str | None = None
) -> Iterator[ItemCheck]:
    """Encode `rows` again with the full model, and compare features and tokens.

        for check in qvsplit.check_items(store, [store["coffee.png"]]):
            print(check.path, check.agrees)

    Raises:
        ConfigError: The store is of another encoder.
        ModelError: The full model cannot be loaded.
    """
    reference = _Reference(store, model, device)
    for row in rows:
        try:
            image = _unchanged_image(row)
        except ItemError as error:
            yield ItemCheck(row.path, skipped=f"its file {error}")
        else:
            yield reference.check(row, image)


def require_comparison(checks: Sequence[ItemCheck]) -> None:
    """Raise UsageError if none of the images could be compared: that shows nothing."""
    if all(check.skipped is not None for check in checks):
        raise UsageError("nothing could be compared: the files of the sampled images were not found or have changed")


def _unchanged_image(row: Row) -> Image.Image:
    file = read(Entry(row.root, row.path, row.size, None, None))
    if file.sha256 != row.sha256:
        raise ItemError("has changed since it was encoded")
    return images.decode(file.data)


class _Reference:
    """The full model with its processor, at the pixel limits of a store's extraction config."""

    def __init__(self, store: Store, model: str | None, device: str | None) -> None:
        import torch

        from qvsplit.answering.evidence import check_encoder
        from qvsplit.models.prompt import Prompter
        from qvsplit.runtime.devices import choose_device
        from qvsplit.weights import load_full_model

        assert store.config is not None
        assert store.provenance is not None
        origin = store.provenance
        checkpoint = choose_checkpoint(model, "both", own=origin.model, revision=origin.revision)
        check_encoder(store, checkpoint)
        dtype = getattr(torch, store.config.compute_dtype)
        self.store = store
        self.config = store.config
        self.model = load_full_model(checkpoint, dtype=dtype, device=choose_device(device))
        self._attention = self.model.config.get_text_config()._attn_implementation  # transformers' own choice
        self.prefix = checkpoint.family.prefix
        self.prompter = Prompter(checkpoint)
        self.processor = self.prompter.processor
        limits = store.config.processor
        if "max_pixels" in limits:
            self.processor.image_processor.size = {
                "shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]
            }  # fmt: skip

    def check(self, row: Row, image: Image.Image) -> ItemCheck:
        """Compare the stored features of `row`, and an answer from them, with the full model on the pixels."""
        features = self.store.features(row)
        stored = features.flat_torch()  # each [n_tokens, width]
        theirs, expected = self._features_and_tokens(image)
        reference = {name: theirs[name].to(one.dtype).cpu() for name, one in stored.items() if name in theirs}
        if {name: one.shape for name, one in reference.items()} != {name: one.shape for name, one in stored.items()}:
            return ItemCheck(row.path, max_difference=None)
        difference = max(_difference(one, reference[name]) for name, one in stored.items())
        tolerance = max(TOLERANCE[self.config.compute_dtype], TOLERANCE[self.config.storage_dtype])
        return ItemCheck(
            row.path,
            same_bits=all(_same_bits(one, reference[name]) for name, one in stored.items()),
            max_difference=difference,
            same_tokens=self._tokens_from_store(row, features) == expected,
            within_tolerance=difference <= tolerance,
        )

    def _features_and_tokens(self, image: Image.Image) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Give the full model's features, each [n_tokens, width], and the tokens of its answer."""
        import torch

        from qvsplit.checkpoints.model_class import features_of, wanted_arguments
        from qvsplit.models.encoder_output import output_tensors
        from qvsplit.models.processor_proof import processor_call

        # the reference is the one of transformers from end to end
        self.model.set_attn_implementation({"text_config": self._attention})
        inputs = dict(processor_call(self.processor, [image], QUESTION, where=self.model.name_or_path))
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[name] = value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
        encode = features_of(self.model, "image")
        with torch.inference_mode():
            output = output_tensors(encode(**wanted_arguments(encode, inputs), return_dict=True))
            answer = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **GREEDY)
        return {one.key: one.rows for one in output}, answer[0, inputs["input_ids"].shape[1] :].tolist()

    def _tokens_from_store(self, row: Row, features: Features) -> list[int]:
        """Give the tokens of the answer from the stored features, by the same weights."""
        from qvsplit.models.asking import PrefixedQuestion
        from qvsplit.models.decoding import Decoding
        from qvsplit.models.language import LanguageModel
        from qvsplit.models.prompt import Placeholder

        prompt = self.prompter.ask(QUESTION, [Placeholder.from_row(row)])
        language = LanguageModel(self.model, self.prompter, self.prefix)
        question = PrefixedQuestion.of(prompt, language.prefill(prompt, [features]))
        (completion,) = language.generate([question], Decoding(max_new_tokens=NEW_TOKENS))
        return list(completion.tokens)


def _difference(stored: torch.Tensor, reference: torch.Tensor) -> float:
    """Measure the largest |difference| over the reference's largest |value|."""
    largest = reference.float().abs().max().clamp_min(1e-30)
    return float((stored.float() - reference.float()).abs().max() / largest)


def _same_bits(stored: torch.Tensor, reference: torch.Tensor) -> bool:
    import torch

    return bool(torch.equal(stored.view(torch.uint8), reference.contiguous().view(torch.uint8)))


# ----------------------------------------------------------------------------------------------------- describing


def describe(store: Store) -> dict[str, Any]:
    """Describe a store: images by status, tokens, sizes, extraction config, provenance, last runs.

        print(qvsplit.describe(qvsplit.open_store("embeds"))["tokens"])

    `copies` share the features of another row: the same bytes under another name. `without_features` are images whose
    features are in none of the shards given.
    """
    assert store.config is not None
    assert store.provenance is not None
    storage = store.storage
    return {
        **_row_counts(store),
        **_sizes(store),
        "roots": {root: _STATUSES | counts for root, counts in store.catalogue.counts().items()},
        "quarantined": [file.name for file in storage.list(layout.QUARANTINE)] if storage is not None else [],
        "rebuilding": storage is not None and bool(storage.list(layout.REBUILD)),
        "width": store.width,
        "tensors": [spec.key for spec in store.tensors or ()],
        "model": store.provenance.model,
        "revision": store.provenance.revision,
        "device": store.provenance.device,
        "versions": dict(store.provenance.versions),
        "config": store.config.to_json(),
        "failures": [
            {"root": row.root, "path": row.path, "error": row.error}
            for row in store.catalogue.rows_with_status("failed")
        ],
        "runs": last_runs(storage, LAST_RUNS) if storage is not None else [],
    }


def _row_counts(store: Store) -> dict[str, int]:
    catalogue = store.catalogue
    counts = {status: sum(one.get(status, 0) for one in catalogue.counts().values()) for status in _STATUSES}
    return {
        "images": counts["ok"],
        "copies": catalogue.copies(),
        "without_features": sum(1 for _ in catalogue.rows_without_features()),
        "failed": counts["failed"],
        "deleted": counts["deleted"],
        "superseded": sum(shard.rows for shard in catalogue.shards) - sum(counts.values()),
    }


def _sizes(store: Store) -> dict[str, int]:
    """Give tokens of the current images, shards, their bytes on disk, and the bytes of their features uncompressed."""
    assert store.token_bytes is not None
    stored_tokens = sum(shard.feature_tokens for shard in store.catalogue.shards)
    return {
        "tokens": store.catalogue.tokens(),
        "shards": len(store.catalogue.shards),
        "bytes": store.size(),
        "raw_bytes": stored_tokens * store.token_bytes,
    }
