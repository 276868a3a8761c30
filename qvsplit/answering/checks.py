"""Questions and checks: what is asked, which choices there are, and what an answer means.

A check is a question with choices. It is scored by the probability of each of them, not by reading prose; an answer
that it flags gives its image a verdict. Read from TOML or YAML. Knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from qvsplit.answering.forms import forms_of
from qvsplit.errors import UsageError, some_of
from qvsplit.output.levels import DEFAULT_LEVEL, LEVELS, UNSURE
from qvsplit.runtime import arguments

MIN_CHOICE_MASS = 0.5  # below it the model would more likely have said something else than any of the choices
_ID = re.compile(r"[^\s=,]+")
_KEYS = {"id", "question", "choices", "flag", "threshold", "level", "min_choice_mass", "only_if"}
_FILE_KEYS = {"check", "min_choice_mass"}


@dataclass(frozen=True)
class Condition:
    """`only_if`: the check `id` was flagged, or, with `choice`, was answered so."""

    id: str
    choice: str | None = None


Choices = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Question:
    """One question. Without `choices` it is answered in the model's own words; with them it is a check.

        day = qvsplit.Question("Is it day or night?", choices=["day", "night"])
        print(session.answer("cat.jpg", day).probabilities)

    Attributes:
        text: What is asked.
        id: A name for it.
        choices: A list, or each choice's spellings; their usual forms (`Yes.` for `yes`) are tried by themselves, and
            the probabilities of all forms of a choice are added.
        flag: The choices that are flagged, if their probability together reaches `threshold`. Without, the most
            probable choice must reach `threshold`, else the answer is `unsure`.
        threshold: A probability.
        level: How grave a flagged answer is.
        min_choice_mass: How probable it must be that the model would have given any of the choices by itself. Where it
            is less probable the answer is `unsure` and its verdict `uncertain`.
        only_if: What must hold for the question to be asked.
    """

    text: str
    id: str = ""
    choices: Choices | None = None
    flag: tuple[str, ...] = ()
    threshold: float | None = None
    level: str = DEFAULT_LEVEL
    only_if: Condition | None = None
    min_choice_mass: float = MIN_CHOICE_MASS

    def __post_init__(self) -> None:
        """Make a list choices with one spelling each. UsageError for what cannot be asked, or chosen from."""
        for name in ("text", "id"):
            arguments.instance_of(name, getattr(self, name), str, "a text")
        if isinstance(self.choices, str):
            raise arguments.wrong("choices", self.choices, "a list of choices, or each choice's spellings")
        if self.choices is not None:
            given = self.choices if isinstance(self.choices, Mapping) else _listed(self.choices)
            object.__setattr__(self, "choices", _choices(given, self.name))
        flag: Any = self.flag
        listed = [flag] if isinstance(flag, str) else _listed(flag, "flag")
        object.__setattr__(self, "flag", _flag(listed, self.spellings, self.name))
        _probability(self.threshold, "threshold", self.name)
        if _probability(self.min_choice_mass, "min_choice_mass", self.name) is None:
            raise UsageError(f"{self.name}: min_choice_mass is a probability, 0 to 1")
        if not isinstance(self.level, str) or self.level not in LEVELS:
            raise UsageError(f"{self.name}: level is one of {', '.join(LEVELS)}")
        if not isinstance(self.only_if, Condition):
            object.__setattr__(self, "only_if", _condition(self.only_if, self.name))

    @property
    def spellings(self) -> Mapping[str, tuple[str, ...]]:
        """Each choice and its spellings; none for a question that is answered in the model's own words."""
        assert self.choices is None or isinstance(self.choices, Mapping)
        return cast("Mapping[str, tuple[str, ...]]", self.choices or {})

    @property
    def forms(self) -> Mapping[str, tuple[str, ...]]:
        """Each choice and all forms of its spellings that are scored."""
        return forms_of(self.spellings)

    @property
    def name(self) -> str:
        """Its id, or the question itself where it has none."""
        return self.id or self.text


@dataclass(frozen=True)
class Outcome:
    """What the probabilities of a question's choices come to.

    Attributes:
        answer: The most probable choice, or `unsure`.
        flagged: None where nothing could be flagged, or the model would have said something else.
        score: The probability of the choices that are flagged; None without a flag.
        uncertain: Whether the model would have said something else.
    """

    answer: str
    flagged: bool | None
    score: float | None
    uncertain: bool


def with_choices(question: Question, choices: Sequence[str]) -> Question:
    """Give `question` these choices."""
    return replace(question, choices=_choices(list(choices), f"`choices` {','.join(choices)}"))


def normalised(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Turn log-probabilities into probabilities that add up to one, in their order; all zero if none is possible."""
    if any(math.isnan(value) for value in logprobs.values()):
        raise ValueError(f"log-probabilities that are none: {dict(logprobs)}")
    top = max(logprobs.values())
    if not math.isfinite(top):
        return dict.fromkeys(logprobs, 0.0)  # the model excludes them all: none is more probable
    weights = {choice: math.exp(value - top) for choice, value in logprobs.items()}
    total = sum(weights.values())
    return {choice: weight / total for choice, weight in weights.items()}


def outcome(question: Question, probabilities: Mapping[str, float], choice_mass: float) -> Outcome:
    """Give the answer, and whether it is flagged; a tie goes to the choice named first."""
    best = max(probabilities, key=lambda choice: probabilities[choice])
    score = _score(question.flag, probabilities) if question.flag else None
    if choice_mass < question.min_choice_mass or choice_mass <= 0:  # none of them is possible
        return Outcome(UNSURE, None, score, uncertain=True)
    if score is not None:
        flagged = score >= (0.5 if question.threshold is None else question.threshold)
        return Outcome(best, flagged, score, uncertain=False)
    sure = probabilities[best] >= (question.threshold or 0.0)
    return Outcome(best if sure else UNSURE, None, None, uncertain=False)


def _score(flag: Sequence[str], probabilities: Mapping[str, float]) -> float:
    """Add up the probabilities of the choices that are flagged; of all of them they are one, not nearly one."""
    if set(flag) >= probabilities.keys():
        return 1.0
    return math.fsum(probabilities[choice] for choice in flag)


def rounds(questions: Sequence[Question]) -> list[list[Question]]:
    """Put `questions` in rounds: each after those that its `only_if` looks at."""
    by_name = {question.name: question for question in questions}
    for question in questions:
        if question.only_if is not None:
            _check_condition(question.name, question.only_if, by_name.get(question.only_if.id))
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


def _check_condition(name: str, condition: Condition, other: Question | None) -> None:
    """Raise UsageError for a condition that could never hold: what hangs on it would never be asked."""
    if other is None or other.name == name:
        raise UsageError(f"{name}: only_if names {condition.id}, which is no other check that is asked")
    if condition.choice is None and not other.flag:
        raise UsageError(f'{name}: {condition.id} has no flag; say only_if = "{condition.id} = CHOICE"')
    if condition.choice is not None and condition.choice not in other.spellings:
        raise UsageError(f"{name}: only_if: {condition.choice} is no choice of {condition.id}")


# -------------------------------------------------------------------------------------------------------- reading


def read_checks(file: str | PathLike[str]) -> list[Question]:
    """Read the checks of a TOML or YAML file, in order.

        checks = qvsplit.read_checks("moderation.toml")

    Raises:
        UsageError: It cannot be read, or something in it is no check; with the check's id.
    """
    file = Path(arguments.a_path("file", file))
    content = _parse(file)
    listed = content.get("check") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{file}: no checks; each begins with [[check]] and has an id and a question")
    if isinstance(content, dict) and content.keys() - _FILE_KEYS:
        raise UsageError(
            f"{file}: {some_of(map(str, content.keys() - _FILE_KEYS))} is not known; known are [[check]] and, above "
            "the first of them, min_choice_mass"
        )
    least = content.get("min_choice_mass", MIN_CHOICE_MASS) if isinstance(content, dict) else MIN_CHOICE_MASS
    questions = [_question(entry, f"{file}, check {number}", least) for number, entry in enumerate(listed, 1)]
    names = [question.id for question in questions]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"{file}: two checks have the id {some_of(twice)}")
    try:
        rounds(questions)
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
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
            raise UsageError(f"{file} is not YAML ({error})") from None
    import tomllib

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is not TOML ({error})") from None


def _question(entry: Any, where: str, min_choice_mass: Any) -> Question:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: not a table of id, question, choices …")
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
    choices = _choices(entry["choices"], where) if "choices" in entry else None
    flag = _flag(entry.get("flag", []), choices or {}, where)
    if choices is None and entry.keys() & {"threshold", "level", "min_choice_mass"}:
        raise UsageError(f"{where}: a threshold, level or min_choice_mass needs choices")
    if not flag and "level" in entry:
        raise UsageError(f"{where}: a level needs flag, the choice that is flagged")
    threshold, level = _probability(entry.get("threshold"), "threshold", where), entry.get("level", DEFAULT_LEVEL)
    if level not in LEVELS:
        raise UsageError(f"{where}: level is one of {', '.join(LEVELS)}")
    least = _probability(entry.get("min_choice_mass", min_choice_mass), "min_choice_mass", where)
    condition = _condition(entry.get("only_if"), where)
    return Question(text, name, choices, flag, threshold, level, condition, MIN_CHOICE_MASS if least is None else least)


def _flag(given: Any, choices: Mapping[str, Any], where: str) -> tuple[str, ...]:
    listed = given if isinstance(given, list) else [given]
    flag = tuple(dict.fromkeys(_choice(choice, where) for choice in listed))
    if strangers := set(flag) - set(choices):
        raise UsageError(f"{where}: flag {some_of(strangers)} is none of its choices")
    return flag


def _probability(given: Any, key: str, where: str) -> float | None:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if given is not None and (not is_number or not 0 <= given <= 1):
        raise UsageError(f"{where}: {key} is a probability, 0 to 1")
    return given if is_number else None


def _choices(given: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Read `["yes", "no"]`, or choices with their spellings: `{yes = ["yes", "Yes."], no = ["no", "No."]}`."""
    if isinstance(given, Mapping):
        listed = {_choice(choice, where): spellings for choice, spellings in given.items()}
    elif isinstance(given, list):
        listed = {}
        for choice in given:
            if _choice(choice, where) in listed:
                raise UsageError(f"{where}: the choice {_choice(choice, where)} stands there twice")
            listed[_choice(choice, where)] = [choice]
    else:
        raise UsageError(f"{where}: choices is a list, or a table of spellings")
    by_choice: dict[str, tuple[str, ...]] = {}
    for choice, spellings in listed.items():
        spellings = [spellings] if isinstance(spellings, str) else spellings
        if not isinstance(spellings, list | tuple) or not spellings:
            raise UsageError(f"{where}: the spellings of {choice} are a list")
        by_choice[choice] = tuple(_choice(spelling, where) for spelling in spellings)
    all_spellings = [spelling for spellings in by_choice.values() for spelling in spellings]
    if len(set(all_spellings)) < len(all_spellings):
        raise UsageError(f"{where}: two choices are spelt the same")
    if UNSURE in by_choice:
        raise UsageError(
            f"{where}: {UNSURE} is what an answer is called that is no choice; give the choice another name"
        )
    if len(by_choice) < 2:
        raise UsageError(f"{where}: at least two choices are needed to choose from")
    return by_choice


def _listed(given: Any, name: str = "choices") -> list[Any]:
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise arguments.wrong(name, given, "a list of choices")
    return list(given)


def _choice(choice: Any, where: str) -> str:
    """Give a choice as text. YAML makes one truth value of a bare yes, on and true: which was meant cannot be known."""
    if isinstance(choice, bool):
        raise UsageError(f"{where}: a choice reads as a truth value; put it in quotes")
    if isinstance(choice, int | float):
        return str(choice)
    if not isinstance(choice, str) or not choice.strip():
        raise UsageError(f"{where}: a choice is a text that is not empty")
    return choice


def _condition(given: Any, where: str) -> Condition | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip():
        raise UsageError(f'{where}: only_if is "ID" or "ID = CHOICE"')
    name, equals, choice = (part.strip() for part in given.partition("="))
    return Condition(name, choice if equals else None)
