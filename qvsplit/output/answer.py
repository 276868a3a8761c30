"""One answer, as it is printed, tabled and reported. Standard library and rows only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qvsplit.output.levels import DEFAULT_LEVEL, ERROR, verdict
from qvsplit.output.names import names_of
from qvsplit.store.row import Row


@dataclass(frozen=True)
class Answer:
    """One answer, and the evidence (`encoder_check`) that its features belong to the model.

        answer = session.answer("cat.jpg", "What is in the image?")
        print(answer.text, answer.finish_reason)

    For a question with choices `text` is the most probable of them, `tokens` is empty, `logprobs` has the
    log-probability of each as a whole answer, and `probabilities` the same normalised over them.

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
        level: How grave it is if it is flagged.
        flagged: Whether the answer is one that its check flags; None where nothing could be.
        logprobs: By choice.
        probabilities: By choice.
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
    logprobs: Mapping[str, float] | None = None
    probabilities: Mapping[str, float] | None = None
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
    def probability(self) -> float | None:
        """The probability of the most probable choice."""
        return max(self.probabilities.values()) if self.probabilities else None

    @property
    def choice_mass(self) -> float | None:
        """How probable it is that the model would have given any of the choices by itself."""
        return math.fsum(map(math.exp, self.logprobs.values())) if self.logprobs else None

    def to_json(self) -> dict[str, Any]:
        """Give it as the commands print it in JSON: `path`, or `paths` where items were asked about together."""
        record = names_of(self.rows) | ({"id": self.id} if self.id else {})
        record |= {"question": self.question, "answer": self.text}
        if self.reasoning:
            record |= {"reasoning": self.reasoning}
        if self.probabilities is not None:
            record |= {
                "probability": self.probability, "probabilities": dict(self.probabilities),
                "logprobs": dict(self.logprobs or {}), "choice_mass": self.choice_mass,
            }  # fmt: skip
        if self.flagged is not None:
            record |= {"flagged": self.flagged, "level": self.level}
        if self.error is not None:
            record |= {"error": self.error}
        return record | {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "encoder_check": self.encoder_check,
        }


def verdict_on(answers: Iterable[Answer]) -> str:
    """Give the verdict that all answers about one item come to: the gravest level flagged, ERROR where one failed."""
    levels = [ERROR if answer.error is not None else answer.level or DEFAULT_LEVEL
              for answer in answers if answer.flagged or answer.error is not None]  # fmt: skip
    return verdict(levels)
