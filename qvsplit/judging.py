"""A gate over files: checks about these alone, a verdict on each, and whether all may pass. It fails closed.

What is not known is never a pass: a file that is not there, cannot be read, was changed while it was judged, or of
which the model would have said something else than a check's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike

from qvsplit.answering.checks import Question, read_checks
from qvsplit.answering.given import questions_of
from qvsplit.answering.options import AskOptions
from qvsplit.answering.requests import PromptItems
from qvsplit.ask import asked_options, session_over
from qvsplit.errors import UsageError
from qvsplit.on_demand import FilesAtHand, GivenFile, encoder_options, files_at_hand
from qvsplit.output.answer import Answer
from qvsplit.output.levels import ERROR, LEVELS, verdict
from qvsplit.output.verdicts import (
    ItemVerdict,
    check_allowed,
    check_level,
    joined,
    trips,
    verdict_on_answers,
    verdict_on_failed,
)
from qvsplit.pipeline.summary import ExtractCallbacks
from qvsplit.runtime import arguments, interrupts
from qvsplit.runtime.loading import OnLoad, nobody
from qvsplit.sources.decoder import ITEM_SECONDS
from qvsplit.sources.images import MAX_IMAGE_PIXELS
from qvsplit.store.opening import open_store
from qvsplit.store.row import PART_MARK, Row
from qvsplit.store.store import Store

CHANGED = "changed on disk since it was read"
ANY_FLAG = LEVELS[0]  # the level that a gate has unless another is named: whatever is flagged trips it

Files = str | PathLike[str] | Iterable[str | PathLike[str]]


@dataclass(frozen=True)
class GateCallbacks:
    """What a caller may want to hear while a gate judges. Called in the caller's thread.

        hears = qvsplit.GateCallbacks(on_answer=lambda answer: print(answer.name, answer.text))
        qvsplit.gate(["upload.jpg"], "moderation.toml", callbacks=hears)

    Attributes:
        encoding: Hears of files that are read and encoded, as of an extraction.
        on_asking: Hears how many answers there will be, before the language model is loaded.
        on_answer: Hears each of them.
        on_load: Hears each part of loading the language model, as for `load_session`.
        on_note: Hears what a user should know of how answers are computed, line by line: see `Session.notes`.
    """

    encoding: ExtractCallbacks | None = None
    on_asking: Callable[[int], None] = lambda number: None
    on_answer: Callable[[Answer], None] = lambda answer: None
    on_load: OnLoad = nobody
    on_note: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Judgement:
    """What a gate found.

        if not judgement.passed:
            print([(one.rows[0].path, one.verdict) for one in judgement.verdicts])

    Attributes:
        verdicts: One a file, in the order in which they were given. Of a video in several clips it is the gravest of
            theirs, and `flagged` and `uncertain` name the clip behind the check: `dog#2`.
        passed: Whether nothing tripped the gate.
    """

    verdicts: tuple[ItemVerdict, ...]
    passed: bool


def gate(
    files: Files,
    checks: str | PathLike[str] | Iterable[Question],
    *,
    fail_on: str = ANY_FLAG,
    allow: Iterable[str] = (),
    embeds: Store | str | PathLike[str] | None = None,
    model: str | PathLike[str] | None = None,
    options: AskOptions | None = None,
    item_timeout: float = ITEM_SECONDS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    callbacks: GateCallbacks | None = None,
) -> Judgement:
    """Judge files by checks: these files and no others, as they are on disk now.

        judgement = qvsplit.gate(["upload.jpg"], "moderation.toml")
        if not judgement.passed:
            print(judgement.verdicts[0].verdict, judgement.verdicts[0].flagged, judgement.verdicts[0].error)

    Files whose content the store has are not encoded again; all others are, in memory. Nothing is written anywhere.

    Args:
        files: Paths of images and videos. One that is not there is no error of the call: its verdict is `error`.
        checks: A file of checks, or the checks themselves; at least one has a flag.
        fail_on: What is flagged at this level or above trips the gate; by default whatever is flagged.
        allow: What does not trip it: `uncertain`, `error`, or both.
        embeds: A store, open or by its path, where features may be already. All others are made as that was made.
        model: A checkpoint's folder or hub name; by default the store's own.
        options: How answers are made. Device and dtype hold for the encoder as well, where no store has its own.
        item_timeout: Seconds for each step of a file: to be read, to be decoded.
        max_image_pixels: An image of more pixels is not decoded: its verdict is `error`.
        callbacks: Who hears of what goes on.

    Raises:
        UsageError: An argument is wrong: a path is a folder's, a level is none, no check has a flag.
        ConfigError: The store does not belong to the model.
        ModelError: The model cannot be loaded.
    """
    callbacks = GateCallbacks() if callbacks is None else callbacks
    names, allowed = arguments.paths("files", files), tuple(allow)
    questions = _checked(checks, fail_on, allowed)
    options = asked_options(options, model=model)
    with ExitStack() as stack:
        store = None if embeds is None else _opened(embeds, stack)
        extracting = encoder_options(store, options, item_timeout, max_image_pixels)
        hand = stack.enter_context(files_at_hand(names, store=store, options=extracting, callbacks=callbacks.encoding))
        by_row = _answered(hand, questions, options, callbacks)
        verdicts = tuple(_unchanged(hand, file, _verdict_on(hand.rows_of(file), by_row)) for file in hand.files)
    return Judgement(verdicts, not trips(verdicts, fail_on, allowed))


def _checked(checks: str | PathLike[str] | Iterable[Question], fail_on: str, allow: Iterable[str]) -> list[Question]:
    """Give the checks. UsageError where the gate could never be tripped by them, or has no such level."""
    check_level(arguments.instance_of("fail_on", fail_on, str, "a level"))
    check_allowed(allow)
    questions = read_checks(checks) if isinstance(checks, str | PathLike) else questions_of(checks)
    if not any(question.flag for question in questions):
        raise UsageError("a gate needs a check that has a flag; none of these does")
    return questions


def _opened(embeds: Store | str | PathLike[str], stack: ExitStack) -> Store:
    if isinstance(embeds, Store):
        return embeds
    return stack.enter_context(open_store(arguments.a_path("embeds", embeds, "a store or its path")))


_Answers = Mapping[tuple[str, str, int], Sequence[Answer]]  # by a row's root, path and part


def _answered(
    hand: FilesAtHand, questions: Sequence[Question], options: AskOptions, callbacks: GateCallbacks
) -> _Answers:
    """Ask every check about every row that can be asked about; the language model is loaded if there is any."""
    rows = [row for row in hand.rows if row.status == "ok"]
    answers: dict[tuple[str, str, int], list[Answer]] = {}
    if not rows:
        return answers
    callbacks.on_asking(len(rows) * len(questions))
    with interrupts.at_once():  # only reading so far, and no process to end
        session = session_over(hand, options, on_load=callbacks.on_load)
    for note in session.notes():
        callbacks.on_note(note)
    survey = session.survey([PromptItems((row,)) for row in rows], questions)
    for answer in survey:
        row = answer.rows[0]
        answers.setdefault((row.root, row.path, row.part), []).append(answer)
        callbacks.on_answer(answer)
        interrupts.check()
    if survey.cancelled:
        raise KeyboardInterrupt
    return answers


def _verdict_on(rows: Sequence[Row], answers: _Answers) -> ItemVerdict:
    """Give the verdict on one file: the gravest of its clips'."""
    for row in rows:
        if row.status != "ok":
            return verdict_on_failed(row)
    parts = [_named_by_part(row, verdict_on_answers(answers[row.root, row.path, row.part])) for row in rows]
    return joined((replace(rows[0], part=0, start=None, end=None),), parts)


def _named_by_part(row: Row, item: ItemVerdict) -> ItemVerdict:
    """Give a verdict whose checks are named with the clip they are about: `dog#2`."""
    if not row.is_part:
        return item
    part = f"{PART_MARK}{row.part}"
    return replace(
        item, flagged=tuple(f"{name}{part}" for name in item.flagged),
        uncertain=tuple(f"{name}{part}" for name in item.uncertain), error=item.error and f"{part}: {item.error}",
    )  # fmt: skip


def _unchanged(hand: FilesAtHand, file: GivenFile, item: ItemVerdict) -> ItemVerdict:
    """Give the verdict, if it is on the file that is on disk; else that nothing is known of that one."""
    if item.error or not hand.is_changed(file):
        return item
    return replace(item, verdict=verdict([item.verdict, ERROR]), error=CHANGED)
