"""The demo: a small Qwen2-VL in the package, a dozen drawn postcards, and the right answers about them.

`checkpoint/` was trained from nothing on such postcards (tools/train_demo/) and goes through the same code as any
other checkpoint. `truth.json` has the questions and, for every postcard, the right answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsplit.answering.checks import Question
from qvsplit.ask import AskOptions, PromptItems, load_session
from qvsplit.checkpoints.opening import DEMO_MODEL
from qvsplit.errors import ConfigError, DiskError, QvsplitError, UsageError
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.runtime import interrupts
from qvsplit.runtime.loading import OnLoad, nobody
from qvsplit.runtime.names import stored_name
from qvsplit.store.opening import open_store

if TYPE_CHECKING:
    from qvsplit.answering.survey import Survey
    from qvsplit.pipeline.summary import ExtractCallbacks, Summary
    from qvsplit.store.row import Row

HERE = Path(__file__).parent
POSTCARDS = HERE / "postcards"


@dataclass(frozen=True)
class DemoAnswer:
    """One answer from the store, and the right one: None for an image that is not the package's.

    `error` says why there is no answer.
    """

    path: str
    question: str
    answer: str
    truth: str | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give it as `--json` prints it: an `error` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "error" or value is not None}


@dataclass(frozen=True)
class DemoOutcome:
    """What a demo did: the extraction, and the answers from the store.

    Attributes:
        photos: The folder of the postcards.
        store: The folder of the store.
        summary: What the extraction did.
        rows: The images that were asked about.
        answers: To every question about every image.
        ask_seconds: For answering alone, after the language model was loaded.
        error: That of the first question that could not be answered.
    """

    photos: Path
    store: Path
    summary: Summary
    rows: tuple[Row, ...]
    answers: tuple[DemoAnswer, ...]
    ask_seconds: float
    error: QvsplitError | None = None

    @property
    def right(self) -> int:
        """Answers that are the right one, word for word."""
        return sum(one.answer == one.truth for one in self.answers)

    @property
    def answered(self) -> int:
        """Questions that have an answer, right or wrong."""
        return sum(one.error is None for one in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens in the store: the same image under two names is stored once."""
        return sum({row.content: row.n_tokens or 0 for row in self.rows}.values())

    @property
    def store_bytes(self) -> int:
        """Bytes of all its shards."""
        return sum(shard.stat().st_size for shard in self.store.glob("*.parquet"))


def truths() -> tuple[list[str], dict[str, list[str]]]:
    """Give the questions, and for every postcard that can be read their right answers in the same order."""
    content = json.loads((HERE / "truth.json").read_text(encoding="utf-8"))
    return content["questions"], content["answers"]


def copy_postcards(folder: Path) -> Path:
    """Copy the postcards into `folder`/postcards, except those that are there already; gives that folder.

    Raises:
        UsageError: `folder` is a file.
        DiskError: It cannot be written.
    """
    target = folder / POSTCARDS.name
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give a folder for the demo's postcards and store")
        for source in sorted(path for path in POSTCARDS.rglob("*") if path.is_file()):
            copy = target / source.relative_to(POSTCARDS)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                part = copy.with_name(copy.name + ".part")
                shutil.copy2(source, part)
                os.replace(part, copy)
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}); give another FOLDER") from None
    return target


def run(
    folder: Path,
    *,
    device: str | None = None,
    callbacks: ExtractCallbacks | None = None,
    on_asking: Callable[[int], None] = lambda answers: None,
    on_answer: Callable[[str], None] = lambda path: None,
    on_load: OnLoad = nobody,
) -> DemoOutcome:
    """Copy the postcards, extract them into `folder`/store, and ask every question about each from there alone.

    Args:
        folder: Created if need be.
        device: As for `extract_files`.
        callbacks: Called while images are extracted.
        on_asking: Called with the number of answers there will be.
        on_answer: Called with the path of the image after each answer.
        on_load: Called while the language model is loaded: see `load_session`.

    Raises:
        QvsplitError: What `extract_files` and `load_session` raise.
    """
    photos, place = copy_postcards(folder), folder / "store"
    # float32 on a GPU too: the answers are those of docs/demo.md everywhere
    options = ExtractOptions(model=DEMO_MODEL, device=device, dtype="float32")
    try:
        summary = extract_files([photos], out=place, options=options, callbacks=callbacks)
        store = open_store(place)
        root = stored_name(os.path.realpath(photos))
        rows = tuple(row for row in store if row.root == root)
        with interrupts.at_once():  # only reading
            session = load_session(store, AskOptions(model=DEMO_MODEL, device=device, dtype="float32"), on_load=on_load)
    except ConfigError as error:
        raise ConfigError(f"{place} was not made by this demo ({error}); give another FOLDER, or remove it") from None
    on_asking(len(rows) * len(truths()[0]))
    began = time.perf_counter()
    survey = session.survey([PromptItems((row,)) for row in rows], [Question(text) for text in truths()[0]])
    answers = tuple(_answers(survey, rows, on_answer))
    return DemoOutcome(photos, place, summary, rows, answers, time.perf_counter() - began, survey.error)


def _answers(survey: Survey, rows: Sequence[Row], on_answer: Callable[[str], None]) -> Iterator[DemoAnswer]:
    questions, right_answers = _right_answers_by_content()
    for row in rows:
        right = right_answers.get(row.sha256 or "", [None] * len(questions))
        for question, truth in zip(questions, right, strict=True):
            answer = next(survey)
            yield DemoAnswer(row.path, question, answer.text, truth, answer.error)
            on_answer(row.path)
            interrupts.check()


def _right_answers_by_content() -> tuple[list[str], Mapping[str, list[str] | list[None]]]:
    """Give right answers by the SHA-256 of a postcard's file: an image of a user's own may have any name."""
    questions, answers = truths()
    return questions, {
        hashlib.sha256((POSTCARDS / name).read_bytes()).hexdigest(): right for name, right in answers.items()
    }
