"""One answer, as it is printed, tabled and reported. Standard library and rows only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.output.levels import DEFAULT_LEVEL, ERROR, PASS, UNCERTAIN
from qvsplit.output.names import names_of

if TYPE_CHECKING:
    from qvsplit.store.row import Row


@dataclass(frozen=True)
class Answer:
    """One answer, and the evidence (`encoder_check`) that its features belong to the model.

        answer = session.answer("cat.jpg", "What is in the image?")
        print(answer.text, answer.finish_reason)

    For a question with choices `text` is the most probable of them, or `unsure` where none can be taken for the
    answer; `tokens` is empty, `logprobs` has the log-probability of each as a whole answer, in any of its forms, and
    `probabilities` the same normalised over them.

    Attributes:
        rows: The images and videos it is about, in their order; of a video in several parts, which of them.
        question: The question.
        text: The answer; empty for one that was skipped or failed, or cut before the model had done thinking.
        tokens: Its tokens, those of the reasoning included, without the prompt's.
        prompt_tokens: How many tokens the prompt had.
        finish_reason: `stop`, `length`, `scored`, `skipped` (its `only_if` did not hold), `cancelled` or `error`.
        encoder_check: What shows that the features are of the model's own encoder: `fingerprint`, its weights at hand;
            `note`, that of a language model alone; `revision`, name and commit on the hub; `unchecked`, nothing.
        id: The check's id; empty for a question without.
        level: How grave it is; None unless it is flagged.
        flagged: Whether the answer is one that its check flags; None where nothing could be, or it is uncertain.
        uncertain: Whether the model would rather have said something else than any of the choices.
        score: The probability of what the check flags; None where it flags nothing.
        logprobs: By choice.
        probabilities: By choice.
        forms: By choice, the most probable of its forms: `Yes.` of `yes`.
        recalled: When it was given, where it was known from before.
        error: Why there is no answer, on one line.
        reasoning: What the model thought before it answered; empty for one that does not think.
    """

    rows: tuple[Row, ...]
    question: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    encoder_check: str
    id: str = ""
    level: str | None = None
    flagged: bool | None = None
    uncertain: bool = False
    score: float | None = None
    logprobs: Mapping[str, float] | None = None
    probabilities: Mapping[str, float] | None = None
    forms: Mapping[str, str] | None = None
    recalled: str | None = None
    error: str | None = None
    reasoning: str = ""

    @property
    def name(self) -> str:
        """The check's id, or the question."""
        return self.id or self.question

    @property
    def is_cut_thought(self) -> bool:
        """Whether it was cut before the model had done thinking: there is no answer yet."""
        return self.finish_reason == "length" and bool(self.reasoning) and not self.text

    @property
    def verdict(self) -> str | None:
        """What this answer alone comes to: `pass`, a level, `uncertain` or `error`.

        None for an answer in the model's own words, and where nothing could be flagged. `pass` for one that was skipped
        and could have been.
        """
        if self.error is not None:
            return ERROR
        if self.uncertain:
            return UNCERTAIN
        if self.flagged is None:
            return None
        if self.flagged:
            return self.level or DEFAULT_LEVEL
        return UNCERTAIN if any(row.unseen for row in self.rows) else PASS  # for what is there it may be flagged

    @property
    def choice(self) -> str | None:
        """The most probable choice, whether or not it can be taken for the answer."""
        return max(self.probabilities, key=self.probabilities.__getitem__) if self.probabilities else None

    @property
    def choice_probability(self) -> float | None:
        """Its probability among the choices."""
        return max(self.probabilities.values()) if self.probabilities else None

    @property
    def choice_form(self) -> str | None:
        """The most probable of its forms."""
        return (self.forms or {}).get(self.choice) if self.choice is not None else None

    @property
    def choice_mass(self) -> float | None:
        """How probable it is that the model would have given any of the choices by itself."""
        return math.fsum(map(math.exp, self.logprobs.values())) if self.logprobs else None

    def to_json(self, *, absolute: bool = False) -> dict[str, Any]:
        """Give it as the commands print it in JSON: `path`, or `paths` where items were asked about together."""
        record: dict[str, Any] = {"type": "answer"} | names_of(self.rows, absolute=absolute)
        record |= {"id": self.id} if self.id else {}
        record |= {"question": self.question, "answer": self.text}
        if self.reasoning:
            record |= {"reasoning": self.reasoning}
        if self.probabilities is not None:
            record |= {
                "choice": self.choice, "choice_probability": self.choice_probability,
                "choice_form": self.choice_form, "choice_mass": self.choice_mass,
                "probabilities": dict(self.probabilities), "logprobs": dict(self.logprobs or {}),
                "forms": dict(self.forms or {}),
            }  # fmt: skip
        if self.verdict is not None:
            record |= {"verdict": self.verdict, "score": self.score, "flagged": self.flagged, "level": self.level}
        if self.error is not None:
            record |= {"error": self.error}
        return record | {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "encoder_check": self.encoder_check,
        }
