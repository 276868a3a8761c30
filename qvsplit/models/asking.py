"""What a way of answering is, and what all of them share: questions in, answers grown token by token, choices scored.

A way keeps a prompt's beginning in the form that suits the model's layers, and answers questions behind it:
`shared_prefix.py`, `copied_prefix.py`, `whole_prompt.py`. Which model has which is in `ways.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from qvsplit.models.decoding import GrowingAnswer
    from qvsplit.models.prefix_cache import Beginning
    from qvsplit.models.prompt import Prompt
    from qvsplit.store.features import Features

NOT_FINITE = "error"  # the finish_reason of an answer for which the model computes no numbers
Choices = Sequence[Sequence[Sequence[int]]]  # for each question, of each choice its tokens


@dataclass(frozen=True)
class PrefixedQuestion:
    """One question: the tokens behind a prefix, up to where the answer begins.

    `seed` is for sampling; `types` are the processor's types of the suffix's tokens, 0 where nothing is said.
    """

    prefix: Beginning
    suffix: Sequence[int]
    seed: int = 0
    types: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, prefix: Beginning, seed: int = 0) -> PrefixedQuestion:
        """Give what stands in a prompt behind its last item."""
        end = prompt.prefix_tokens
        types = {name: values[end:] for name, values in prompt.token_types.items()}
        return cls(prefix, prompt.input_ids[end:], seed, types)


class Way(Protocol):
    """How a model answers questions behind the beginning of a prompt. `name` says it in a few words."""

    name: str

    @property
    def can_extend(self) -> bool:
        """Whether further items can be computed behind a beginning, without the items in it."""

    def prefill(self, prompt: Prompt, features: Sequence[Features], after: Beginning | None) -> Beginning:
        """Compute the prompt's beginning up to its last item; `features` are those of the items behind `after`."""

    def generate(
        self,
        questions: Sequence[PrefixedQuestion],
        answers: Sequence[GrowingAnswer],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Let each answer grow until it ends."""

    def score(self, questions: Sequence[PrefixedQuestion], choices: Choices) -> list[list[float] | None]:
        """Give log-probabilities of each question's choices with the end after them; None where they are no numbers."""

    def tokens(self, questions: Sequence[PrefixedQuestion]) -> int:
        """Count the tokens in memory while these are answered."""


class Batch(Protocol):
    """Questions that are being answered together, one a row."""

    @property
    def scores(self) -> torch.Tensor:
        """Scores of each row's next token, float32 [rows, vocabulary]."""

    def next(self, tokens: Sequence[int]) -> None:
        """Run each row's newest token."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""


def grow(batch: Batch, answers: Sequence[GrowingAnswer], is_cancelled: Callable[[], bool]) -> None:
    """Let the answers grow, one token a step each, until all have ended; those that have are computed no more."""
    growing = list(answers)
    while True:
        take_tokens(growing, batch.scores)
        alive = [row for row, answer in enumerate(growing) if answer.finish_reason is None]
        if not alive:
            return
        if len(alive) < len(growing):
            growing = [growing[row] for row in alive]
            batch.keep(alive)
        if is_cancelled():
            for answer in growing:
                answer.end("cancelled")
            return
        batch.next([answer.tokens[-1] for answer in growing])


def take_tokens(answers: Sequence[GrowingAnswer], scores: torch.Tensor) -> None:
    """Choose each answer's next token by its row of `scores`, [rows, vocabulary]."""
    finite = finite_rows(scores)
    plain = answers[0].is_plain
    most_probable = scores.argmax(-1).tolist() if plain else []
    for row, answer in enumerate(answers):
        if finite[row]:
            answer.take(most_probable[row] if plain else answer.choose(scores[row]))
        else:
            answer.end(NOT_FINITE)


def finite_rows(values: torch.Tensor) -> list[bool]:
    """Say of which rows of a batch all values are finite: what came of others would look like an answer."""
    finite = values.isfinite()
    if bool(finite.all()):
        return [True] * len(values)
    return [bool(row.all()) for row in finite]


# ------------------------------------------------------------------------------------------- choices, one a row each


@dataclass(frozen=True)
class RowLogs:
    """Log-probabilities along one row: of each token of its choice, and of the end before and after each of them."""

    tokens: Sequence[float]
    ends: Sequence[float]

    def of(self, length: int) -> float:
        """Give that of the choice's first `length` tokens as a whole answer."""
        return sum(self.tokens[:length]) + self.ends[length]


def choices_with_rows(choices: Choices) -> list[list[Sequence[int]]]:
    """Give for each question the choices that need a row: not those with which another begins (`Yes` and `Yes.`)."""
    return [
        [tokens for tokens in mine if not any(_goes_on(other, tokens) and other != tokens for other in mine)]
        for mine in choices
    ]


def choice_rows(questions: Sequence[PrefixedQuestion], choices: Choices) -> list[PrefixedQuestion]:
    """Give one row for each question and choice: the choice stands behind the question as if it had been answered."""
    return [
        replace(one, suffix=[*one.suffix, *tokens])
        for one, mine in zip(questions, choices, strict=True)
        for tokens in mine
    ]


def row_logs(scores: torch.Tensor, tokens: Sequence[int], stops: Sequence[int]) -> RowLogs | None:
    """Read a row's last scores, [choice tokens + 1, vocabulary]: they foretell its tokens and the end after each.

    An end is any of `stops`. None where the model computes no numbers.
    """
    import torch

    if not all(finite_rows(scores[None])):
        return None
    logs = torch.log_softmax(scores.float(), -1).double()
    each = [float(logs[place, token]) for place, token in enumerate(tokens)]
    ends = torch.logsumexp(logs[:, list(stops)], -1).tolist()
    return None if any(map(math.isnan, [*each, *ends])) else RowLogs(each, ends)


def choice_sums(logs: Sequence[RowLogs | None], choices: Choices) -> list[list[float] | None]:
    """Give the log-probability of every choice from the `logs` of `choices_with_rows`, in their order."""
    waiting = iter(logs)
    sums: list[list[float] | None] = []
    for mine, with_rows in zip(choices, choices_with_rows(choices), strict=True):
        of_rows = [(tokens, next(waiting)) for tokens in with_rows]
        if any(row is None for _, row in of_rows):
            sums.append(None)
        else:
            sums.append([_of_first(of_rows, tokens) for tokens in mine])
    return sums


def _of_first(rows: Sequence[tuple[Sequence[int], RowLogs | None]], tokens: Sequence[int]) -> float:
    """Give the log-probability of `tokens` from the first row that begins with them."""
    return next(row.of(len(tokens)) for one, row in rows if row is not None and _goes_on(one, tokens))


def _goes_on(other: Sequence[int], tokens: Sequence[int]) -> bool:
    return list(other[: len(tokens)]) == list(tokens)


def runs_of_one_length(questions: Sequence[PrefixedQuestion]) -> list[list[int]]:
    """Sort the numbers of questions into runs with suffixes of one length, so that nothing is padded."""
    runs: dict[int, list[int]] = {}
    for number, one in enumerate(questions):
        runs.setdefault(len(one.suffix), []).append(number)
    return list(runs.values())
