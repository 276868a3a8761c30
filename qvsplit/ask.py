"""Answer questions about stored images: the public call. Wires a store and an engine together.

Nothing is asked until the store is shown to come from the checkpoint's own encoder (`check_encoder`). The language
model is loaded alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qvsplit.answering.checks import Question
from qvsplit.answering.engine import Engine, FeatureRef
from qvsplit.answering.evidence import check_encoder
from qvsplit.answering.local_engine import PREFIX_CACHE_TOKENS, TOKEN_BUDGET, EngineLimits, LocalEngine
from qvsplit.answering.options import MAX_NEW_TOKENS, AskOptions
from qvsplit.answering.recorder import Origin, Recorder, prompt_hash
from qvsplit.answering.requests import SKIPPED, PromptItems, Questioner
from qvsplit.answering.survey import Recall, Survey, SurveyOptions, WindowLimits
from qvsplit.checkpoints.checkpoint import Checkpoint, choose_checkpoint
from qvsplit.errors import StoreDamaged, UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.table import Table
from qvsplit.store.row import Row
from qvsplit.store.store import Store

if TYPE_CHECKING:
    from qvsplit.models.language import LanguageModel
    from qvsplit.store.features import Features

__all__ = [
    "MAX_NEW_TOKENS",
    "SKIPPED",
    "Answer",
    "AskOptions",
    "PromptItems",
    "Question",
    "Recorder",
    "Selection",
    "Session",
    "StoreReader",
    "Survey",
    "check_encoder",
    "load_session",
    "select",
]


class Session:
    """A store and the engine that may answer for it."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        *,
        options: AskOptions | None = None,
        encoder_check: str = "",
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.store = store
        self.engine = engine
        self.options = options or AskOptions()
        self.encoder_check = encoder_check
        self._checkpoint = checkpoint
        self._questioner = Questioner(engine, self.options, encoder_check, StoreReader(store).check)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint whose language model answers."""
        assert self._checkpoint is not None, "a session made without a checkpoint has none"
        return self._checkpoint

    @property
    def model(self) -> str:
        """The model as it was named."""
        return self.checkpoint.name

    @property
    def is_loaded(self) -> bool:
        """Whether the language model is in memory of this process."""
        return isinstance(self.engine, LocalEngine) and self.engine.is_loaded

    def answer(
        self, rows: Row | Sequence[Row], question: str | Question, *, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """Answer one question about one image, or about several shown together in this order.

        Args:
            rows: Rows of the store.
            question: Text, or a question with choices.
            on_text: Hears the answer's text as it grows.

        Raises:
            QvsplitError: It could not be answered.
        """
        pair = (PromptItems(_together(rows)), _question(question))
        for asked in self._questioner.ask([pair], on_text=on_text):
            if asked.error is not None:
                raise asked.error
            return asked.answer
        return self._questioner.cancelled(*pair)

    def answers(self, rows: Row | Sequence[Row], questions: Iterable[str | Question]) -> list[Answer]:
        """Answer many questions about one image, or about several shown together: one prefill for all.

        Raises:
            QvsplitError: One of them could not be answered. `survey` gives the other answers nevertheless.
        """
        if isinstance(questions, str):
            raise UsageError("give a list of questions, or ask one with Session.answer")
        survey = self.survey([PromptItems(_together(rows))], [_question(question) for question in questions])
        answers = list(survey)
        if survey.error is not None:
            raise survey.error
        return answers

    def survey(
        self,
        items: Iterable[PromptItems],
        questions: Sequence[Question],
        *,
        recall: Recall = lambda items, question: None,
        on_answer: Callable[[Answer], None] = lambda answer: None,
    ) -> Survey:
        """Ask every question of everything shown; iterate over what it gives for the answers, in that order.

        A question whose `only_if` does not hold gives an answer with the finish reason `skipped`, one that fails an
        answer with an `error`; `survey.error` is the first of these errors.

        Args:
            items: What is shown together.
            questions: Questions and checks.
            recall: Gives what is known already, and is not asked again.
            on_answer: Hears each new answer as soon as its batch is done, before those that stand before it are given.

        Raises:
            UsageError: Two different questions have one name: which of them an answer is to could not be told.
        """
        options = SurveyOptions(recall, on_answer, _window_limits(self.options))
        return Survey(self._questioner, items, questions, options)

    def recorder(self, table: Table, questions: Sequence[Question]) -> Recorder:
        """Give what puts a survey's answers into `table`, and recalls what it has. Hashes the weights, once."""
        from qvsplit.checkpoints.fingerprint import canonical_json, language_fingerprint

        assert self.store.config is not None
        origin = Origin(
            model=self.model,
            config=hashlib.sha256(canonical_json(self.store.config.to_json())).hexdigest(),
            weights=language_fingerprint(self.checkpoint),
            dtype=expected_dtype(self.checkpoint, self.options),
        )
        return Recorder(table, origin, {q.name: prompt_hash(q, self.options) for q in questions}, self.store.current)

    def dtype_note(self) -> str | None:
        """Say what a user should know where encoder and language model compute in different dtypes; None if not."""
        assert self.store.config is not None
        mine, theirs = expected_dtype(self.checkpoint, self.options), self.store.config.compute_dtype
        if mine == theirs:
            return None
        if mine.startswith(_QUANTISED):
            return f"the store was computed in {theirs}, and the language model is {mine}"
        return (
            f"the store was computed in {theirs}, answers are in {mine}: they are those of encoder and language model "
            f"in these dtypes, not of a full model in one; --dtype {theirs} makes them so"
        )


class StoreReader:
    """Gives an engine what requests name, from a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, row: Row) -> None:
        """Raise QvsplitError if the row has no features: it is failed, say, or they are in no shard given."""
        if row.status != "ok" or self._store.home(row.content) is None:
            self._store.features(row)  # says why

    def row(self, ref: FeatureRef) -> Row:
        """Give the row that holds these features. StoreDamaged if none does."""
        row = self._store.home(ref)
        if row is None:
            raise StoreDamaged(f"the features of {ref.sha256[:12]}… are in no shard given; give the whole store")
        return row

    def features(self, ref: FeatureRef) -> Features:
        """Give the checked features. StoreDamaged if no row has them, or they are not those that were written."""
        return self._store.features(self.row(ref))


def load_session(store: Store, options: AskOptions | None = None, *, loaded: bool = True) -> Session:
    """Check that `store` belongs to the model, and load the language model; if not `loaded`, when it is first used.

    Raises:
        ConfigError: The store does not belong to the model, or nothing shows that it does.
        ModelError: The model cannot be loaded.
    """
    options = options or AskOptions()
    options.check()
    assert store.provenance is not None
    checkpoint = choose_checkpoint(
        options.model, "language", own=store.provenance.model, revision=store.provenance.revision
    )
    evidence = check_encoder(store, checkpoint, allow_unchecked=options.unchecked_encoder)
    limits = EngineLimits(options.token_budget, options.prefix_cache_tokens)
    engine = LocalEngine(lambda: _load(checkpoint, options), StoreReader(store), limits)
    if loaded:
        _ = engine.language
    return Session(store, engine, options=options, encoder_check=evidence, checkpoint=checkpoint)


def _load(checkpoint: Checkpoint, options: AskOptions) -> LanguageModel:
    from qvsplit.models import language
    from qvsplit.runtime import devices

    spread = options.device == "auto"
    device = devices.choose_device(None if spread else options.device)
    dtype = None  # a quantised checkpoint's own
    if options.dtype is not None:
        dtype = devices.choose_dtype(options.dtype, device, "")
    elif "quantization_config" not in checkpoint.config:
        dtype = devices.choose_dtype(None, device, checkpoint.stored_dtype("language"))
    return language.load(checkpoint, device=device, dtype=dtype, device_map="auto" if spread else None)


_QUANTISED = "quantised by"


def expected_dtype(checkpoint: Checkpoint, options: AskOptions) -> str:
    """Name the dtype that answers will be computed in, without loading the model; or how it is quantised."""
    if options.dtype is not None:
        return options.dtype
    if "quantization_config" in checkpoint.config:
        return f"{_QUANTISED} {checkpoint.config['quantization_config'].get('quant_method', 'its own way')}"
    return checkpoint.stored_dtype("language") if _device_type(options) == "cuda" else "float32"


def _device_type(options: AskOptions) -> str:
    from qvsplit.runtime import devices

    return "cuda" if devices.is_cuda(None if options.device == "auto" else options.device) else "cpu"


def _window_limits(options: AskOptions) -> WindowLimits:
    """Give windows whose prefixes all fit into the engine's cache, with room to spare for a shared beginning."""
    kind = _device_type(options)
    budget = options.token_budget or TOKEN_BUDGET[kind]
    cached = options.prefix_cache_tokens or PREFIX_CACHE_TOKENS[kind]
    return WindowLimits(tokens=min(budget, cached) * 7 // 8)


# --------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Selection:
    """What was chosen of a store: `rows` that can be asked about, and those that `failed` when they were extracted.

    The latter are no answer's: whoever gives verdicts must say that they have none.
    """

    rows: list[Row]
    failed: list[Row]


def select(store: Store, globs: Sequence[str] = (), *, only: int | None = None) -> Selection:
    """Choose the rows that one of `globs` matches, by path or by file name; all without globs.

    Raises:
        UsageError: There are none, neither sound nor failed; or another number of sound ones than `only`.
    """
    matching = [row for row in store.rows if not globs or any(_matches(row, pattern) for pattern in globs)]
    rows = [row for row in matching if row.status == "ok"]
    failed = [row for row in matching if row.status == "failed"]
    named = " ".join(globs)
    if only is not None and len(rows) != only:
        raise UsageError(f"{named} matches {len(rows)} of the store's {len(store)} images, not {only}")
    if not rows and not failed and globs:
        raise UsageError(f"--image {named} matches none of the store's {len(store)} images")
    if not rows and not failed:
        raise UsageError("the store holds no image that can be asked; `qvsplit inspect` says what is in it")
    return Selection(rows, failed)


def _matches(row: Row, pattern: str) -> bool:
    return any(
        name == pattern or fnmatchcase(name, pattern)
        for name in (row.path, row.path.rsplit("/", 1)[-1], f"{row.root}/{row.path}")
    )


def _together(rows: Row | Sequence[Row]) -> tuple[Row, ...]:
    return (rows,) if isinstance(rows, Row) else tuple(rows)


def _question(question: str | Question) -> Question:
    return question if isinstance(question, Question) else Question(question)
