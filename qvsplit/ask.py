"""Answer questions about stored items, or from features at hand: the public calls. Wires features and engine together.

Nothing is asked until the features are shown to come from the checkpoint's own encoder (answering/evidence.py). The
language model is loaded alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

from qvsplit.answering.at_hand import FeaturesAtHand
from qvsplit.answering.checks import Question
from qvsplit.answering.collection import Collection
from qvsplit.answering.engine import Engine, FeatureRef
from qvsplit.answering.evidence import check_encoder, check_features
from qvsplit.answering.given import a_callback, a_question, each, questions_of, turns_of
from qvsplit.answering.loading import QUANTISED, device_type, engine_for, expected_dtype, window_limits
from qvsplit.answering.local_engine import LocalEngine
from qvsplit.answering.options import MAX_NEW_TOKENS, AskOptions
from qvsplit.answering.recorder import Origin, Recorder, prompt_hash
from qvsplit.answering.requests import SKIPPED, PromptItems, Questioner
from qvsplit.answering.survey import Recall, Survey, SurveyOptions
from qvsplit.checkpoints.adapter import open_adapter
from qvsplit.checkpoints.checkpoint import Checkpoint
from qvsplit.checkpoints.opening import choose_checkpoint, open_checkpoint
from qvsplit.errors import StoreDamaged, UsageError
from qvsplit.output.answer import Answer
from qvsplit.output.names import shown_name
from qvsplit.output.table import Table
from qvsplit.runtime import arguments
from qvsplit.runtime.loading import OnLoad, nobody
from qvsplit.store.config import PREPARED_ON, ExtractionConfig
from qvsplit.store.features import POOLER_OUTPUT, Features
from qvsplit.store.opening import open_store
from qvsplit.store.row import Row

__all__ = [
    "MAX_NEW_TOKENS",
    "SKIPPED",
    "Answer",
    "AskOptions",
    "FeatureSession",
    "PromptItems",
    "Question",
    "Recorder",
    "Session",
    "StoreReader",
    "Survey",
    "check_encoder",
    "load_language_model",
    "load_session",
]

Named = Row | str | PathLike[str]  # a row, or its name in the store
Rows = Named | Sequence[Named]
Asked = str | Question
_NAMED = (Row, str, PathLike)
_ROWS = "a row of the store, its name, or several of these"
_FEATURES = "features, or a list of them"
_NOTHING = "store: there are no rows in it; extract images or videos into it first"


class Session:
    """A store, or files at hand, and the language model that may answer for it. Made by `load_session`.

        session = qvsplit.load_session("embeds")
        print(session.answer("cat.jpg", "What is in the image?").text)

    Attributes:
        store: The store, or what stands for one.
        engine: What answers.
        options: How it answers.
        encoder_check: What shows that the store was made by the encoder of the model: see `Answer.encoder_check`.
    """

    def __init__(
        self,
        store: Collection,
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
        """The model as it was named, and the adapter if it has one."""
        return self.checkpoint.label

    @property
    def is_loaded(self) -> bool:
        """Whether the language model is in memory of this process."""
        return isinstance(self.engine, LocalEngine) and self.engine.is_loaded

    def answer(
        self,
        rows: Rows,
        question: Asked,
        *,
        earlier: Iterable[tuple[str, str]] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question about one image or video, or about several shown together in this order.

            first = session.answer("cat.jpg", "What is in the image?")
            session.answer("cat.jpg", "What colour is it?", earlier=[(first.question, first.text)])

        Args:
            rows: A row of the store, its name, or several of these. A video in several parts is named with the part:
                `film.mp4#1`.
            question: Text, or a question with choices.
            earlier: The questions of the same conversation before it, each with its answer: the prompt has them, as the
                chat template writes several turns.
            on_text: Hears the answer's text as it grows.

        Raises:
            QvsplitError: It could not be answered. UsageError where the model's chat template takes no earlier answers.
        """
        items = replace(self._shown(rows), earlier=turns_of(earlier))
        return _answer(self._questioner, items, a_question(question), on_text)

    def over(self, store: Collection, *, system: str | None) -> Session:
        """Give a session of another collection on the same language model, with another system message.

        Both may be used, one call at a time. Sessions of one collection share their prefix cache; those of two share
        the language model alone, as the same file may have other features in each.

        Raises:
            UsageError: There is nothing to ask about in it, or the engine cannot answer for another collection.
            ConfigError: Nothing shows that its features come from the encoder of the model.
        """
        engine, evidence = self.engine, self.encoder_check
        if store is not self.store:
            if store.provenance is None:
                raise UsageError(_NOTHING)
            evidence = check_encoder(store, self.checkpoint, allow_unchecked=self.options.unchecked_encoder)
            if not isinstance(engine, LocalEngine):
                raise UsageError("store: this engine answers for one store alone; load a session of the other one")
            engine = engine.over(StoreReader(store))
        options = replace(self.options, system=system)
        return Session(store, engine, options=options, encoder_check=evidence, checkpoint=self._checkpoint)

    def answers(self, rows: Rows, questions: Iterable[Asked]) -> list[Answer]:
        """Answer many questions about one image or video, or about several shown together: one prefill for all.

        Raises:
            QvsplitError: One of them could not be answered. `survey` gives the other answers nevertheless.
        """
        return _answers(self.survey([self._shown(rows)], questions_of(questions)))

    def survey(
        self,
        items: Iterable[PromptItems | Rows],
        questions: Iterable[Asked],
        *,
        recall: Recall = lambda items, question: None,
        on_answer: Callable[[Answer], None] = lambda answer: None,
    ) -> Survey:
        """Ask every question of everything shown; iterate over what it gives for the answers, in that order.

            for answer in session.survey(session.store, ["Is there a dog?", "Day or night?"]):
                print(answer.rows[0].path, answer.question, answer.text)

        A question whose `only_if` does not hold gives an answer with the finish reason `skipped`, one that fails an
        answer with an `error`; `survey.error` is the first of these errors.

        Args:
            items: Rows or names of rows; several that are shown together in a list of their own.
            questions: Texts, questions and checks.
            recall: Gives what is known already, and is not asked again.
            on_answer: Hears each new answer as soon as its batch is done, before those that stand before it are given.

        Raises:
            UsageError: Two different questions have one name: which of them an answer is to could not be told.
        """
        if isinstance(items, Row | PromptItems | str | PathLike | Mapping) or not isinstance(items, Iterable):
            raise arguments.wrong("items", items, "a list of rows or names")
        shown = (one if isinstance(one, PromptItems) else self._shown(one) for one in items)
        options = SurveyOptions(recall, a_callback("on_answer", on_answer), window_limits(self.options))
        return Survey(self._questioner, shown, questions_of(questions), options)

    def _shown(self, rows: Rows) -> PromptItems:
        """Give the rows that are named. UsageError for what is none of this store."""
        return PromptItems(tuple(self._row(one, place) for one, place in each(rows, "rows", _NAMED, _ROWS)))

    def _row(self, named: Named, place: str) -> Row:
        if not isinstance(named, Row):
            name = arguments.a_path(place, named, _ROWS)
            try:
                return self.store[name]
            except KeyError:
                raise UsageError(f"{place}: {self.store.name} has no item named {name}") from None
        if named.status == "ok" and self.store.home(named.content) is None:
            raise UsageError(f"{place}: {shown_name(named)} is of another store; give a row of {self.store.name}")
        return named

    def recorder(self, table: Table, questions: Sequence[Question]) -> Recorder:
        """Give what puts a survey's answers into `table`, and recalls what it has. Hashes the weights, once."""
        from qvsplit.checkpoints.fingerprint import canonical_json, language_fingerprint

        assert self.store.config is not None
        configs = replace(self.store.config, videos=None), self.store.config
        of_images, of_videos = (hashlib.sha256(canonical_json(one.to_json())).hexdigest() for one in configs)
        origin = Origin(
            model=self.model,
            config=of_images,  # answers about images stay known when videos are added to their store
            video_config=of_videos,
            weights=language_fingerprint(self.checkpoint),
            dtype=expected_dtype(self.checkpoint, self.options),
        )
        return Recorder(table, origin, {q.name: prompt_hash(q, self.options) for q in questions}, self.store.current)

    def notes(self) -> list[str]:
        """Say what a user should know of how answers are computed; what only the model says, once that is loaded."""
        notes = [self.dtype_note(), self.kernels_note()]
        if isinstance(self.engine, LocalEngine) and self.engine.is_loaded:
            notes.append(self.engine.language.note)
        return [note for note in notes if note is not None]

    def dtype_note(self) -> str | None:
        """Say what a user should know where encoder and language model compute in different dtypes; None if not."""
        assert self.store.config is not None
        mine, theirs = expected_dtype(self.checkpoint, self.options), self.store.config.compute_dtype
        if mine == theirs:
            return None
        if mine.startswith(QUANTISED):
            return f"the store was computed in {theirs}, and the language model is {mine}"
        return (
            f"the store was computed in {theirs}, answers are in {mine}: they are those of encoder and language model "
            f"in these dtypes, not of a full model in one; `dtype={theirs}` makes them so"
        )

    def kernels_note(self) -> str | None:
        """Say why answers by the kernels "reference" may be none of the full model's to the bit; None if they are."""
        config, computed = self.store.config, self.store.device_types
        assert config is not None
        if self.options.kernels != "reference":
            return None
        here = device_type(self.options)
        reasons = [
            f"computed by the {config.kernels} kernels" if config.kernels != "reference" else "",
            f"stored in {config.storage_dtype}" if config.storage_dtype != config.compute_dtype else "",
            f"computed on {' and '.join(sorted(computed))}" if computed - {here} else "",
            "made of images resized on the device" if config.prepared_on != PREPARED_ON[0] else "",
        ]
        if not any(reasons):
            return None
        return (
            f"the store's features were {' and '.join(filter(None, reasons))}: answers are those of the full model "
            f"only within rounding; for the same bits extract again on {here} with `kernels=reference`, and with no "
            "other dtype for storage"
        )


class StoreReader:
    """Gives an engine what requests name, from a store or what stands for one."""

    def __init__(self, store: Collection) -> None:
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


class FeatureSession:
    """A language model that answers from features, without a store. Made by `load_language_model`.

        lm = qvsplit.load_language_model("demo")
        print(lm.answer(encoder.encode(["cat.jpg"]), "What is in the image?").text)

    Attributes:
        engine: What answers.
        options: How it answers.
        checkpoint: The checkpoint whose language model answers.
    """

    def __init__(self, engine: Engine, reader: FeaturesAtHand, checkpoint: Checkpoint, options: AskOptions) -> None:
        self.engine = engine
        self.options = options
        self.checkpoint = checkpoint
        self._reader = reader
        self._checked: list[tuple[ExtractionConfig, int, str]] = []  # under which features were made, and the evidence

    @property
    def model(self) -> str:
        """The model as it was named, and the adapter if it has one."""
        return self.checkpoint.label

    def answer(
        self,
        features: Features | Sequence[Features],
        question: Asked,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question about one image or video, or about several shown together in this order.

        The rows of the answer have the names `image 1`, `image 2` …: features have no file.

        Args:
            features: As `VisionEncoder.encode` or `Store.features` gives them.
            question: Text, or a question with choices.
            on_text: Hears the answer's text as it grows.

        Raises:
            ConfigError: The features are not shown to come from this model's own encoder.
            QvsplitError: It could not be answered.
        """
        asked = a_question(question)
        return _answer(*self._shown(features), asked, on_text)

    def answers(self, features: Features | Sequence[Features], questions: Iterable[Asked]) -> list[Answer]:
        """Answer many questions about one image or video, or about several shown together: one prefill for all.

        Raises:
            ConfigError: As `answer` does.
            QvsplitError: One of them could not be answered.
        """
        asked = questions_of(questions)
        questioner, items = self._shown(features)
        return _answers(Survey(questioner, [items], asked, SurveyOptions(limits=window_limits(self.options))))

    def _shown(self, features: Features | Sequence[Features]) -> tuple[Questioner, PromptItems]:
        given = [one for one, _ in each(features, "features", Features, _FEATURES)]
        for number, one in enumerate(given):
            if one.left_out or POOLER_OUTPUT not in one.tensors:
                left = ", ".join(one.left_out) or POOLER_OUTPUT
                raise UsageError(f"features[{number}]: {left} was not read; give Store.features(row) without names")
        evidence = {self._evidence(one) for one in given}
        rows = self._reader.hold(given)
        return Questioner(self.engine, self.options, ", ".join(sorted(evidence))), PromptItems(rows)

    def _evidence(self, features: Features) -> str:
        """Give what shows that the features are of the model's own encoder. ConfigError if nothing does."""
        config, width = features.config, features.tensors[POOLER_OUTPUT].width
        for known, known_width, evidence in self._checked:
            if (config, width) == (known, known_width):
                return evidence
        evidence = check_features(config, width, self.checkpoint, allow_unchecked=self.options.unchecked_encoder)
        self._checked.append((config, width, evidence))
        return evidence

    def __repr__(self) -> str:
        """Say which model."""
        return f"<FeatureSession of {self.model}>"


def load_session(
    store: Collection | str | PathLike[str] | Iterable[str | PathLike[str]],
    options: AskOptions | None = None,
    *,
    model: str | PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    loaded: bool = True,
    on_load: OnLoad = nobody,
) -> Session:
    """Check that a store belongs to the model, and load its language model alone.

        session = qvsplit.load_session("embeds")
        print(session.answer("cat.jpg", "What is in the image?").text)

    Args:
        store: A store that is open, or the path of one: a folder, a shard, a glob; or several paths.
        options: How answers are made.
        model: The checkpoint's folder or hub name; by default the store's own.
        device: `cpu`, `cuda` or `cuda:N`, or `auto` to spread the model; by default CUDA where there is one.
        dtype: Compute in `float32`, `bfloat16` or `float16`; by default float32 on a CPU, the checkpoint's on CUDA.
        loaded: If not, the model is loaded when it is first used.
        on_load: Hears each part of loading as it begins, and how many of how many bytes of tensors have been read.

    Raises:
        UsageError: An argument is wrong, or there is no such store.
        ConfigError: The store does not belong to the model, or nothing shows that it does.
        ModelError: The model cannot be loaded.
    """
    options = asked_options(options, model=model, device=device, dtype=dtype)
    return session_over(_opened(store), options, loaded=loaded, on_load=on_load)


def session_over(
    collection: Collection, options: AskOptions, *, loaded: bool = True, on_load: OnLoad = nobody
) -> Session:
    """Give the session of a store that is open, or of what stands for one. Raises what `load_session` does."""
    checkpoint, evidence = checked_language_model(collection, options)
    engine = engine_for(checkpoint, options, StoreReader(collection), loaded=loaded, on_load=on_load)
    return Session(collection, engine, options=options, encoder_check=evidence, checkpoint=checkpoint)


def checked_language_model(collection: Collection, options: AskOptions) -> tuple[Checkpoint, str]:
    """Give the checkpoint whose language model is to answer, and the evidence that it may. Loads none.

    Raises:
        UsageError: There is nothing to ask about.
        ConfigError: The features are not shown to come from its encoder.
        ModelError: There is no such checkpoint.
    """
    provenance = collection.provenance
    if provenance is None:
        raise UsageError(_NOTHING)
    checkpoint = choose_checkpoint(
        options.model, "language", own=provenance.model, revision=provenance.revision, adapter=options.adapter,
        own_adapter=provenance.adapter,
    )  # fmt: skip
    return checkpoint, check_encoder(collection, checkpoint, allow_unchecked=options.unchecked_encoder)


def load_language_model(
    model: str | PathLike[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    options: AskOptions | None = None,
    on_load: OnLoad = nobody,
) -> FeatureSession:
    """Load the language model of a checkpoint alone, to answer from features without a store.

        lm = qvsplit.load_language_model("Qwen/Qwen2-VL-2B-Instruct")
        print(lm.answer(features, "What is in the image?").text)

    Args:
        model: A checkpoint's folder or hub name, `NAME@REVISION` for a revision, or `demo`.
        device: As for `load_session`.
        dtype: As for `load_session`.
        options: How answers are made.
        on_load: As for `load_session`.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The model cannot be loaded.
    """
    name = arguments.a_path("model", model, "a checkpoint's folder or hub name")
    options = asked_options(options, model=name, device=device, dtype=dtype)
    adapter = None if options.adapter is None else open_adapter(options.adapter)
    checkpoint = open_checkpoint(name, "language", adapter=adapter)
    reader = FeaturesAtHand()
    engine = engine_for(checkpoint, options, reader, loaded=True, on_load=on_load)
    return FeatureSession(engine, reader, checkpoint, options)


def asked_options(options: AskOptions | None, **more: Any) -> AskOptions:
    """Give the options with those that were given beside them. UsageError for values that cannot be."""
    if options is None:
        options = AskOptions()
    arguments.instance_of("options", options, AskOptions, "AskOptions")
    more = {name: fspath(value) if isinstance(value, PathLike) else value for name, value in more.items()}
    for name, value in more.items():
        twice = getattr(options, name)
        if value is not None and twice not in (None, value):
            raise UsageError(f"{name}: {value} is given, and {twice} in options; give one of them")
    options = replace(options, **{name: value for name, value in more.items() if value is not None})
    options.check()
    return options


def _opened(store: object) -> Collection:
    if isinstance(store, Collection):
        return store
    return open_store(*arguments.paths("store", store, "a store, a path or several"))


def _answer(
    questioner: Questioner, items: PromptItems, question: Question, on_text: Callable[[str], None] | None
) -> Answer:
    """Ask one question. Raises what it could not be answered for."""
    for asked in questioner.ask([(items, question)], on_text=a_callback("on_text", on_text)):
        if asked.error is not None:
            raise asked.error
        return asked.answer
    return questioner.cancelled(items, question)


def _answers(survey: Survey) -> list[Answer]:
    answers = list(survey)
    if survey.error is not None:
        raise survey.error
    return answers
