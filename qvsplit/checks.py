"""Questions and checks: what is asked, which answers are allowed, and what an answer means.

A check is a question whose allowed answers are known. It is scored by the probability of each of them, not by reading
prose; an answer that raises it gives its picture a verdict. Read from TOML or YAML. Knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from qvsplit.errors import UsageError, some_of

SEVERITIES = ("info", "warn", "block")
PASS = "pass"  # the verdict on a picture that nothing was raised for
COVERED = 0.01  # the least that allowed answers should come to of what a model would say by itself
UNSURE = "unsure"  # the answer where none reaches the threshold
_ID = re.compile(r"[^\s=,]+")
_KEYS = {"id", "question", "answers", "flag", "threshold", "severity", "only_if"}


@dataclass(frozen=True)
class Condition:
    """`only_if`: the check `id` was raised, or, with `answer`, was answered so."""

    id: str
    answer: str | None = None


Answers = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Question:
    """One question. Without `answers` it is answered in the model's own words; with them it is a check.

    `answers` is a list, or has each allowed answer's spellings, whose probabilities are added. `flag`: the answers that
    raise it, if their probability together reaches `threshold`. Without `flag` the likeliest answer must reach
    `threshold`, else the answer is `unsure`.
    """

    text: str
    id: str = ""
    answers: Answers | None = None
    flag: tuple[str, ...] = ()
    threshold: float | None = None
    severity: str = "warn"
    only_if: Condition | None = None

    def __post_init__(self) -> None:
        """Lists become answers with one spelling each. UsageError for what cannot be chosen from."""
        if self.answers is not None:
            given = self.answers if isinstance(self.answers, Mapping) else list(self.answers)
            object.__setattr__(self, "answers", _answers(given, self.name))

    @property
    def spelt(self) -> Mapping[str, tuple[str, ...]]:
        """Each allowed answer and its spellings; none for a question that is answered in the model's own words."""
        assert self.answers is None or isinstance(self.answers, Mapping)
        return cast("Mapping[str, tuple[str, ...]]", self.answers or {})

    @property
    def name(self) -> str:
        """Its id, or the question itself where it has none."""
        return self.id or self.text


@dataclass(frozen=True)
class Outcome:
    """What the probabilities of a question's answers come to. `flagged` is None where nothing could raise it."""

    answer: str
    probability: float
    flagged: bool | None


def with_choices(question: Question, allowed: Sequence[str]) -> Question:
    """`question` with the allowed answers of `--choices`."""
    return replace(question, answers=_answers(list(allowed), f"--choices {','.join(allowed)}"))


def normalised(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Log-probabilities to probabilities that add up to one, in the order given; all zero if none is possible."""
    if any(math.isnan(value) for value in logprobs.values()):
        raise ValueError(f"log-probabilities that are none: {dict(logprobs)}")
    top = max(logprobs.values())
    if not math.isfinite(top):
        return dict.fromkeys(logprobs, 0.0)  # the model excludes them all: none is the likelier
    weights = {answer: math.exp(value - top) for answer, value in logprobs.items()}
    total = sum(weights.values())
    return {answer: weight / total for answer, weight in weights.items()}


def outcome(question: Question, probabilities: Mapping[str, float]) -> Outcome:
    """The answer and whether it raises the check; a tie goes to the answer named first."""
    best = max(probabilities, key=lambda answer: probabilities[answer])
    if question.flag:
        raised = sum(probabilities[answer] for answer in question.flag)
        return Outcome(best, probabilities[best], raised >= (0.5 if question.threshold is None else question.threshold))
    sure = probabilities[best] >= (question.threshold or 0.0)
    return Outcome(best if sure else UNSURE, probabilities[best], None)


def verdict(raised: Iterable[str]) -> str:
    """The verdict on a picture from the severities of what was raised: the gravest, or `pass`."""
    return max(raised, key=SEVERITIES.index, default=PASS)


def levels(questions: Sequence[Question]) -> list[list[Question]]:
    """`questions` in rounds: each after those that its `only_if` looks at."""
    names = {question.name for question in questions}
    for question in questions:
        if question.only_if is not None and question.only_if.id not in names:
            raise UsageError(f"{question.name}: only_if names {question.only_if.id}, which is not asked")
    rounds: list[list[Question]] = []
    done: set[str] = set()
    waiting = list(questions)
    while waiting:
        ready = [question for question in waiting if question.only_if is None or question.only_if.id in done]
        if not ready:
            raise UsageError(f"checks wait for each other in a circle: {some_of(q.name for q in waiting)}")
        rounds.append(ready)
        done |= {question.name for question in ready}
        waiting = [question for question in waiting if question not in ready]
    return rounds


# -------------------------------------------------------------------------------------------------------- reading


def read_checks(file: Path) -> list[Question]:
    """The checks of a TOML or YAML file, in order. UsageError, with the check's id, for what is not one."""
    content = _parse(file)
    listed = content.get("check") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{file}: no checks; each begins with [[check]] and has an id and a question")
    if isinstance(content, dict) and content.keys() - {"check"}:
        raise UsageError(f"{file}: {some_of(map(str, content.keys() - {'check'}))} is not known; only [[check]] is")
    questions = [_question(entry, f"{file}, check {number}") for number, entry in enumerate(listed, 1)]
    names = [question.id for question in questions]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"{file}: two checks have the id {some_of(twice)}")
    by_id = {question.id: question for question in questions}
    for question in questions:
        _check_condition(question, by_id, file)
    try:
        levels(questions)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return questions


def _parse(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"checks cannot be read from {file} ({error})") from None
    if file.suffix.lower() in {".yaml", ".yml"}:
        import yaml

        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
            raise UsageError(f"{file} is not YAML ({error})") from None
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is not TOML ({error})") from None


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: not a table of id, question, answers …")
    name = entry.get("id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise UsageError(f"{where}: needs an id, a word without spaces, commas and =")
    where = f"{where} ({name})"
    if entry.keys() - _KEYS:
        raise UsageError(
            f"{where}: {some_of(map(str, entry.keys() - _KEYS))} is not known; known are {', '.join(sorted(_KEYS))}"
        )
    text = entry.get("question")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: needs a question")
    answers = _answers(entry["answers"], where) if "answers" in entry else None
    flag = entry.get("flag", [])
    flag = flag if isinstance(flag, list) else [flag]
    flag = tuple(dict.fromkeys(_answer(answer, where) for answer in flag))
    strangers = set(flag) - set(answers or {})
    if strangers:
        raise UsageError(f"{where}: flag {some_of(strangers)} is none of its answers")
    threshold = entry.get("threshold")
    if threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 <= threshold <= 1:
            raise UsageError(f"{where}: threshold is a probability, 0 to 1")
    severity = entry.get("severity", "warn")
    if severity not in SEVERITIES:
        raise UsageError(f"{where}: severity is one of {', '.join(SEVERITIES)}")
    if answers is None and ("threshold" in entry or "severity" in entry):
        raise UsageError(f"{where}: a threshold or severity needs answers")
    if not flag and "severity" in entry:
        raise UsageError(f"{where}: a severity needs flag, the answer that raises it")
    return Question(text, name, answers, flag, threshold, severity, _condition(entry.get("only_if"), where))


def _answers(given: Any, where: str) -> dict[str, tuple[str, ...]]:
    """`["yes", "no"]`, or answers with their spellings: `{yes = ["yes", "Yes."], no = ["no", "No."]}`."""
    if isinstance(given, dict):
        told = {_answer(answer, where): spellings for answer, spellings in given.items()}
    elif isinstance(given, list):
        told = {}
        for answer in given:
            if _answer(answer, where) in told:
                raise UsageError(f"{where}: the answer {_answer(answer, where)} stands there twice")
            told[_answer(answer, where)] = [answer]
    else:
        raise UsageError(f"{where}: answers is a list, or a table of spellings")
    spelt: dict[str, tuple[str, ...]] = {}
    for answer, spellings in told.items():
        spellings = [spellings] if isinstance(spellings, str) else spellings
        if not isinstance(spellings, list | tuple) or not spellings:
            raise UsageError(f"{where}: the spellings of {answer} are a list")
        spelt[answer] = tuple(_answer(spelling, where) for spelling in spellings)
    all_spellings = [spelling for spellings in spelt.values() for spelling in spellings]
    if len(set(all_spellings)) < len(all_spellings):
        raise UsageError(f"{where}: two answers are spelt the same")
    if len(spelt) < 2:
        raise UsageError(f"{where}: at least two answers are needed to choose from")
    return spelt


def _answer(answer: Any, where: str) -> str:
    """An answer as text. YAML makes one truth value of a bare yes, on and true: which was meant cannot be known."""
    if isinstance(answer, bool):
        raise UsageError(f"{where}: an answer reads as a truth value; put it in quotes")
    if isinstance(answer, int | float):
        return str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UsageError(f"{where}: an answer is a text that is not empty")
    return answer


def _condition(given: Any, where: str) -> Condition | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f'{where}: only_if is "ID" or "ID = ANSWER"')
    name, equals, answer = (part.strip() for part in given.partition("="))
    return Condition(name, answer if equals else None)


def _check_condition(question: Question, by_id: Mapping[str, Question], file: Path) -> None:
    condition = question.only_if
    if condition is None:
        return
    other = by_id.get(condition.id)
    if other is None or other is question:
        raise UsageError(f"{file}, check {question.id}: only_if names {condition.id}, which is no other check")
    if condition.answer is None and not other.flag:
        raise UsageError(
            f'{file}, check {question.id}: {condition.id} has no flag; say only_if = "{condition.id} = ANSWER"'
        )
    if condition.answer is not None and condition.answer not in other.spelt:
        raise UsageError(f"{file}, check {question.id}: {condition.answer} is no answer of {condition.id}")
