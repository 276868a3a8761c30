"""The whole way in a minute: a small Qwen2-VL that lies in the package, a dozen drawn postcards, and their truth.

`checkpoint/` was trained from nothing on such postcards (tools/train_demo/) and goes through exactly the code that
any other checkpoint goes through. `truth.json` has the questions and, for every postcard, the right answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsplit import folders, interrupts
from qvsplit.album import open_album
from qvsplit.ask import Settings as AskSettings
from qvsplit.ask import Shown, open_asker
from qvsplit.checkpoint import DEMO_MODEL
from qvsplit.checks import Question
from qvsplit.errors import DiskError, RecipeError, UsageError
from qvsplit.extract import Settings as ExtractSettings
from qvsplit.extract import Summary, Watcher, extract_pictures
from qvsplit.store import Row

HERE = Path(__file__).parent
POSTCARDS = HERE / "postcards"


@dataclass(frozen=True)
class Told:
    """One answer from the album, and what would have been right: None for a picture that is not the package's."""

    path: str
    question: str
    answer: str
    truth: str | None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"path": self.path, "question": self.question, "answer": self.answer, "truth": self.truth}


@dataclass(frozen=True)
class Outcome:
    """What a demo did: the extraction, and the questions asked of what it stored."""

    photos: Path
    album: Path
    extracted: Summary
    rows: tuple[Row, ...]
    told: tuple[Told, ...]
    ask_seconds: float  # answering alone, the language half loaded

    @property
    def right(self) -> int:
        """Answers that are the truth, word for word."""
        return sum(one.answer == one.truth for one in self.told)

    @property
    def tokens(self) -> int:
        """Stored: the same picture under two names is stored once."""
        return sum({row.sha256: row.n_tokens or 0 for row in self.rows}.values())

    @property
    def album_bytes(self) -> int:
        """Of all its shards."""
        return sum(shard.stat().st_size for shard in self.album.glob("*.parquet"))


def truths() -> tuple[list[str], dict[str, list[str]]]:
    """The questions, and for every postcard that can be read their right answers in the same order."""
    told = json.loads((HERE / "truth.json").read_text(encoding="utf-8"))
    return told["questions"], told["answers"]


def lay_out(folder: Path) -> Path:
    """Copy the postcards into `folder`/postcards, but those that are there already; gives that folder.

    UsageError where `folder` is a file, DiskError where it cannot be written.
    """
    target = folder / POSTCARDS.name
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give a folder for the demo's postcards and album")
        for source in sorted(path for path in POSTCARDS.rglob("*") if path.is_file()):
            copy = target / source.relative_to(POSTCARDS)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                half = copy.with_name(copy.name + ".part")
                shutil.copy2(source, half)
                os.replace(half, copy)
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}); give another FOLDER") from None
    return target


def run(
    folder: Path,
    *,
    device: str | None = None,
    watcher: Watcher | None = None,
    on_asking: Callable[[int], None] = lambda questions: None,
    on_answer: Callable[[str], None] = lambda path: None,
) -> Outcome:
    """Lay out the postcards, extract them into `folder`/album, and ask every question of every one from there alone.

    `on_asking` hears how many answers there will be, `on_answer` each picture as it is answered. Raises what
    `extract_pictures` and `open_asker` raise.
    """
    photos, album_folder = lay_out(folder), folder / "album"
    # float32 on a GPU too: the answers are those of docs/demo.md everywhere
    extract_settings = ExtractSettings(model=DEMO_MODEL, device=device, dtype="float32")
    try:
        extracted = extract_pictures([photos], out=album_folder, settings=extract_settings, watcher=watcher)
        album = open_album(album_folder)
        (root,) = folders.starts_of([photos])
        rows = tuple(row for row in album if row.root == folders.stored_name(root))
        with interrupts.at_once():  # only reading
            asker = open_asker(album, AskSettings(model=DEMO_MODEL, device=device, dtype="float32"))
    except RecipeError as error:
        raise RecipeError(
            f"{album_folder} was not made by this demo ({error}); give another FOLDER, or remove it"
        ) from None
    questions, answers = _answers_by_content()
    on_asking(len(rows) * len(questions))
    began = time.perf_counter()

    def ask() -> Iterator[Told]:
        surveyed = asker.survey([Shown((row,)) for row in rows], [Question(text) for text in questions])
        for row in rows:
            right = answers.get(row.sha256 or b"", [None] * len(questions))
            for question, truth in zip(questions, right, strict=True):
                yield Told(row.path, question, next(surveyed).text, truth)
                on_answer(row.path)
                interrupts.check()

    told = tuple(ask())
    return Outcome(photos, album_folder, extracted, rows, told, time.perf_counter() - began)


def _answers_by_content() -> tuple[list[str], Mapping[bytes, list[str] | list[None]]]:
    """Right answers by the SHA-256 of a postcard's file: a picture of a user's own may have any name."""
    questions, answers = truths()
    return questions, {hashlib.sha256((POSTCARDS / name).read_bytes()).digest(): told for name, told in answers.items()}
