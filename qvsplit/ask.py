"""Rows × questions to answers: the album's rows, checked; the language half, loaded alone.

Nothing is asked until the album is shown to come from the checkpoint's own tower (`check_tower`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from qvsplit.album import Album
from qvsplit.checkpoint import Checkpoint, choose_checkpoint
from qvsplit.errors import RecipeError, UsageError
from qvsplit.store import Row

if TYPE_CHECKING:
    from qvsplit.language import Language

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """What asking may be told. None is the album's own, or the default."""

    model: str | None = None
    device: str | None = None  # `auto` spreads the model over all devices, as transformers does
    dtype: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    system: str | None = None
    unchecked_tower: bool = False


@dataclass(frozen=True)
class Answer:
    """One answer, and the evidence (`tower_check`) that its embeddings belong to the model."""

    rows: tuple[Row, ...]
    question: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    tower_check: str

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it: `path`, or `paths` where pictures were asked together."""
        paths, roots = [row.path for row in self.rows], [row.root for row in self.rows]
        alone = len(paths) == 1
        named: dict[str, Any] = {"path": paths[0], "root": roots[0]} if alone else {"paths": paths, "roots": roots}
        return named | {
            "question": self.question,
            "answer": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "tower_check": self.tower_check,
        }


class Asker:
    """An album and the language half that may answer for it."""

    def __init__(self, album: Album, language: Language, *, settings: Settings, tower_check: str, model: str) -> None:
        self.album = album
        self.language = language
        self.settings = settings
        self.tower_check = tower_check
        self.model = model

    def answer(
        self, rows: Row | Sequence[Row], question: str, *, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to one question about one picture, or about several shown together in this order."""
        from qvsplit.language import as_tensor

        together = (rows,) if isinstance(rows, Row) else tuple(rows)
        if not together:
            raise UsageError("no picture to ask about")
        stored = [self.album.embeds(row) for row in together]
        assert self.album.recipe is not None
        prompt = self.language.prompter.ask(
            question,
            [embeds.grid_thw for embeds in stored],
            merge_size=self.album.recipe.merge_size,
            system=self.settings.system,
        )
        completion = self.language.generate(
            prompt,
            [as_tensor(embeds) for embeds in stored],
            max_new_tokens=self.settings.max_new_tokens,
            on_text=on_text,
        )
        return Answer(
            rows=together,
            question=question,
            text=self.language.prompter.decode(completion.tokens),
            tokens=completion.tokens,
            prompt_tokens=len(prompt.input_ids),
            finish_reason=completion.finish_reason,
            tower_check=self.tower_check,
        )

    def dtype_note(self) -> str | None:
        """What a user should know where the two halves compute in different dtypes; None where they do not."""
        from qvsplit.devices import dtype_name

        assert self.album.recipe is not None
        mine, theirs = dtype_name(self.language.dtype), self.album.recipe.compute_dtype
        if mine == theirs:
            return None
        return (
            f"the album was computed in {theirs}, answers are in {mine}: they are those of the two halves in these "
            f"dtypes, not of a whole model in one; --dtype {theirs} makes them so"
        )


def open_asker(album: Album, settings: Settings | None = None) -> Asker:
    """Check that `album` belongs to the model, then load the model's language half.

    RecipeError if it does not, or if nothing shows that it does; ModelError if the model cannot be loaded.
    """
    from qvsplit import devices, language
    from qvsplit.weights import stored_dtype

    settings = settings or Settings()
    if settings.max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    assert album.made is not None
    checkpoint = choose_checkpoint(settings.model, "language", own=album.made.model, revision=album.made.revision)
    spread = settings.device == "auto"
    device = devices.choose_device(None if spread else settings.device)
    evidence = check_tower(album, checkpoint, allow_unchecked=settings.unchecked_tower)
    dtype = None  # a quantised checkpoint's own
    if settings.dtype is not None:
        dtype = devices.choose_dtype(settings.dtype, device, "")
    elif "quantization_config" not in checkpoint.config:
        dtype = devices.choose_dtype(None, device, stored_dtype(checkpoint, "language"))
    loaded = language.load(checkpoint, device=device, dtype=dtype, device_map="auto" if spread else None)
    return Asker(album, loaded, settings=settings, tower_check=evidence, model=checkpoint.name)


def select(album: Album, globs: Sequence[str] = ()) -> list[Row]:
    """The rows that can be asked and that one of `globs` matches, by path or by file name; all without globs."""
    rows = [row for row in album if not globs or any(_matches(row, pattern) for pattern in globs)]
    if not rows and globs:
        raise UsageError(f"--image {' '.join(globs)} matches none of the album's {len(album)} pictures")
    if not rows:
        raise UsageError("the album holds no picture that can be asked; `qvsplit inspect` says what is in it")
    return rows


def _matches(row: Row, pattern: str) -> bool:
    return any(
        name == pattern or fnmatchcase(name, pattern)
        for name in (row.path, row.path.rsplit("/", 1)[-1], f"{row.root}/{row.path}")
    )


def check_tower(album: Album, checkpoint: Checkpoint, *, allow_unchecked: bool = False) -> str:
    """The evidence that `album` was made by the tower of `checkpoint`; RecipeError if there is none, or against it.

    `fingerprint`: computed from the tower at hand. `note`: from the note of a language-only checkpoint of ours.
    `revision`: the same name and commit on the hub. `unchecked`: none, and the user said that will do.
    """
    from qvsplit.weights import fingerprint, noted_fingerprint

    recipe, made = album.recipe, album.made
    assert recipe is not None
    assert made is not None
    _check_fit(album, checkpoint)
    noted = None
    if checkpoint.has("vision"):
        evidence, noted = "fingerprint", fingerprint(checkpoint)
    elif (noted := noted_fingerprint(checkpoint)) is not None:
        evidence = "note"
    elif checkpoint.revision is not None and (made.model, made.revision) == (checkpoint.name, checkpoint.revision):
        return "revision"
    elif allow_unchecked:
        return "unchecked"
    else:
        raise RecipeError(
            f"nothing shows that the album was made by the tower of {checkpoint.name}: it has none at hand; "
            "use a checkpoint with its tower, or take the responsibility with --unchecked-tower"
        )
    if noted != recipe.tower:
        raise RecipeError(
            f"the album was made by another tower (tower: {recipe.tower[:12]}…, and {checkpoint.name} has "
            f"{noted[:12]}…); ask with the model it was made with ({made.model}), or extract again"
        )
    return evidence


def _check_fit(album: Album, checkpoint: Checkpoint) -> None:
    """RecipeError where family, processor or widths alone show that album and checkpoint are strangers."""
    from qvsplit.families import settings_of

    recipe = album.recipe
    assert recipe is not None
    vision = settings_of(checkpoint.vision_config, checkpoint.family.vision_settings)
    processor = settings_of(checkpoint.processor_config, checkpoint.family.processor_settings)
    pairs = {f"processor.{name}": (recipe.processor.get(name), value) for name, value in processor.items()}
    pairs |= {
        "family": (recipe.family, checkpoint.family.model_type),
        "hidden_size": (album.hidden_size, vision["hidden_size"]),
        "merge_size": (recipe.merge_size, vision["spatial_merge_size"]),
    }
    wrong = [f"{name}: {mine}, not {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        raise RecipeError(
            f"the album does not fit {checkpoint.name} ({'; '.join(wrong)}); ask with the model it was made with"
        )
