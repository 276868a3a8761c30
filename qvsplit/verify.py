"""Is an album what it says it is? Checksums and structure; and, with the whole checkpoint, answers against it.

The reference is the unsplit model of transformers on `AutoProcessor(upright RGB picture)` with the recipe's pixel
limits: its own embeddings and its own greedy tokens, one picture at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvsplit import images
from qvsplit.album import REBUILD, Album, counts
from qvsplit.ask import check_tower
from qvsplit.checkpoint import choose_checkpoint
from qvsplit.compact import ASIDE, mark_damage
from qvsplit.errors import PictureError, QvsplitError, ShardDamaged, some_of
from qvsplit.folders import Found
from qvsplit.runs import last_runs
from qvsplit.store import Row, Shard

QUESTION = "Describe the picture."
NEW_TOKENS = 16
LAST_RUNS = 5
# Whatever the checkpoint's generation_config.json says of sampling (the hub's says: sample)
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
# Largest |difference| over largest |value| that another batch, machine or library version may make, by the coarser
# of compute and stored dtype: some tens of units in the last place, as the tower's layers add up; of int8 what it
# rounds away, half of a 127th.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2, "int8": 6e-3}


@dataclass(frozen=True)
class ShardCheck:
    """One shard, read from end to end. `error` is None if it is sound."""

    shard: str
    rows: int
    tokens: int
    error: str | None


@dataclass(frozen=True)
class PictureCheck:
    """One picture, held against the unsplit model. `skipped` says why it could not be."""

    path: str
    skipped: str | None = None
    same_bits: bool = False
    max_difference: float | None = None  # None where the shapes differ; else largest |difference| over largest |value|
    same_tokens: bool = False
    within_tolerance: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the album may be trusted by this picture."""
        return self.skipped is not None or (self.same_tokens and self.within_tolerance)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def check_shards(paths: Sequence[Path]) -> Iterator[ShardCheck]:
    """Read every byte of every shard: page checksums, structure, lengths, finite values.

    A damaged one is marked, so that the next `extract` sets it aside and sees its pictures anew.
    """
    for path in paths:
        rows = tokens = 0
        try:
            for _, _, embeds in Shard(path):
                rows += 1
                tokens += embeds.n_tokens if embeds is not None else 0
        except QvsplitError as error:
            told = str(error)
            if isinstance(error, ShardDamaged) and not mark_damage(path, error.what):
                told += " (delete it first, as that could not be written down beside it)" if path.exists() else ""
            yield ShardCheck(str(path), rows, tokens, told)
        else:
            yield ShardCheck(str(path), rows, tokens, None)


def check_album(album: Album) -> list[str]:
    """What is wrong between shards, in a line or none: pictures whose embeddings are in none of them."""
    lost = [row.path for row in album if row.sha256 is None or album.home(row.sha256) is None]
    if not lost:
        return []
    return [
        f"the embeddings of {len(lost):,} pictures are in no shard given ({some_of(lost, 3)}); run `qvsplit extract` "
        "again to make them anew"
    ]


def sample(album: Album, number: int) -> list[Row]:
    """`number` pictures, evenly spread over the album: the same ones every time."""
    rows = list(album)
    step = max(1.0, len(rows) / max(number, 1))
    return [rows[int(i * step)] for i in range(min(number, len(rows)))]


def check_pictures(
    album: Album, rows: Sequence[Row], *, model: str | None = None, device: str | None = None
) -> Iterator[PictureCheck]:
    """Recompute `rows` with the unsplit model and compare embeddings and tokens."""
    import torch

    from qvsplit import devices
    from qvsplit.prompt import Prompter
    from qvsplit.weights import load_whole

    assert album.recipe is not None
    assert album.made is not None
    checkpoint = choose_checkpoint(model, "both", own=album.made.model, revision=album.made.revision)
    check_tower(album, checkpoint)
    where = devices.choose_device(device)
    dtype = getattr(torch, album.recipe.compute_dtype)
    whole = load_whole(checkpoint, dtype=dtype, device=where)
    prompter = Prompter(checkpoint)
    limits = album.recipe.processor
    prompter.processor.image_processor.size = {
        "shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]
    }  # fmt: skip
    for row in rows:
        try:
            image = _unchanged(row)
        except PictureError as error:
            yield PictureCheck(row.path, skipped=f"its file {error}")
        else:
            yield _check_picture(album, row, image, whole, prompter)


def _unchanged(row: Row) -> Any:
    file = images.read(Found(row.root, row.path, row.size, 0))
    if file.sha256 != row.sha256:
        raise PictureError("has changed since")
    return images.decode(file.data)


def _check_picture(album: Album, row: Row, image: Any, whole: Any, prompter: Any) -> PictureCheck:
    import torch

    from qvsplit.language import Asked, Decoding, Language, as_tensor

    assert album.recipe is not None
    whole.set_attn_implementation("sdpa")  # the reference is transformers' own from end to end
    processor = prompter.processor
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(whole.device)
    stored = album.embeds(row)
    mine = as_tensor(stored)
    with torch.inference_mode():
        theirs = whole.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        ).pooler_output[0]
        answer = whole.generate(**inputs, max_new_tokens=NEW_TOKENS, **GREEDY)
    reference = theirs.to(mine.dtype).cpu()
    if reference.shape != mine.shape:
        return PictureCheck(row.path, max_difference=None)
    expected = answer[0, inputs["input_ids"].shape[1] :].tolist()
    prompt = prompter.ask(QUESTION, [stored.grid_thw], merge_size=album.recipe.merge_size)
    unsplit = Language(whole, prompter)
    asked = Asked(unsplit.prefill(prompt, [mine]), prompt.input_ids[prompt.prefix_tokens :])
    (got,) = unsplit.generate([asked], Decoding(max_new_tokens=NEW_TOKENS))
    difference = float((mine.float() - reference.float()).abs().max() / reference.float().abs().max().clamp_min(1e-30))
    return PictureCheck(
        row.path,
        same_bits=torch.equal(mine.view(torch.uint8), reference.contiguous().view(torch.uint8)),
        max_difference=difference,
        same_tokens=got.tokens == expected,
        within_tolerance=difference <= max(TOLERANCE[album.recipe.compute_dtype], TOLERANCE[album.recipe.stored_dtype]),
    )


def _by_root(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Each root's rows by status."""
    roots: dict[str, dict[str, int]] = {}
    for row in rows:
        tally = roots.setdefault(row.root, {"ok": 0, "failed": 0, "gone": 0})
        tally[row.status] += 1
    return roots


def describe(album: Album) -> dict[str, Any]:
    """What `qvsplit inspect` tells: pictures by state, tokens, sizes, recipe, where the rows came from, last runs.

    `copies` show embeddings that another row holds: the same bytes, a new name, a new stat. `lost` ones are in no
    shard.
    """
    from qvsplit.recipe import token_bytes

    recipe, made = album.recipe, album.made
    assert recipe is not None
    assert made is not None
    assert album.hidden_size is not None
    folders = {shard.path.parent for shard in album.shards}
    folder = next(iter(folders)) if len(folders) == 1 else None
    names = os.listdir(folder) if folder is not None else []
    rows = album.rows
    lost = [row for row in album if row.sha256 is None or album.home(row.sha256) is None]
    tally = counts(rows)
    held = [row for shard in album.shards for row in shard.rows if row.has_embeds]
    raw = sum(row.n_tokens or 0 for row in held) * token_bytes(recipe.stored_dtype, album.hidden_size)
    size = sum(os.path.getsize(shard.path) for shard in album.shards)
    return {
        "pictures": tally["ok"],
        "copies": sum(row.status == "ok" and not row.has_embeds for row in rows) - len(lost),
        "lost": len(lost),
        "failed": tally["failed"],
        "gone": tally["gone"],
        "superseded": sum(len(shard.rows) for shard in album.shards) - len(rows),
        "roots": _by_root(rows),
        "set_aside": sorted(name for name in names if name.endswith(ASIDE)),
        "rebuilding": REBUILD in names,
        "tokens": sum(row.n_tokens or 0 for row in album),
        "shards": len(album.shards),
        "bytes": size,
        "raw_bytes": raw,
        "hidden_size": album.hidden_size,
        "model": made.model,
        "revision": made.revision,
        "device": made.device,
        "versions": dict(made.versions),
        "recipe": recipe.to_json(),
        "failures": [
            {"root": row.root, "path": row.path, "error": row.error} for row in rows if row.status == "failed"
        ],
        "runs": last_runs(folder, LAST_RUNS) if folder is not None else [],
    }
